"""From lines of a file to examples to score: checking, tokenising, cutting, grouping.

A row is ``{"prompt", "response"}``, ``{"prompt", "responses": [...]}`` or
``{"prompt", "chosen", "rejected"}``; prompts and responses are text or chat messages.

Lines are read in blocks. Within a block, lines with the same prompt become one example, so that the
prompt is computed once, and equal responses to it too. Blocks know nothing of each other: the
numbers of a block are the same to the bit whether or not the blocks before it were just computed,
which is what lets a job go on after a block as if it had never stopped.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gram_jax.data.prompts import ExampleError, encode_candidates
from gram_jax.data.sources import (
    Prompt,
    Response,
    checked_response,
    read_jsonl,
    require_prompt,
    require_response,
    require_text,
)
from gram_jax.data.tokenizer import Tokenizer
from gram_jax.errors import DataError, UserError
from gram_jax.rows import Example, IntArray

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


class Cut(NamedTuple):
    """How many tokens were cut: from the prompt's left, from each response's right."""

    prompt: int
    responses: tuple[int, ...]

    def __bool__(self) -> bool:
        return bool(self.prompt or any(self.responses))


class InputFacts(NamedTuple):
    """A file that has been read to its end and found good.

    ``digests`` maps a number of lines to the SHA-256 of the rows on that many first lines.
    """

    lines: int
    digests: dict[int, str]


@dataclasses.dataclass(slots=True)
class Line:
    """A row and where the numbers of its candidates come from: (example's key, response)."""

    number: int
    row: dict[str, Any]
    single: bool
    places: list[tuple[int, int]]
    cut: Cut


@dataclasses.dataclass(slots=True)
class Block:
    """Some lines that follow one another.

    Attributes:
      tokens: of prompt + response, over all candidates.
      placed: of the examples: each prompt and each distinct response once.
      end: lines of the file up to the end of the block.
      digest: SHA-256 of the rows on these.
    """

    lines: list[Line] = dataclasses.field(default_factory=list)
    examples: list[Example] = dataclasses.field(default_factory=list)
    tokens: int = 0
    placed: int = 0
    end: int = 0
    digest: str = ""


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


def check_input(path: str | Path, reserved: Sequence[str], at: int = 0) -> InputFacts:
    """Reads a file to its end, so that a bad row is named before any work is done.

    Args:
      path: a JSONL file.
      reserved: names of the columns that will be added, which no row may have.
      at: a number of lines whose digest is wanted besides that of all of them.

    Raises:
      DataError: names file, line and field.
    """
    digest = hashlib.sha256()
    digests = {0: digest.hexdigest()}
    number = 0
    for number, row in read_jsonl(path):
        candidates_of(row, file=path, line=number)
        for name in reserved:
            if name in row:
                reason = "is there already, and scoring would write it; rename or remove it"
                raise DataError(reason, file=path, line=number, field=name)
        if "subset" in row:
            require_text(row, "subset", file=path, line=number, allow_empty=True)
        add_row(digest, row)
        if number == at:
            digests[number] = digest.hexdigest()
    digests[number] = digest.hexdigest()
    return InputFacts(number, digests)


def encode(
    candidates: Candidates,
    tokenizer: Tokenizer,
    *,
    add_eos: bool,
    file: str | Path,
    line: int | None,
) -> tuple[IntArray, list[IntArray]]:
    """Token ids of the prompt and of each response.

    Raises:
      DataError: the tokenizer or its chat template cannot do with this row.
    """
    try:
        return encode_candidates(
            candidates.prompt, candidates.responses, tokenizer, add_eos=add_eos
        )
    except ExampleError as error:
        field = "prompt" if error.field == "prompt" else candidates.fields[error.index]
        raise DataError(error.reason, file=file, line=line, field=field) from None
    except UserError as error:
        raise DataError(str(error), file=file, line=line) from None


def fit(
    prompt: IntArray, responses: Sequence[IntArray], max_length: int, prefix: Sequence[int]
) -> tuple[IntArray, list[IntArray], Cut]:
    """Cuts what is too long: first the prompt from its left, then responses from their right.

    All candidates keep the same prompt, cut as the longest response needs it. The prompt keeps
    ``prefix`` (the BOS, if it starts with one) and at least its last token. A response that is too
    long even so loses its end, and its end token with it.

    Args:
      prompt: [n] ids.
      responses: ids of each response.
      max_length: most tokens of the prompt and one response; at least len(prefix) + 2.
      prefix: ids that the tokenizer puts before every prompt.
    """
    longest = max(map(len, responses))
    if len(prompt) + longest <= max_length:
        return prompt, list(responses), Cut(0, (0,) * len(responses))
    head = len(prefix) if list(prompt[: len(prefix)]) == list(prefix) else 0
    head = min(head, len(prompt) - 1)
    keep = min(max(max_length - longest, head + 1), len(prompt))
    short_prompt = np.concatenate((prompt[:head], prompt[len(prompt) - (keep - head) :]))
    short = [response[: max_length - keep] for response in responses]
    cuts = tuple(len(a) - len(b) for a, b in zip(responses, short, strict=True))
    return short_prompt, short, Cut(len(prompt) - keep, cuts)


def read_blocks(
    path: str | Path,
    tokenizer: Tokenizer,
    *,
    start: int,
    add_eos: bool,
    max_length: int,
    truncate: bool,
    block_tokens: int,
) -> Iterator[Block]:
    """The lines after the first ``start``, in blocks of about ``block_tokens`` tokens to compute.

    Raises:
      DataError: a bad row; or a row longer than ``max_length`` tokens, unless ``truncate``.
    """
    digest = hashlib.sha256()
    builder = _BlockBuilder()
    for number, row in read_jsonl(path):
        add_row(digest, row)
        if number <= start:
            continue
        candidates = candidates_of(row, file=path, line=number)
        prompt, responses = encode(candidates, tokenizer, add_eos=add_eos, file=path, line=number)
        longest = max(map(len, responses))
        if len(prompt) + longest > max_length and not truncate:
            field = candidates.fields[max(range(len(responses)), key=lambda i: len(responses[i]))]
            reason = (
                f"prompt ({len(prompt)} tokens) and response ({longest} tokens) are"
                f" {len(prompt) + longest} tokens, more than max_length={max_length}; raise"
                " --max_length (and --row_length), or cut with --too_long=truncate"
            )
            raise DataError(reason, file=path, line=number, field=field)
        prompt, responses, cut = fit(prompt, responses, max_length, tokenizer.prefix_ids)
        places = builder.add(prompt, responses)
        builder.block.lines.append(Line(number, row, candidates.single, places, cut))
        if builder.block.placed >= block_tokens or len(builder.block.lines) >= MAX_LINES:
            yield builder.close(number, digest.hexdigest())
            builder = _BlockBuilder()
    if builder.block.lines:
        yield builder.close(builder.block.lines[-1].number, digest.hexdigest())


class _BlockBuilder:
    """Groups what is added by prompt; examples stand in order of first appearance."""

    def __init__(self) -> None:
        self.block = Block()
        self._keys: dict[bytes, int] = {}
        self._prompts: list[IntArray] = []
        self._responses: list[list[IntArray]] = []
        self._places: dict[tuple[int, bytes], int] = {}

    def add(self, prompt: IntArray, responses: Sequence[IntArray]) -> list[tuple[int, int]]:
        """Returns the place of each response: (example's key, number of the response)."""
        key = self._keys.setdefault(prompt.tobytes(), len(self._prompts))
        if key == len(self._prompts):
            self._prompts.append(prompt)
            self._responses.append([])
            self.block.placed += len(prompt) - 1
        known = self._responses[key]
        places = []
        for response in responses:
            place = self._places.setdefault((key, response.tobytes()), len(known))
            if place == len(known):
                known.append(response)
                self.block.placed += len(response)
            places.append((key, place))
            self.block.tokens += len(prompt) + len(response)
        return places

    def close(self, end: int, digest: str) -> Block:
        groups = zip(self._prompts, self._responses, strict=True)
        self.block.examples = [
            Example(prompt, tuple(responses), key=key)
            for key, (prompt, responses) in enumerate(groups)
        ]
        self.block.end, self.block.digest = end, digest
        return self.block


def add_row(digest: Any, row: dict[str, Any]) -> None:
    """Adds a row to a SHA-256 over rows."""
    digest.update(json.dumps(row).encode() + b"\n")
