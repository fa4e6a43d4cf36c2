"""From lines of a file to questions to rank: checking, labels, blocks of lines.

A row is ``{"prompt", "responses": [...]}``, with ``reference`` where each response is compared with
one that is not ranked, and ``best_response`` (the place of the best) or ``scores`` (a number per
response) where it is known which is best. Other columns are carried along.
"""

from __future__ import annotations

import collections
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from gram_jax.data.sources import (
    Response,
    checked_response,
    read_jsonl,
    require_prompt,
    require_response,
)
from gram_jax.errors import DataError
from gram_jax.ranking import METHODS, comparisons
from gram_jax.scorer import Question
from gram_jax.scoring_input import add_row

COLUMNS = ("rewards", "ranking", "best", "comparisons", "truncated")
"""What ranking writes, and no row may have before."""

ROUND_SEQUENCES = 2048
"""Sequences that a block's rows make in one round, about: enough to fill batches, few enough to do
again after a kill."""
MAX_CHARACTERS = 1 << 24
"""Characters of a block's prompts and responses, at most, and one row more: what bounds memory."""


class RankRow(NamedTuple):
    """A row and what is asked about it.

    Attributes:
      number: 1-based line.
      row: as it was read.
      reference: what the responses are compared with: the place of one of them, or another one.
      best: the places of the responses that are known to be best; empty where nothing is known.
    """

    number: int
    row: dict[str, Any]
    question: Question
    reference: Response | int | None
    best: frozenset[int]

    def cost(self, method: str) -> int:
        """Comparisons that a method makes."""
        n = len(self.question.responses)
        return comparisons(method, n, reference_is_one=not isinstance(self.reference, str | list))


class RankFacts(NamedTuple):
    """A file that has been read to its end and found good.

    Attributes:
      lines: how many.
      digests: SHA-256 of the rows on so many first lines.
      responses: in all rows.
      comparisons: of all rows, by method.
    """

    lines: int
    digests: dict[int, str]
    responses: int
    comparisons: dict[str, int]


class RankBlock(NamedTuple):
    """Rows that follow one another, the last of them on line ``end``; ``digest`` up to there."""

    rows: list[RankRow]
    end: int
    digest: str


def parse_rank_row(
    row: dict[str, Any],
    *,
    file: str | Path,
    line: int,
    method: str = "",
    reference_index: int | None = None,
) -> RankRow:
    """The question and labels of a row.

    Args:
      row: a JSON object.
      file, line: where it stands, for messages.
      method: as asked for; ``reference`` needs a reference.
      reference_index: which of the responses it is; None = the column ``reference``.

    Raises:
      DataError: names file, line and field of what is missing or wrong.
    """

    def error(field: str, reason: str) -> DataError:
        return DataError(reason, file=file, line=line, field=field)

    for name in COLUMNS:
        if name in row:
            raise error(name, "is there already, and ranking would write it; rename or remove it")
    prompt = require_prompt(row, file=file, line=line)
    values = row.get("responses")
    if not isinstance(values, list) or not values:
        raise error("responses", "must be a list of at least one response")
    responses = [
        checked_response(value, f"responses[{i}]", prompt, file=file, line=line)
        for i, value in enumerate(values)
    ]
    reference: Response | int | None = None
    if method == "reference" and reference_index is not None:
        if not 0 <= reference_index < len(responses):
            reason = f"are {len(responses)}; --reference_index={reference_index} is none of them"
            raise error("responses", reason)
        reference = reference_index
    elif method == "reference":
        if "reference" not in row:
            reason = "is missing; add a response to compare with, or name one by --reference_index"
            raise error("reference", reason)
        reference = require_response(row, "reference", prompt, file=file, line=line)
    best = _best(row, len(responses), error)
    return RankRow(line, row, Question(prompt, responses), reference, best)


def check_ranking_input(
    path: str | Path, method: str, reference_index: int | None, at: int = 0
) -> RankFacts:
    """Reads a file to its end, so that a bad row is named before any work is done.

    Args:
      path: a JSONL file.
      method, reference_index: see `parse_rank_row`.
      at: a number of lines whose digest is wanted besides that of all of them.

    Raises:
      DataError: names file, line and field.
    """
    digest = hashlib.sha256()
    digests = {0: digest.hexdigest()}
    number, counts = 0, collections.Counter[str]()
    for number, record in read_jsonl(path):
        row = parse_rank_row(
            record, file=path, line=number, method=method, reference_index=reference_index
        )
        counts.update(counted(row))
        add_row(digest, record)
        if number == at:
            digests[number] = digest.hexdigest()
    digests[number] = digest.hexdigest()
    costs = {name: counts[name] for name in METHODS}
    return RankFacts(number, digests, counts["response"], costs)


def counted(row: RankRow) -> dict[str, int]:
    """The responses of a row, and the comparisons that each method makes of them."""
    costs = {name: row.cost(name) for name in METHODS}
    return {"response": len(row.question.responses), **costs}


def read_ranking_blocks(
    path: str | Path,
    method: str,
    reference_index: int | None,
    start: int,
    rows: Iterable[tuple[int, dict[str, Any]]] | None = None,
) -> Iterator[RankBlock]:
    """The lines after the first ``start``, in blocks of about ``ROUND_SEQUENCES`` a round.

    Blocks begin and end where they do whatever ``start`` is, if it is the end of one.

    Args:
      rows: those of the file, with the numbers of their lines; None to read all of it.

    Raises:
      DataError: a bad row.
    """
    digest = hashlib.sha256()
    found: list[RankRow] = []
    sequences = characters = 0
    for number, record in read_jsonl(path) if rows is None else rows:
        add_row(digest, record)
        if number <= start:
            continue
        row = parse_rank_row(
            record, file=path, line=number, method=method, reference_index=reference_index
        )
        found.append(row)
        sequences += _round_sequences(method, row)
        characters += _characters(row)
        if sequences >= ROUND_SEQUENCES or characters >= MAX_CHARACTERS:
            yield RankBlock(found, number, digest.hexdigest())
            found, sequences, characters = [], 0, 0
    if found:
        yield RankBlock(found, found[-1].number, digest.hexdigest())


def _round_sequences(method: str, row: RankRow) -> int:
    if method == "keep_best":
        return 2  # one comparison a round
    return max(2 * row.cost(method), len(row.question.responses))


def _characters(row: RankRow) -> int:
    return len(str(row.question.prompt)) + sum(len(str(r)) for r in row.question.responses)


def _best(row: dict[str, Any], n: int, error: Callable[[str, str], DataError]) -> frozenset[int]:
    """The places that the labels call best: ``best_response``, else the highest of ``scores``."""
    if row.get("best_response") is not None:
        value = row["best_response"]
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < n:
            raise error("best_response", f"must be the place of a response, 0 to {n - 1}")
        return frozenset([value])
    if row.get("scores") is not None:
        scores = row["scores"]
        if not isinstance(scores, list) or len(scores) != n or not all(map(_is_number, scores)):
            raise error("scores", f"must be a list of {n} numbers, one per response")
        return frozenset(i for i, score in enumerate(scores) if score == max(scores))
    return frozenset()


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
