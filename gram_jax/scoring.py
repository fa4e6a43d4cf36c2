"""Scores of responses under a model: the jitted function, and the engine that keeps it fed.

A stream of examples goes through three stages: packing into rows, one call of the jitted function
per ``batch_rows`` rows, and reading the numbers back. The host is never more than one batch behind:
batch n + 1 is handed to the device before the numbers of batch n are fetched.

The function is compiled once per shape. Batches have one shape, but for the only batch of a small
input, which is as small as its rows allow (`batch_shapes`); one whose responses are short is
computed with a half or a quarter of the target slots.

Several processes go through the same stream in lock-step. Each computes its share of every batch,
and each gets all of its numbers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import numpy.typing as npt
from jax.sharding import Mesh

from gram_jax import watchdog
from gram_jax.mesh import no_surprises, put, row_parts, row_shards, whole
from gram_jax.models.decoder import Decoder
from gram_jax.packing import PackCounts, pack
from gram_jax.readouts import Readout, SequenceScores, read
from gram_jax.rows import Batch, Example, PackedRow, RowShape, empty_row
from gram_jax.rows import stack_rows as stack

FloatArray = npt.NDArray[np.float32]

_SHORTEST_ROW = 256
"""Products of fewer tokens than this are not quicker for it."""


class Scored(NamedTuple):
    """One response's score.

    Attributes:
      key: the example's key.
      response: the response's place in the example.
      score: sum over its tokens of log p(token given all before it); or the judge's or the head's.
      num_tokens: how many tokens were added up; 1 for a judge and a head.
      token_logprobs: float32 [num_tokens], or None where they were not asked for.
      greedy: each token is the likeliest at its place; None where token_logprobs is.
    """

    key: int
    response: int
    score: float
    num_tokens: int
    token_logprobs: FloatArray | None
    greedy: bool | None = None


class BatchShape(NamedTuple):
    """``size`` rows of shape ``row``, computed at once."""

    row: RowShape
    size: int

    @property
    def places(self) -> int:
        return self.size * self.row.tokens


class RowBatch(NamedTuple):
    """At most ``shape.size`` packed rows; the rest of the batch is padding."""

    rows: Sequence[PackedRow]
    shape: BatchShape


@dataclasses.dataclass(slots=True)
class EngineCounts:
    """What the engine did, added up over its calls."""

    batches: int = 0
    places: int = 0  # token places computed, padding included
    compile_seconds: float = 0.0  # of tracing and compiling, or of loading from the cache


@functools.partial(jax.jit, static_argnames=("readout", "per_token"))
def score_rows(
    model: Decoder, batch: Batch, readout: Readout, per_token: bool = False
) -> tuple[SequenceScores, tuple[jax.Array, jax.Array] | None]:
    """Scores of the sequences of B rows.

    Args:
      model: a decoder.
      batch: rows with ``sequence_ids``, or ``readout_index``; padding rows are allowed.
      readout: what a score is.
      per_token: also return the log-prob of each target, and whether it is the likeliest token.

    Returns:
      SequenceScores of [B, S], and (float32, bool) of [B, M] or None; on a mesh, whole on every
      device. Absent sequences count 0 tokens; unused target slots hold finite numbers that mean
      nothing.
    """
    found = read(model, batch, readout)
    tokens = (found.tokens.logprob, found.tokens.likeliest) if per_token and found.tokens else None
    return jax.tree.map(whole, (found.scores, tokens))


def scoring_shape(row_length: int, reading: str = "likelihood") -> RowShape:
    """Rows of so many tokens in which neither targets nor sequences are what runs out first.

    Room for sequences costs two numbers each. Only responses of fewer than four tokens after a
    shared prompt could need more, and then go on in the next row.
    """
    readouts = reading != "likelihood"
    return RowShape(
        row_length, 0 if readouts else row_length, max(row_length // 4, 1), readouts=readouts
    )


def batch_shapes(
    row_length: int, batch_rows: int, reading: str = "likelihood", mesh: Mesh | None = None
) -> list[BatchShape]:
    """The shapes that batches may have, the smallest first; the last one is the usual one.

    The others are for inputs that would not fill it: half as many rows, spread over ``mesh``, and
    so on; then one row each with a half of the tokens, and so on, with three lengths between.
    """
    counts = [batch_rows]
    while counts[-1] % (2 * row_shards(mesh)) == 0:
        counts.append(counts[-1] // 2)
    shapes = [BatchShape(scoring_shape(row_length, reading), size) for size in counts]
    longest = row_length
    while longest > _SHORTEST_ROW and longest % 2 == 0:
        for length in (longest * eighths // 8 for eighths in (7, 6, 5, 4)):
            whole_eighth = longest % 8 == 0 or length == longest // 2
            if whole_eighth and length % row_parts(mesh) == 0 and length >= _SHORTEST_ROW:
                shapes.append(BatchShape(scoring_shape(length, reading), counts[-1]))
        longest //= 2
    return shapes[::-1]


def doubling(shapes: Sequence[BatchShape]) -> list[BatchShape]:
    """Of the shapes of `batch_shapes` those that hold twice the places of the one before, where
    compiling all of them would take too long."""
    kept = [shapes[-1]]
    kept += (shape for shape in shapes[-2::-1] if 2 * shape.places <= kept[-1].places)
    return kept[::-1]


def score_examples(
    model: Decoder,
    examples: Iterable[Example],
    shape: RowShape,
    batch_rows: int,
    *,
    readout: Readout | None = None,
    mesh: Mesh | None = None,
    per_token: bool = False,
    window: int = 1024,
    counts: PackCounts | None = None,
) -> Iterator[Scored]:
    """Scores every response of every example, in the order in which they finish.

    That order is fixed by the examples, and a response is at most a window of examples and one
    batch late. A prompt is computed once per row that it is in.

    Args:
      model: a decoder, placed on ``mesh`` if there is one.
      examples: read as they are needed.
      shape: of the rows; see `scoring_shape`. Their length divides by the mesh's 2 x context.
      batch_rows: rows computed at once; divides by the mesh's data x fsdp.
      readout: what a score is; None = the log-prob.
      mesh: what the model is spread over, or None for one device.
      per_token: also the log-prob of each token.
      window: examples that are packed together.
      counts: filled with what packing did.

    Raises:
      DoesNotFit: a prompt with one response is longer than a row.
    """
    remaining = iter(examples)
    windows = iter(lambda: list(itertools.islice(remaining, window)), [])
    rows = (row for some in windows for row in pack(some, shape, counts=counts))
    batches = iter(lambda: list(itertools.islice(rows, batch_rows)), [])
    of_shape = BatchShape(shape, batch_rows)
    scored = score_batches(
        model,
        (RowBatch(some, of_shape) for some in batches),
        readout=readout,
        mesh=mesh,
        per_token=per_token,
    )
    for scores in scored:
        yield from scores


def score_batches(
    model: Decoder,
    batches: Iterable[RowBatch],
    *,
    readout: Readout | None = None,
    mesh: Mesh | None = None,
    per_token: bool = False,
    counts: EngineCounts | None = None,
) -> Iterator[list[Scored]]:
    """Scores packed rows batch by batch; yields one list per batch, in order.

    A batch's scores are yielded after the next batch has been taken and handed to the device. A
    batch of fewer rows is filled up with rows of padding.

    Args:
      model, mesh, per_token: see `score_examples`.
      batches: read as they are needed.
      readout: what a score is, None = the log-prob; ``sequences`` are those of the rows.
      counts: added to.
    """
    counts = counts if counts is not None else EngineCounts()
    compiled: set[tuple[int, ...]] = set()
    previous: tuple[Sequence[PackedRow], Any] | None = None
    for rows, shape in batches:
        batch = _assemble(rows, shape)
        reads = dataclasses.replace(readout or _LIKELIHOOD, sequences=shape.row.sequences)
        started = time.monotonic()
        meshed = jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext()
        with meshed, no_surprises():
            placed = jax.device_put(batch) if mesh is None else put(batch, mesh)
            result = score_rows(model, placed, reads, per_token)
        slots = 0 if batch.targets is None else batch.targets.shape[1]
        kind = (*batch.tokens.shape, slots)
        if kind not in compiled:
            # A call returns before its work is done, but only after compiling.
            compiled.add(kind)
            counts.compile_seconds += time.monotonic() - started
        for leaf in jax.tree.leaves(result):
            leaf.copy_to_host_async()
        counts.batches += 1
        counts.places += shape.places
        watchdog.progress()
        if previous is not None:
            yield _fetch(*previous)
        previous = (rows, result)
    if previous is not None:
        yield _fetch(*previous)


_LIKELIHOOD = Readout("likelihood", 0)


def _assemble(rows: Sequence[PackedRow], shape: BatchShape) -> Batch:
    """Rows as one batch, filled up with padding, without the target slots that no row uses."""
    filler = [empty_row(shape.row)] * (shape.size - len(rows))
    batch = stack([row.batch for row in rows] + filler)
    if batch.weights is None:
        return batch
    used = int((batch.weights != 0).sum(axis=1).max())
    slots = shape.row.targets
    while slots % 2 == 0 and slots // 2 >= used and slots > shape.row.targets // 4:
        slots //= 2
    short = {
        name: getattr(batch, name)[:, :slots]
        for name in ("target_index", "targets", "weights", "sequence_ids")
    }
    return dataclasses.replace(batch, **short)


def _fetch(
    rows: Sequence[PackedRow],
    result: tuple[SequenceScores, tuple[jax.Array, jax.Array] | None],
) -> list[Scored]:
    """Waits for a batch and names its numbers."""
    (score_bs, num_tokens_bs), tokens_bm = jax.device_get(result)
    scored = []
    for b, row in enumerate(rows):
        slot = 0
        for s, (key, response) in enumerate(row.origins):
            n = int(num_tokens_bs[b, s])
            # Sequences fill the target slots one after the other.
            logprobs, greedy = None, None
            if tokens_bm is not None:
                logprobs, likeliest = (x[b, slot : slot + n] for x in tokens_bm)
                greedy = bool(likeliest.all())
            scored.append(Scored(key, response, float(score_bs[b, s]), n, logprobs, greedy))
            slot += n
    return scored


class Running:
    """Examples that were packed together, on their way through `score_batches`.

    Attributes:
      batches: their rows.
      packed: what packing did.
      places: token places of the batches, padding included.
      missing: batches whose scores have not come yet.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        shapes: Sequence[BatchShape],
        *,
        first: bool = False,
        short_end: bool = False,
    ):
        """``shapes`` as `batch_shapes` gives them.

        The ``first`` examples of an input are all of it, if they are few, and their batch is then
        as small as can be. Others have the usual shape, which is compiled. With ``short_end`` the
        last of several batches has no more rows than it needs, where all shapes are compiled.
        """
        self.packed = PackCounts()
        rows: list[PackedRow] = []
        tokens = sum(example.num_tokens(shapes[-1].row) for example in examples)
        longest = max((example.least_tokens(shapes[-1].row) for example in examples), default=0)
        for shape in shapes if first else shapes[-1:]:
            usual = shape is shapes[-1]
            if not usual and (tokens > shape.places or longest > shape.row.tokens):
                continue
            self.packed = PackCounts()
            rows = list(pack(examples, shape.row, counts=self.packed))
            if usual or len(rows) <= shape.size:
                break
        starts = range(0, len(rows), shape.size)
        self.batches = [RowBatch(rows[i : i + shape.size], shape) for i in starts]
        if short_end and len(self.batches) > 1:
            last = self.batches[-1].rows
            fits = (s for s in shapes if s.row == shape.row and s.size >= len(last))
            self.batches[-1] = RowBatch(last, next(fits))
        self.places = sum(batch.shape.places for batch in self.batches)
        self.missing = len(self.batches)
        self._scores: dict[tuple[int, int], Scored] = {}

    def add(self, scores: Sequence[Scored]) -> None:
        """Takes the scores of one batch."""
        self.missing -= 1
        self._scores.update({(score.key, score.response): score for score in scores})

    def __getitem__(self, place: tuple[int, int]) -> Scored:
        """The score of (example's key, response)."""
        return self._scores[place]
