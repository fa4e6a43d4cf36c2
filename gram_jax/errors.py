"""Errors that are for the person at the keyboard: what was wrong, where, and what to do.

An entry point catches `UserError`, prints its message without a traceback and exits with status 2.
Anything else that escapes is a defect of this code and keeps its traceback.
"""

from __future__ import annotations

import functools
from typing import Any


class UserError(Exception):
    """A bad input or a bad setting; the message says what, where, and what to do about it."""


class DataError(UserError):
    """A bad data file, or one bad row of it.

    The message reads `FILE:LINE: field 'x': reason`, with the parts that are not known left out.

    Attributes:
      reason: what is wrong, without the place.
      file: the file as the user named it.
      line: 1-based line number, or None when the file as a whole is at fault.
      field: the field of the row, or None when the row as a whole is at fault.
    """

    def __init__(
        self, reason: str, *, file: object, line: int | None = None, field: str | None = None
    ) -> None:
        self.reason = reason
        self.file = str(file)
        self.line = line
        self.field = field
        place = self.file if line is None else f"{self.file}:{line}"
        named = "" if field is None else f"field {field!r}: "
        super().__init__(f"{place}: {named}{reason}")

    def __reduce__(self) -> tuple[Any, ...]:
        # Exceptions are rebuilt from their one message; this one comes back from worker processes.
        return functools.partial(DataError, file=self.file, line=self.line, field=self.field), (
            self.reason,
        )
