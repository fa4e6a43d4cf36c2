"""Where examples come from: rows of JSONL files, read one by one and checked where they stand.

A file is plain or gzip (`.gz`), one JSON object per line, UTF-8. Lines end with a newline byte and
with nothing else: `str.splitlines` would also split at U+2028 inside a string, so files are read as
bytes. Every fault is a `DataError` that names file, line and field.
"""

from __future__ import annotations

import gzip
import json
import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeAlias, cast

from gram_jax.errors import DataError

Message: TypeAlias = dict[str, Any]
Prompt: TypeAlias = str | list[Message]
Response: TypeAlias = str | list[Message]


class TextRow(NamedTuple):
    """One text to learn from, and the source it counts under in mixtures and reports."""

    text: str
    source: str


class PreferenceRow(NamedTuple):
    """A prompt with a better and a worse response, all text or all chat messages.

    Attributes:
      prompt: text, or chat messages that end with the turn to be answered.
      chosen, rejected: text, or a list with one assistant message (only if the prompt is messages).
      subset: what the row is reported under; "" if the file does not say.
      reference: log-probabilities (chosen, rejected) under a reference model, or None.
      line: 1-based line in its file, for messages about this row.
    """

    prompt: Prompt
    chosen: Response
    rejected: Response
    subset: str
    reference: tuple[float, float] | None
    line: int


def read_jsonl(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (1-based line number, object) for each line of a JSONL file, plain or `.gz`.

    Blank lines may stand at the end of the file only.

    Raises:
      DataError: the file is missing, unreadable, empty or cut off, or a line is blank, is not
        UTF-8, is not JSON or is not an object.
    """
    line = 0
    blank: int | None = None
    found = False
    try:
        with _open_bytes(path) as stream:
            for line, raw in enumerate(stream, start=1):
                if not raw.strip():
                    blank = blank or line
                    continue
                if blank is not None:
                    raise DataError("a blank line; remove it", file=path, line=blank)
                found = True
                yield line, _parse_object(raw, path, line)
    except FileNotFoundError:
        raise DataError("there is no such file", file=path) from None
    except IsADirectoryError:
        raise DataError("this is a folder; name a .jsonl or .jsonl.gz file", file=path) from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        # The decompressor fails on the line after the last one that came out whole.
        reason = f"the gzip data is cut off or damaged ({error}); copy the file again"
        raise DataError(reason, file=path, line=line + 1) from None
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror or error})", file=path) from None
    if not found:
        raise DataError("the file is empty; it needs one JSON object per line", file=path)


def require_text(
    row: dict[str, Any],
    field: str,
    *,
    file: str | Path,
    line: int | None,
    allow_empty: bool = False,
) -> str:
    """Returns `row[field]`, which must be a string, and not an empty one unless `allow_empty`.

    Raises:
      DataError: the field is missing, not a string, empty, or not encodable as UTF-8.
    """
    return _checked_text(_present(row, field, file, line), field, file, line, allow_empty)


def require_prompt(
    row: dict[str, Any], field: str = "prompt", *, file: str | Path, line: int | None
) -> Prompt:
    """Returns a prompt: a string (which may be empty) or a non-empty list of chat messages.

    Raises:
      DataError: the field is missing or is neither.
    """
    value = _present(row, field, file, line)
    if isinstance(value, list):
        return _checked_messages(value, field, file, line)
    return _checked_text(value, field, file, line, allow_empty=True)


def require_response(
    row: dict[str, Any], field: str, prompt: Prompt, *, file: str | Path, line: int | None
) -> Response:
    """Returns the response in `row[field]`; see `checked_response`.

    Raises:
      DataError: the field is missing or is no response to `prompt`.
    """
    return checked_response(_present(row, field, file, line), field, prompt, file=file, line=line)


def checked_response(
    value: Any, field: str, prompt: Prompt, *, file: str | Path, line: int | None
) -> Response:
    """Returns a response to `prompt`: text, or one assistant message if the prompt is messages.

    A single message may come bare or as a list of one; it is returned as a list of one.

    Raises:
      DataError: `value` is no response to `prompt`, or is empty.
    """
    if isinstance(value, str):
        return _checked_text(value, field, file, line, allow_empty=False)
    if not isinstance(value, list | dict):
        raise DataError(f"must be text, not {_kind(value)}", file=file, line=line, field=field)
    if isinstance(prompt, str):
        reason = "is chat messages, but the prompt is text; make both the same"
        raise DataError(reason, file=file, line=line, field=field)
    messages = _checked_messages([value] if isinstance(value, dict) else value, field, file, line)
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        roles = ", ".join(message["role"] for message in messages)
        reason = f"must be one assistant message, not [{roles}]; earlier turns go in the prompt"
        raise DataError(reason, file=file, line=line, field=field)
    return messages


def read_texts(path: str | Path) -> Iterator[TextRow]:
    """Yields the rows `{"text": ..., "source"?: ...}` of a file; the default source is the file.

    Raises:
      DataError: see `read_jsonl` and `require_text`.
    """
    name = Path(path).name.removesuffix(".gz").removesuffix(".jsonl")
    for line, row in read_jsonl(path):
        text = require_text(row, "text", file=path, line=line)
        yield TextRow(text, _optional_text(row, "source", name, path, line))


def read_preferences(path: str | Path, reference_field: str = "") -> Iterator[PreferenceRow]:
    """Yields the rows `{"prompt", "chosen", "rejected"[, "subset"]}` of a file.

    Args:
      path: a JSONL file.
      reference_field: if not "", each row must hold there a list of two finite numbers, the
        log-probabilities of chosen and rejected under a reference model (the column `logprob` that
        `score` writes).

    Raises:
      DataError: see `read_jsonl`; or a field is missing or of the wrong kind, or chosen and
        rejected are the same.
    """
    for line, row in read_jsonl(path):
        prompt = require_prompt(row, file=path, line=line)
        chosen = require_response(row, "chosen", prompt, file=path, line=line)
        rejected = require_response(row, "rejected", prompt, file=path, line=line)
        if chosen == rejected:
            reason = "is the same as chosen, so the row prefers nothing; remove it"
            raise DataError(reason, file=path, line=line, field="rejected")
        subset = _optional_text(row, "subset", "", path, line)
        reference = _require_two_numbers(row, reference_field, path, line)
        yield PreferenceRow(prompt, chosen, rejected, subset, reference, line)


def _open_bytes(path: str | Path) -> BinaryIO:
    if str(path).endswith(".gz"):
        return cast(BinaryIO, gzip.open(path, "rb"))
    return Path(path).open("rb")


def _parse_object(raw: bytes, file: str | Path, line: int) -> dict[str, Any]:
    try:
        value = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        reason = f"not UTF-8 (byte {error.start + 1} of the line); convert the file to UTF-8"
        raise DataError(reason, file=file, line=line) from None
    except json.JSONDecodeError as error:
        reason = f"not JSON: {error.msg} (column {error.colno})"
        raise DataError(reason, file=file, line=line) from None
    except RecursionError:
        raise DataError("JSON nested too deeply", file=file, line=line) from None
    if not isinstance(value, dict):
        reason = f"a JSON object is expected, not {_kind(value)}"
        raise DataError(reason, file=file, line=line)
    return value


def _present(row: dict[str, Any], field: str, file: str | Path, line: int | None) -> Any:
    if field not in row:
        names = ", ".join(sorted(row)) or "none"
        reason = f"is missing (fields here: {names})"
        raise DataError(reason, file=file, line=line, field=field)
    return row[field]


def _checked_text(
    value: Any, field: str, file: str | Path, line: int | None, allow_empty: bool
) -> str:
    if not isinstance(value, str):
        raise DataError(f"must be text, not {_kind(value)}", file=file, line=line, field=field)
    if not value and not allow_empty:
        raise DataError("is empty", file=file, line=line, field=field)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        # JSON can spell half of a surrogate pair, which no tokenizer takes.
        reason = f"holds half of a surrogate pair at character {error.start + 1}"
        raise DataError(reason, file=file, line=line, field=field) from None
    return value


def _checked_messages(
    value: list[Any], field: str, file: str | Path, line: int | None
) -> list[Message]:
    if not value:
        raise DataError("is an empty list of messages", file=file, line=line, field=field)
    for number, message in enumerate(value):
        place = f"{field}[{number}]"
        if not isinstance(message, dict):
            reason = f"must be a message with role and content, not {_kind(message)}"
            raise DataError(reason, file=file, line=line, field=place)
        role = _present(message, "role", file, line)
        _checked_text(role, f"{place}.role", file, line, allow_empty=False)
        if message.get("tool_calls") and message.get("content") is None:
            continue
        content = _present(message, "content", file, line)
        _checked_text(content, f"{place}.content", file, line, allow_empty=True)
    return cast(list[Message], value)


def _optional_text(
    row: dict[str, Any], field: str, default: str, file: str | Path, line: int
) -> str:
    if row.get(field) is None:
        return default
    return require_text(row, field, file=file, line=line)


def _require_two_numbers(
    row: dict[str, Any], field: str, file: str | Path, line: int
) -> tuple[float, float] | None:
    if not field:
        return None
    value = _present(row, field, file, line)
    if isinstance(value, list) and len(value) == 2 and all(map(_is_finite_number, value)):
        return float(value[0]), float(value[1])
    reason = "must be a list of two finite numbers, [chosen, rejected], as `score` writes"
    raise DataError(reason, file=file, line=line, field=field)


def _is_finite_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _kind(value: Any) -> str:
    """What JSON calls the value."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    names = {str: "text", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)
