"""From lines of a file to examples to score: checking, tokenising, cutting, grouping.

A row is ``{"prompt", "response"}``, ``{"prompt", "responses": [...]}`` or
``{"prompt", "chosen", "rejected"}``; prompts and responses are text or chat messages. A judge takes
two responses, or one and a ``reference`` to compare it with.

Lines are read in blocks, in the order of the file or by prompts (`grouping`). Within a block, lines
with the same prompt become one example, so that the prompt is computed once, and equal responses to
it too. Blocks know nothing of each other: the numbers of a block are the same to the bit whether or
not the blocks before it were just computed, which is what lets a job go on after a block as if it
had never stopped.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gram_jax.data.prompts import ExampleError
from gram_jax.data.sources import (
    Prompt,
    Response,
    checked_response,
    read_jsonl,
    require_prompt,
    require_response,
    require_text,
)
from gram_jax.encoding import BlockBuilder, Cut, Encoded, Encoder
from gram_jax.errors import DataError, UserError
from gram_jax.grouping import IntArray, PromptOrder

MAX_LINES = 8192
"""Lines of a block, at most: what bounds memory where lines are short or all alike."""


class Candidates(NamedTuple):
    """The prompt and the responses of one row.

    Attributes:
      fields: where in the row each response stands, such as ``chosen`` or ``responses[2]``.
      single: the row holds one response as such, so its numbers are written as such.
    """

    prompt: Prompt
    responses: list[Response]
    fields: list[str]
    single: bool

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """What a judge compares: the first two."""
        return [(0, 1)]


class InputFacts(NamedTuple):
    """A file that has been read to its end and found good.

    Attributes:
      lines: how many there are.
      digests: of a number of lines, the SHA-256 of the rows on that many first lines.
      by_prompt: see `grouping.PromptOrder.lines`.
    """

    lines: int
    digests: dict[int, str]
    by_prompt: IntArray | None


@dataclasses.dataclass(slots=True)
class Line:
    """A row, and where the numbers of its sequences come from: (example's key, sequence)."""

    number: int
    row: dict[str, Any]
    single: bool
    places: list[tuple[int, int]]
    num_tokens: tuple[int, ...]
    cut: Cut


@dataclasses.dataclass(slots=True)
class Block:
    """Some lines that were read one after the other, the sequences they need, and a SHA-256 of all
    rows up to the block's last line."""

    lines: list[Line]
    sequences: BlockBuilder
    digest: str

    @property
    def end(self) -> int:
        """The number of the last line."""
        return self.lines[-1].number


def candidates_of(row: dict[str, Any], *, file: str | Path, line: int | None) -> Candidates:
    """The prompt and responses of a row of any of the three kinds.

    Raises:
      DataError: names file, line and field of what is missing or wrong.
    """
    found = [name for name in ("response", "responses", "chosen", "rejected") if name in row]
    if not found:
        names = ", ".join(sorted(row)) or "none"
        reason = f"no response, responses, or chosen and rejected (fields here: {names})"
        raise DataError(reason, file=file, line=line)
    if len(found) > 1 and found != ["chosen", "rejected"]:
        reason = f"stands beside {found[0]}; keep one of them, or rename the other"
        raise DataError(reason, file=file, line=line, field=found[1])
    prompt = require_prompt(row, file=file, line=line)
    if found == ["responses"]:
        values = row["responses"]
        if not isinstance(values, list) or not values:
            reason = "must be a list of at least one response"
            raise DataError(reason, file=file, line=line, field="responses")
        fields = [f"responses[{i}]" for i in range(len(values))]
        pairs = zip(values, fields, strict=True)
        responses = [checked_response(v, f, prompt, file=file, line=line) for v, f in pairs]
        return Candidates(prompt, responses, fields, single=False)
    fields = ["response"] if found == ["response"] else ["chosen", "rejected"]
    responses = [require_response(row, f, prompt, file=file, line=line) for f in fields]
    return Candidates(prompt, responses, fields, single=found == ["response"])


def check_input(
    path: str | Path, reserved: Sequence[str], at: int = 0, *, reading: str = "likelihood"
) -> InputFacts:
    """Reads a file to its end, so that a bad row is named before any work is done.

    Args:
      path: a JSONL file.
      reserved: names of the columns that will be added, which no row may have.
      at: a number of lines whose digest is wanted besides that of all of them.
      reading: what a score is.

    Raises:
      DataError: names file, line and field.
    """
    digest = hashlib.sha256()
    digests = {0: digest.hexdigest()}
    number, prompts = 0, PromptOrder()
    for number, row in read_jsonl(path):
        check_row(row, reserved, reading, file=path, line=number)
        add_row(digest, row)
        prompts.add(row["prompt"])
        if number == at:
            digests[number] = digest.hexdigest()
    digests[number] = digest.hexdigest()
    return InputFacts(number, digests, prompts.lines())


def check_row(
    row: dict[str, Any], reserved: Sequence[str], reading: str, *, file: str | Path, line: int
) -> None:
    """Refuses a row that cannot be scored, whatever the model; arguments as of `check_input`.

    Raises:
      DataError: names file, line and field.
    """
    parse = judged if reading == "judge" else candidates_of
    parse(row, file=file, line=line)
    for name in reserved:
        if name in row:
            reason = "is there already, and scoring would write it; rename or remove it"
            raise DataError(reason, file=file, line=line, field=name)
    if "subset" in row:
        require_text(row, "subset", file=file, line=line, allow_empty=True)


def judged(row: dict[str, Any], *, file: str | Path, line: int | None) -> Candidates:
    """What a judge reads of a row: chosen and rejected, two responses, or one and a ``reference``.

    Raises:
      DataError: names file, line and field of what is missing or wrong.
    """
    found = candidates_of(row, file=file, line=line)
    if found.single:
        reference = require_response(row, "reference", found.prompt, file=file, line=line)
        responses = [*found.responses, reference]
        return Candidates(found.prompt, responses, ["response", "reference"], single=True)
    if len(found.responses) != 2:
        reason = (
            f"holds {len(found.responses)}, and a judge compares two; rank more with"
            " python -m gram_jax.rank"
        )
        raise DataError(reason, file=file, line=line, field="responses")
    return found


def encode(
    candidates: Candidates, encoder: Encoder, *, file: str | Path, line: int | None
) -> Encoded:
    """Token ids of a row's sequences.

    Raises:
      DataError: the tokenizer or a template cannot do with this row, or it is too long.
    """
    try:
        return encoder.encode(candidates.prompt, candidates.responses, candidates.pairs)
    except ExampleError as error:
        field = "prompt" if error.field == "prompt" else candidates.fields[error.index]
        raise DataError(error.reason, file=file, line=line, field=field) from None
    except UserError as error:
        raise DataError(str(error), file=file, line=line) from None


def read_blocks(
    path: str | Path,
    encoder: Encoder,
    *,
    start: int,
    block_tokens: int,
    rows: Iterable[tuple[int, dict[str, Any]]] | None = None,
) -> Iterator[Block]:
    """The lines after the first ``start``, in blocks of about ``block_tokens`` tokens to compute.

    Args:
      rows: those wanted, with the numbers of their lines; None = all, in the file's order.

    Raises:
      DataError: a bad row, or one that is too long.
    """
    digest = hashlib.sha256()
    parse = judged if encoder.reading == "judge" else candidates_of
    builder, lines = BlockBuilder(), list[Line]()
    for number, row in read_jsonl(path) if rows is None else rows:
        add_row(digest, row)
        if number <= start:
            continue
        candidates = parse(row, file=path, line=number)
        found = encode(candidates, encoder, file=path, line=number)
        places = builder.add(found.sequences)
        lines.append(Line(number, row, candidates.single, places, found.num_tokens, found.cut))
        if builder.placed >= block_tokens or len(lines) >= MAX_LINES:
            yield Block(lines, builder, digest.hexdigest())
            builder, lines = BlockBuilder(), []
    if lines:
        yield Block(lines, builder, digest.hexdigest())


def add_row(digest: Any, row: dict[str, Any]) -> None:
    """Adds a row to a SHA-256 over rows."""
    digest.update(json.dumps(row).encode() + b"\n")
