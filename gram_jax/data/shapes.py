"""The columns that data comes in: which of them a record has, and the row that it makes.

A shape has a name (`data.format`), a kind of row, a test of a record's columns and a parser. Where
a record fits several shapes, the first one in `SHAPES` counts; `docs/data_formats.md` has a line of
each. A response's place in a row is its place in the record; of a pair, the better one comes first.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

from gram_jax.data.benchmark_shapes import (
    judgebench_row,
    llmbar_row,
    pandalm_row,
    rewardbench_row,
    rm_bench_row,
)
from gram_jax.data.implicit import hh_row, implicit_row
from gram_jax.data.record import Record
from gram_jax.data.sources import (
    Message,
    PreferenceRow,
    ResponsesRow,
    Row,
    TextRow,
    UnpairedRow,
    checked_messages,
    checked_text,
    listed,
)
from gram_jax.errors import DataError
from gram_jax.pair import Pair

LABELLED = ("preferences", "unpaired")
"""Kinds of rows that an objective on preferences needs."""
UNLABELLED = ("text", "responses")
"""Kinds of rows that next_token needs."""


class Shape(NamedTuple):
    """One way to lay out a record.

    Attributes:
      name: what `data.format` calls it.
      kind: "text", "responses", "preferences" or "unpaired".
      columns: those that a record must have to be recognised.
      fits: what its values must be like besides.
      parse: makes a row of a record, or raises a `DataError`.
      detect: records are recognised as this one; else it must be named.
    """

    name: str
    kind: str
    columns: tuple[str, ...]
    parse: Callable[[Record], Row]
    fits: Callable[[dict[str, Any]], bool] = lambda _: True
    detect: bool = True


def detect_format(
    record: dict[str, Any],
    *,
    file: str | Path,
    line: int | None,
    kinds: Collection[str] = LABELLED + UNLABELLED,
) -> str:
    """Returns the name of the shape that a record has, by its columns; null ones may be unused.

    Args:
      record: a JSON object.
      file, line: where it stands, for messages.
      kinds: which kinds of rows are wanted: a shape of another kind is the answer only if the
        record has none of these.

    Raises:
      DataError: it has none.
    """
    used = {name for name, value in record.items() if value is not None}
    for names in (used, set(record)):
        found = [
            shape
            for shape in SHAPES
            if shape.detect and names.issuperset(shape.columns) and shape.fits(record)
        ]
        for shape in (*(shape for shape in found if shape.kind in kinds), *found):
            return shape.name
    reason = (
        "the columns fit no format: text has text; responses has prompt and response or responses;"
        " preferences has prompt, chosen and rejected; docs/data_formats.md has the others. Name"
        f" one with config.data.format, or rename columns (fields here: {listed(record)})"
    )
    raise DataError(reason, file=file, line=line)


def kind_of(format: str) -> str:
    """The kind of row that records of a format make."""
    return _named(format).kind


def parse_row(
    record: dict[str, Any], format: str, *, file: str | Path, line: int, reference_field: str = ""
) -> Row:
    """Returns the record as a row of a format, checked.

    Args:
      record: a JSON object.
      format: one of `FORMATS`.
      file, line: where it stands, for messages; `file` also names the default source of a text.
      reference_field: if not "", preferences must hold there one finite number for each response,
        its log-probability under a reference model (the column `logprob` that `score` writes).

    Raises:
      DataError: a field is missing or of the wrong kind, or both sides of a pair are the same.
    """
    return _named(format).parse(Record(record, file, line, reference_field))


def _named(format: str) -> Shape:
    for shape in SHAPES:
        if shape.name == format:
            return shape
    raise ValueError(f"unknown format {format!r}; there are {', '.join(FORMATS)}")


def _text_row(record: Record) -> TextRow:
    source = record.optional_text("source") or _source_name(record.file)
    return TextRow(record.text("text"), source, record.line)


def _source_name(file: str | Path) -> str:
    """The file's name without its extensions."""
    extensions = r"(\.(jsonl|ndjson|json|parquet|arrow))?(\.gz|\.zst)?$"
    return re.sub(extensions, "", Path(file).name, count=1)


def _responses_row(record: Record) -> ResponsesRow:
    prompt = record.prompt()
    if record.values.get("responses") is None:
        return ResponsesRow(prompt, (record.response("response", prompt),), record.line)
    if record.values.get("response") is not None:
        raise record.error("responses", "stands beside response; keep one of them, or rename it")
    return ResponsesRow(prompt, record.responses("responses", prompt), record.line)


def _pairs_row(record: Record) -> ResponsesRow:
    """Two or more responses, of whatever shape; labels are not read."""
    if _has_response(record.values) and "prompt" in record.values:
        row = _responses_row(record)
        if len(row.responses) < 2:
            raise record.error("responses", "holds one response; the format pairs needs two")
        return row
    if _FRAMES.search(str(record.values.get("output"))):
        question, responses = _framed(record, "instruction", "output")
        return ResponsesRow(record.in_context(question), responses, record.line)
    name = detect_format(record.values, file=record.file, line=record.line, kinds=LABELLED)
    found = parse_row(record.values, name, file=record.file, line=record.line)
    if not isinstance(found, PreferenceRow):
        reason = f"the format pairs needs two responses in a row, which {name} does not have"
        raise DataError(reason, file=record.file, line=record.line)
    return ResponsesRow(found.prompt, found.responses, record.line)


def _preference_row(record: Record) -> PreferenceRow:
    return _chosen_and_rejected(record, record.prompt())


def _chosen_and_rejected(record: Record, prompt: Any) -> PreferenceRow:
    """A row of the columns chosen, rejected, margin and subset, with a prompt from elsewhere."""
    return record.comparison(
        prompt,
        (record.response("chosen", prompt), record.response("rejected", prompt)),
        ("chosen", "rejected"),
        Pair(0, 1, margin=record.number("margin", 0.0)),
        record.optional_text("subset"),
    )


def _unpaired_row(record: Record) -> UnpairedRow:
    prompt = record.prompt()
    response = record.response("completion", prompt)
    label = record.value("label")
    if not isinstance(label, bool):
        raise record.error("label", "must be true (good) or false (bad)")
    reference = record.reference(1)
    return UnpairedRow(prompt, response, label, reference[0] if reference else None, record.line)


def _kway_row(record: Record) -> PreferenceRow:
    """All pairs of K responses, each weighted 1 / (K choose 2); equal scores are ties."""
    prompt = record.prompt()
    responses = record.responses("responses", prompt, least=2)
    by = "ranks" if record.values.get("scores") is None else "scores"
    if by == "scores" and record.values.get("ranks") is not None:
        raise record.error("ranks", "stands beside scores; keep one of them, or rename the other")
    worth = record.numbers(by, len(responses), "responses")
    if by == "ranks":  # 1 is the best
        worth = [-rank for rank in worth]
    weight = 2 / (len(responses) * (len(responses) - 1))
    pairs = tuple(
        Pair(a, b, 0.5 if worth[a] == worth[b] else 1.0, weight)
        for a, b in (
            (i, j) if worth[i] >= worth[j] else (j, i)
            for i, j in combinations(range(len(responses)), 2)
        )
    )
    fields = tuple(f"responses[{place}]" for place in range(len(responses)))
    subset, reference = record.optional_text("subset"), record.reference(len(responses))
    return PreferenceRow(prompt, responses, pairs, fields, subset, reference, record.line)


def _alpaca_row(record: Record) -> ResponsesRow:
    prompt = record.in_context(record.instruction())
    return ResponsesRow(prompt, (record.response("output", prompt),), record.line)


def _alpaca_preference_row(record: Record) -> PreferenceRow:
    prompt = record.in_context(record.instruction())
    if not isinstance(record.values.get("output"), list):
        return _chosen_and_rejected(record, prompt)
    found = record.responses("output", prompt)
    if len(found) != 2:
        raise record.error("output", "must be a list of two responses, the better one first")
    pair = Pair(0, 1, margin=record.number("margin", 0.0))
    subset = record.optional_text("subset")
    return record.comparison(prompt, (found[0], found[1]), ("output[0]", "output[1]"), pair, subset)


# What stands around question and answers in the data that GRAM was released with.
_FRAMES = re.compile(
    r"\[The Start of Assistant A's Answer\]\n*(?P<a>.*?)\n*\[The End of Assistant A's Answer\]\s*"
    r"\[The Start of Assistant B's Answer\]\n*(?P<b>.*)\n*\[The End of Assistant B's Answer\]",
    re.DOTALL,
)
_QUESTION = "[User Question]"


def _gram_row(record: Record) -> PreferenceRow:
    """GRAM's stage 2: a judge prompt and its answer, taken apart again."""
    label = record.text("output").strip()
    if label not in ("A", "B"):
        raise record.error("output", 'must be "A" or "B", the better answer')
    question, responses = _framed(record, "instruction", "instruction")
    pair = Pair(0, 1) if label == "A" else Pair(1, 0)
    fields = ("instruction", "instruction")
    subset = record.optional_text("subset")
    return record.comparison(record.in_context(question), responses, fields, pair, subset)


def _framed(record: Record, asked: str, answered: str) -> tuple[str, tuple[str, str]]:
    """The question in one field and both answers in another, without what frames them."""
    text, answers = record.text(asked), _FRAMES.search(record.text(answered))
    if answers is None:
        raise record.error(answered, "must hold two answers, framed as in docs/data_formats.md")
    if asked == answered:
        text = text[: answers.start()]
    _, frame, question = text.partition(_QUESTION)
    if not frame:
        raise record.error(asked, f"must hold a question after {_QUESTION}")
    if asked != answered and record.optional_text("input"):
        question = f"{question.strip()}\n{record.text('input')}"
    found = tuple(answers[name].rstrip("\n") for name in ("a", "b"))
    for name, answer in zip("AB", found, strict=True):
        if not answer:
            raise record.error(answered, f"holds an empty answer {name}")
    return question.strip("\n"), (found[0], found[1])


_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
    "system": "system", "observation": "tool", "tool": "tool",
}  # fmt: skip


def _sharegpt_row(record: Record) -> PreferenceRow:
    turns = record.value("conversations")
    if not isinstance(turns, list):
        raise record.error("conversations", "must be a list of turns with from and value")
    messages = [_turn(record, turn, f"conversations[{i}]") for i, turn in enumerate(turns)]
    checked_messages(messages, "conversations", record.file, record.line)
    prompt = record.in_context(messages)

    def response(field: str) -> Any:
        value = record.value(field)
        turn = value[0] if isinstance(value, list) and len(value) == 1 else value
        found = _turn(record, turn, field) if isinstance(turn, dict) else turn
        return record.as_response(found, field, prompt)

    pair = Pair(0, 1, margin=record.number("margin", 0.0))
    both, fields = (response("chosen"), response("rejected")), ("chosen", "rejected")
    return record.comparison(prompt, both, fields, pair, record.optional_text("subset"))


def _turn(record: Record, turn: Any, field: str) -> Message:
    """A turn with from and value as a message with role and content."""
    if not isinstance(turn, dict) or not {"from", "value"} <= set(turn):
        raise record.error(field, "must be a turn with from and value")
    speaker = turn["from"]
    if not isinstance(speaker, str) or speaker not in _ROLES:
        raise record.error(f"{field}.from", f"must be one of {', '.join(_ROLES)}")
    value = checked_text(
        turn["value"], f"{field}.value", record.file, record.line, allow_empty=True
    )
    return {"role": _ROLES[speaker], "content": value}


def _unified_feedback_row(record: Record) -> PreferenceRow:
    """Two rated conversations that differ in their last message; equal ratings are a tie."""
    a, b = record.messages("conv_A"), record.messages("conv_B")
    if a[:-1] != b[:-1] or len(a) < 2:
        reason = "must be conv_A with another last message, after one message at least"
        raise record.error("conv_B", reason)
    prompt = record.in_context(a[:-1])
    first, second = record.number("conv_A_rating"), record.number("conv_B_rating")
    pair = Pair(0, 1, 0.5 if first == second else 1.0) if first >= second else Pair(1, 0)
    both = (
        record.as_response(a[-1], "conv_A", prompt),
        record.as_response(b[-1], "conv_B", prompt),
    )
    source = record.optional_text("source")
    return record.comparison(prompt, both, ("conv_A", "conv_B"), pair, source)


def _has_response(record: dict[str, Any]) -> bool:
    return "response" in record or "responses" in record


def _are_lists_of_text(record: dict[str, Any]) -> bool:
    return all(
        isinstance(value, list) and value and all(isinstance(text, str) for text in value)
        for value in (record["chosen"], record["rejected"])
    )


def _are_conversations(record: dict[str, Any]) -> bool:
    """The prompt stands in chosen and rejected too, as messages, whatever it says by itself."""
    return not isinstance(record.get("prompt"), list) and all(
        isinstance(value, list) and len(value) > 1 and all(isinstance(m, dict) for m in value)
        for value in (record["chosen"], record["rejected"])
    )


def _is_dialogue(record: dict[str, Any]) -> bool:
    """As in hh-rlhf, without a prompt of its own."""
    values = (record["chosen"], record["rejected"])
    return record.get("prompt") is None and all(
        isinstance(value, str) and "\n\nAssistant:" in value for value in values
    )


def _is_framed(record: dict[str, Any]) -> bool:
    return _FRAMES.search(str(record["instruction"])) is not None


def _is_list(record: dict[str, Any]) -> bool:
    return isinstance(record["output"], list)


SHAPES = (
    Shape("rm_bench", "preferences", ("prompt", "chosen", "rejected"), rm_bench_row,
          _are_lists_of_text),
    Shape("rewardbench", "preferences",
          ("prompt", "chosen", "rejected", "subset", "chosen_model", "rejected_model"),
          rewardbench_row),
    Shape("sharegpt", "preferences", ("conversations", "chosen", "rejected"), _sharegpt_row),
    Shape("alpaca_preferences", "preferences", ("instruction", "chosen", "rejected"),
          _alpaca_preference_row),
    Shape("hh", "preferences", ("chosen", "rejected"), hh_row, _is_dialogue),
    Shape("implicit", "preferences", ("chosen", "rejected"), implicit_row, _are_conversations),
    Shape("preferences", "preferences", ("prompt", "chosen", "rejected"), _preference_row),
    Shape("implicit", "preferences", ("chosen", "rejected"), implicit_row),
    Shape("unified_feedback", "preferences",
          ("conv_A", "conv_B", "conv_A_rating", "conv_B_rating"), _unified_feedback_row),
    Shape("judgebench", "preferences", ("question", "response_A", "response_B", "label"),
          judgebench_row),
    Shape("llmbar", "preferences", ("input", "output_1", "output_2", "label"), llmbar_row),
    Shape("pandalm", "preferences", ("instruction", "response1", "response2", "annotator1"),
          pandalm_row),
    Shape("kway", "preferences", ("prompt", "responses", "scores"), _kway_row),
    Shape("kway", "preferences", ("prompt", "responses", "ranks"), _kway_row),
    Shape("unpaired", "unpaired", ("prompt", "completion", "label"), _unpaired_row),
    Shape("gram", "preferences", ("instruction", "output"), _gram_row, _is_framed),
    Shape("alpaca_preferences", "preferences", ("instruction", "output"), _alpaca_preference_row,
          _is_list),
    Shape("responses", "responses", ("prompt", "response"), _responses_row),
    Shape("responses", "responses", ("prompt", "responses"), _responses_row),
    Shape("alpaca", "responses", ("instruction", "output"), _alpaca_row),
    Shape("text", "text", ("text",), _text_row),
    Shape("pairs", "responses", (), _pairs_row, detect=False),
)  # fmt: skip
"""All shapes, in the order in which a record is compared with them."""

FORMATS = tuple(dict.fromkeys(shape.name for shape in SHAPES))
"""Their names."""
