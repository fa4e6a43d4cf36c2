"""Rows to learn from, and the checks of a record's fields that they come from.

Every fault is a `DataError` that names file, line and field. Which fields a record may have is in
`gram_jax.data.shapes`, and where records come from in `gram_jax.data.records`.
"""

from __future__ import annotations

import json
import math
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


class UnpairedRow(NamedTuple):
    """A prompt with one response that was labelled good or bad by itself.

    Attributes:
      prompt: text, or chat messages that end with the turn to be answered.
      response: text, or a list with one assistant message (only if the prompt is messages).
      good: the label.
      reference: log-probability of the response under a reference model, or None.
      line: 1-based line in its file, for messages about this row.
    """

    prompt: Prompt
    response: Response
    good: bool
    reference: float | None
    line: int


Row: TypeAlias = TextRow | ResponsesRow | PreferenceRow | UnpairedRow

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
    return checked_text(present(row, field, file, line), field, file, line, allow_empty)


def require_prompt(
    row: dict[str, Any], field: str = "prompt", *, file: str | Path, line: int | None
) -> Prompt:
    """Returns a prompt: a string (which may be empty) or a non-empty list of chat messages.

    The row's `system` and `tools` are part of it; see `with_context`.

    Raises:
      DataError: the field is missing or is neither.
    """
    value = present(row, field, file, line)
    if isinstance(value, list):
        prompt: Prompt = checked_messages(value, field, file, line)
    else:
        prompt = checked_text(value, field, file, line, allow_empty=True)
    return with_context(row, prompt, file=file, line=line)


def with_context(
    row: dict[str, Any], prompt: Prompt, *, file: str | Path, line: int | None
) -> Prompt:
    """Returns a prompt with what the row's columns `system` and `tools` put before it.

    `system` (text) becomes the first message, or text before the prompt's text with a blank line
    between them. `tools` (a list of JSON objects, or that list as JSON text) is for a chat
    template, and becomes a first message of the role "tools" (see `prompts.apply_chat_template`).

    Raises:
      DataError: one of them is of the wrong kind, or does not go with this prompt.
    """
    system = optional_text(row, "system", file, line)
    if system and isinstance(prompt, str):
        prompt = f"{system}\n\n{prompt}"
    elif system and not isinstance(prompt, str):
        if any(message["role"] == "system" for message in prompt):
            reason = "stands beside a system message in the prompt; keep one of them"
            raise DataError(reason, file=file, line=line, field="system")
        prompt = [{"role": "system", "content": system}, *prompt]
    tools = _tools(row.get("tools"), file, line)
    if not tools:
        return prompt
    if isinstance(prompt, str):
        reason = "are for a chat template, but the prompt is text; write it as chat messages"
        raise DataError(reason, file=file, line=line, field="tools")
    return [{"role": "tools", "content": json.dumps(tools)}, *prompt]


def _tools(value: Any, file: str | Path, line: int | None) -> list[dict[str, Any]]:
    """The tools of a row; none is an empty list."""
    if value is None or value == "":
        return []
    try:
        tools = json.loads(value) if isinstance(value, str) else value
        json.dumps(tools)
    except (TypeError, ValueError, RecursionError):
        tools = None  # not JSON, or (of a table's row) nothing that JSON can hold
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        reason = "must be a list of JSON objects, or that list as JSON text"
        raise DataError(reason, file=file, line=line, field="tools")
    return tools


def require_response(
    row: dict[str, Any], field: str, prompt: Prompt, *, file: str | Path, line: int | None
) -> Response:
    """Returns the response in `row[field]`; see `checked_response`.

    Raises:
      DataError: the field is missing or is no response to `prompt`.
    """
    return checked_response(present(row, field, file, line), field, prompt, file=file, line=line)


def checked_response(
    value: Any, field: str, prompt: Prompt, *, file: str | Path, line: int | None
) -> Response:
    """Returns a response to `prompt`: text, or one assistant message if the prompt is messages.

    A single message may come bare or as a list of one; it is returned as a list of one.

    Raises:
      DataError: `value` is no response to `prompt`, or is empty.
    """
    if isinstance(value, str):
        return checked_text(value, field, file, line, allow_empty=False)
    if not isinstance(value, list | dict):
        raise DataError(f"must be text, not {kind(value)}", file=file, line=line, field=field)
    if isinstance(prompt, str):
        reason = "is chat messages, but the prompt is text; make both the same"
        raise DataError(reason, file=file, line=line, field=field)
    messages = checked_messages([value] if isinstance(value, dict) else value, field, file, line)
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        roles = printable(", ".join(message["role"] for message in messages), 200)
        reason = f"must be one assistant message, not [{roles}]; earlier turns go in the prompt"
        raise DataError(reason, file=file, line=line, field=field)
    return messages


def present(row: dict[str, Any], field: str, file: str | Path, line: int | None) -> Any:
    """Returns `row[field]`, which must be there."""
    if field not in row:
        reason = f"is missing (fields here: {listed(row)})"
        raise DataError(reason, file=file, line=line, field=field)
    return row[field]


def checked_text(
    value: Any, field: str, file: str | Path, line: int | None, allow_empty: bool
) -> str:
    """Returns a value that must be text which UTF-8 can hold."""
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


def checked_messages(
    value: list[Any], field: str, file: str | Path, line: int | None
) -> list[Message]:
    """Returns a list that must be chat messages, at least one."""
    if not value:
        raise DataError("is an empty list of messages", file=file, line=line, field=field)
    for number, message in enumerate(value):
        place = f"{field}[{number}]"
        if not isinstance(message, dict):
            reason = f"must be a message with role and content, not {kind(message)}"
            raise DataError(reason, file=file, line=line, field=place)
        role = present(message, "role", file, line)
        checked_text(role, f"{place}.role", file, line, allow_empty=False)
        if message.get("tool_calls") and message.get("content") is None:
            continue
        content = present(message, "content", file, line)
        checked_text(content, f"{place}.content", file, line, allow_empty=True)
    return cast(list[Message], value)


def optional_text(row: dict[str, Any], field: str, file: str | Path, line: int | None) -> str:
    """Returns `row[field]`, which must be text, or "" if it is missing or null."""
    if row.get(field) is None:
        return ""
    return require_text(row, field, file=file, line=line, allow_empty=True)


def is_finite_number(value: Any) -> bool:
    """Whether a value is a number (true and false are none) that a float can hold."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer that no float holds
        return False


def listed(names: Iterable[str]) -> str:
    """Names for a message: in order, and not more than a screen can hold."""
    return printable(", ".join(sorted(names)), 200) or "none"
