"""A record and where it stands: its fields, each checked as it is asked for."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from gram_jax.data.sources import (
    Message,
    PreferenceRow,
    Prompt,
    Response,
    checked_messages,
    checked_response,
    is_finite_number,
    optional_text,
    present,
    require_prompt,
    require_response,
    require_text,
    with_context,
)
from gram_jax.errors import DataError
from gram_jax.pair import Pair


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """A JSON object with its place.

    Attributes:
      values: the object.
      file, line: where it stands, for messages.
      reference_field: column with log-probs under a reference model, one for each response; or "".
    """

    values: dict[str, Any]
    file: str | Path
    line: int
    reference_field: str = ""

    def error(self, field: str, reason: str) -> DataError:
        """What is wrong with a field."""
        return DataError(reason, file=self.file, line=self.line, field=field)

    def value(self, field: str) -> Any:
        return present(self.values, field, self.file, self.line)

    def text(self, field: str, *, allow_empty: bool = False) -> str:
        return require_text(
            self.values, field, file=self.file, line=self.line, allow_empty=allow_empty
        )

    def optional_text(self, field: str) -> str:
        return optional_text(self.values, field, self.file, self.line)

    def number(self, field: str, default: float | None = None) -> float:
        """A finite number; ``default``, if there is one, stands in for null or nothing."""
        if default is not None and self.values.get(field) is None:
            return default
        value = self.value(field)
        if not is_finite_number(value):
            raise self.error(field, "must be a finite number")
        return float(value)

    def numbers(self, field: str, count: int, of: str) -> list[float]:
        """A list of ``count`` finite numbers, one for each of what ``of`` names."""
        value = self.value(field)
        if isinstance(value, list) and len(value) == count and all(map(is_finite_number, value)):
            return [float(number) for number in value]
        raise self.error(field, f"must be a list of {count} finite numbers, one for each of {of}")

    def items(self, field: str, least: int) -> list[Any]:
        """A list of at least ``least`` values."""
        value = self.value(field)
        if not isinstance(value, list) or len(value) < least:
            few = "one response" if least == 1 else f"{least} responses"
            raise self.error(field, f"must be a list of at least {few}")
        return value

    def messages(self, field: str) -> list[Message]:
        value = self.value(field)
        if not isinstance(value, list):
            raise self.error(field, "must be a list of chat messages")
        return checked_messages(value, field, self.file, self.line)

    def prompt(self, field: str = "prompt") -> Prompt:
        """The prompt in a field, with the record's `system` and `tools`."""
        return require_prompt(self.values, field, file=self.file, line=self.line)

    def instruction(self) -> str:
        """The columns instruction and input as one text, on lines of their own."""
        if self.values.get("history"):
            reason = "is not read here; write the turns as chat messages (prompt, response)"
            raise self.error("history", reason)
        parts = self.text("instruction", allow_empty=True), self.optional_text("input")
        return "\n".join(part for part in parts if part)

    def in_context(self, prompt: Prompt) -> Prompt:
        """A prompt made of other fields, with the record's `system` and `tools`."""
        return with_context(self.values, prompt, file=self.file, line=self.line)

    def response(self, field: str, prompt: Prompt) -> Response:
        return require_response(self.values, field, prompt, file=self.file, line=self.line)

    def responses(self, field: str, prompt: Prompt, least: int = 1) -> tuple[Response, ...]:
        """A list of at least ``least`` responses."""
        return tuple(
            self.as_response(value, f"{field}[{place}]", prompt)
            for place, value in enumerate(self.items(field, least))
        )

    def as_response(self, value: Any, field: str, prompt: Prompt) -> Response:
        return checked_response(value, field, prompt, file=self.file, line=self.line)

    def reference(self, count: int) -> tuple[float, ...] | None:
        """Log-probs of ``count`` responses under a reference model, or None if none are asked for.

        They stand as `score` writes them: in a list, or a single one by itself.
        """
        if not self.reference_field:
            return None
        value = self.value(self.reference_field)
        if count == 1 and is_finite_number(value):
            return (float(value),)
        if isinstance(value, list) and len(value) == count and all(map(is_finite_number, value)):
            return tuple(float(number) for number in value)
        names = "two finite numbers, [chosen, rejected]," if count == 2 else f"{count} numbers"
        raise self.error(self.reference_field, f"must be a list of {names} as `score` writes")

    def comparison(
        self,
        prompt: Prompt,
        responses: tuple[Response, Response],
        fields: tuple[str, str],
        pair: Pair,
        subset: str,
    ) -> PreferenceRow:
        """A row of two responses and the one comparison between them.

        Raises:
          DataError: both are the same.
        """
        if responses[0] == responses[1]:
            reason = f"is the same as {fields[0]}, so the row prefers nothing; remove it"
            raise self.error(fields[1], reason)
        reference = self.reference(2)
        return PreferenceRow(prompt, responses, (pair,), fields, subset, reference, self.line)
