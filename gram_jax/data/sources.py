"""Rows to learn from: records checked field by field, whatever format they were stored in.

A record is a JSON object with the fields of one of `FORMATS`. Every fault is a `DataError` that
names file, line and field. Where records come from is in `gram_jax.data.records`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, cast

from gram_jax.data.formats import jsonl_blocks, kind, printable
from gram_jax.errors import DataError
from gram_jax.pair import Pair

Message: TypeAlias = dict[str, Any]
Prompt: TypeAlias = str | list[Message]
Response: TypeAlias = str | list[Message]


class TextRow(NamedTuple):
    """One text to learn from, the source it counts under in mixtures and reports, and its line."""

    text: str
    source: str
    line: int


class ResponsesRow(NamedTuple):
    """A prompt with one or more responses to learn from, none of them labelled.

    Attributes:
      prompt: text, or chat messages that end with the turn to be answered.
      responses: each text, or a list with one assistant message (only if the prompt is messages).
      line: 1-based line in its file.
    """

    prompt: Prompt
    responses: tuple[Response, ...]
    line: int


class PreferenceRow(NamedTuple):
    """A prompt with responses, all text or all chat messages, and what is preferred among them.

    Attributes:
      prompt: text, or chat messages that end with the turn to be answered.
      responses: each text, or a list with one assistant message (only if the prompt is messages).
      pairs: comparisons of two responses, by their places; ``target`` is the probability that the
        first is better.
      fields: the field that each response stands in, for messages about this row.
      subset: what the row is reported under; "" if the file does not say.
      reference: log-probabilities of the responses under a reference model, or None.
      line: 1-based line in its file, for messages about this row.
    """

    prompt: Prompt
    responses: tuple[Response, ...]
    pairs: tuple[Pair, ...]
    fields: tuple[str, ...]
    subset: str
    reference: tuple[float, ...] | None
    line: int


Row: TypeAlias = TextRow | ResponsesRow | PreferenceRow
FORMATS = ("text", "responses", "pairs", "preferences")

_BLOCK_SIZE = 1 << 20


def read_jsonl(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (1-based line number, object) for each line of a JSONL file: plain, `.gz` or `.zst`.

    Blank lines may stand at the end of the file only.

    Raises:
      DataError: the file is missing, unreadable, empty or cut off, or a line is blank, is not
        UTF-8, is not JSON or is not an object.
    """
    for block in jsonl_blocks(path, _BLOCK_SIZE):
        for line, record in block.records():
            if isinstance(record, DataError):
                raise record
            yield line, record


def detect_format(record: dict[str, Any], *, file: str | Path, line: int | None) -> str:
    """Returns which of `FORMATS` the record has, by its fields; a field that is null may be unused.

    Raises:
      DataError: it has none.
    """
    used = {name for name, value in record.items() if value is not None}
    for names in (used, set(record)):
        if {"chosen", "rejected"} <= names:
            return "preferences"
        if "prompt" in names and not names.isdisjoint(("response", "responses")):
            return "responses"
        if "text" in names:
            return "text"
    reason = (
        "a row needs the fields text; or prompt and response or responses; or prompt, chosen and"
        f" rejected (fields here: {_listed(record)})"
    )
    raise DataError(reason, file=file, line=line)


def parse_row(
    record: dict[str, Any], format: str, *, file: str | Path, line: int, reference_field: str = ""
) -> Row:
    """Returns the record as a row of a format, checked.

    Args:
      record: a JSON object.
      format: one of `FORMATS`.
      file, line: where it stands, for messages; `file` also names the default source of a text.
      reference_field: if not "", a preference must hold there a list of two finite numbers, the
        log-probabilities of chosen and rejected under a reference model (the column `logprob` that
        `score` writes).

    Raises:
      DataError: a field is missing or of the wrong kind, or chosen and rejected are the same.
    """
    if format == "text":
        text = require_text(record, "text", file=file, line=line)
        source = _optional_text(record, "source", "", file, line) or _source_name(file)
        return TextRow(text, source, line)
    if format in ("responses", "pairs"):
        row = _responses_row(record, file, line)
        if format == "pairs" and len(row.responses) < 2:
            reason = "holds one response; the format pairs needs two"
            raise DataError(reason, file=file, line=line, field="responses")
        return row
    if format == "preferences":
        return _preference_row(record, file, line, reference_field)
    raise ValueError(f"unknown format {format!r}; there are {', '.join(FORMATS)}")


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
        raise DataError(f"must be text, not {kind(value)}", file=file, line=line, field=field)
    if isinstance(prompt, str):
        reason = "is chat messages, but the prompt is text; make both the same"
        raise DataError(reason, file=file, line=line, field=field)
    messages = _checked_messages([value] if isinstance(value, dict) else value, field, file, line)
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        roles = printable(", ".join(message["role"] for message in messages), 200)
        reason = f"must be one assistant message, not [{roles}]; earlier turns go in the prompt"
        raise DataError(reason, file=file, line=line, field=field)
    return messages


def _responses_row(record: dict[str, Any], file: str | Path, line: int) -> ResponsesRow:
    prompt = require_prompt(record, file=file, line=line)
    if record.get("responses") is None:
        response = require_response(record, "response", prompt, file=file, line=line)
        return ResponsesRow(prompt, (response,), line)
    if record.get("response") is not None:
        reason = "stands beside response; keep one of them, or rename the other"
        raise DataError(reason, file=file, line=line, field="responses")
    values = record["responses"]
    if not isinstance(values, list) or not values:
        reason = "must be a list of at least one response"
        raise DataError(reason, file=file, line=line, field="responses")
    responses = (
        checked_response(value, f"responses[{place}]", prompt, file=file, line=line)
        for place, value in enumerate(values)
    )
    return ResponsesRow(prompt, tuple(responses), line)


def _preference_row(
    record: dict[str, Any], file: str | Path, line: int, reference_field: str
) -> PreferenceRow:
    prompt = require_prompt(record, file=file, line=line)
    chosen = require_response(record, "chosen", prompt, file=file, line=line)
    rejected = require_response(record, "rejected", prompt, file=file, line=line)
    if chosen == rejected:
        reason = "is the same as chosen, so the row prefers nothing; remove it"
        raise DataError(reason, file=file, line=line, field="rejected")
    subset = _optional_text(record, "subset", "", file, line)
    reference = _require_two_numbers(record, reference_field, file, line)
    return PreferenceRow(
        prompt, (chosen, rejected), (Pair(0, 1),), ("chosen", "rejected"), subset, reference, line
    )


def _source_name(file: str | Path) -> str:
    """The file's name without its extensions."""
    extensions = r"(\.(jsonl|ndjson|json|parquet|arrow))?(\.gz|\.zst)?$"
    return re.sub(extensions, "", Path(file).name, count=1)


def _present(row: dict[str, Any], field: str, file: str | Path, line: int | None) -> Any:
    if field not in row:
        reason = f"is missing (fields here: {_listed(row)})"
        raise DataError(reason, file=file, line=line, field=field)
    return row[field]


def _checked_text(
    value: Any, field: str, file: str | Path, line: int | None, allow_empty: bool
) -> str:
    if not isinstance(value, str):
        raise DataError(f"must be text, not {kind(value)}", file=file, line=line, field=field)
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
            reason = f"must be a message with role and content, not {kind(message)}"
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
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer that no float holds
        return False


def _listed(names: Iterable[str]) -> str:
    """Names for a message: in order, and not more than a screen can hold."""
    return printable(", ".join(sorted(names)), 200) or "none"
