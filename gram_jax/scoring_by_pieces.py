"""The scoring job of several processes that each hold the whole model; see ``piecework``.

A model that is spread over several processes is the matter of ``scoring_job``, where all compute
every batch together.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from jax.sharding import Mesh

from gram_jax.errors import UserError
from gram_jax.pieces import Piece, SourceRow, jsonl_source
from gram_jax.piecework import Made, Work, do_pieces, merge_rows
from gram_jax.scorer import Loaded, Scorer
from gram_jax.scoring_input import Block, check_row, read_blocks
from gram_jax.scoring_job import (
    BLOCK_BATCHES,
    JobResult,
    RunningBlock,
    ScoringJob,
    Summary,
    ahead,
    summarise,
)
from gram_jax.scoring_state import JobState
from gram_jax.shards import Shards


def run_pieces(
    job: ScoringJob,
    load: Callable[[], Loaded],
    *,
    mesh: Mesh | None = None,
    stream: TextIO | None = None,
) -> JobResult:
    """Runs a job, or goes on with it.

    Arguments and errors are those of `scoring_job.run_job`; the mesh is of this process's devices.
    """
    if Path(job.input).resolve() == Path(job.output).resolve():
        raise UserError(f"--input and --output are both {job.input}")
    added = job.columns()

    def check(row: SourceRow) -> Mapping[str, int]:
        check_row(row.record, added, job.reward.reading, file=row.file, line=row.line)
        return {"row": 1}

    def begin() -> Work:
        scorer = Scorer(load(), job.reward, mesh)
        return Work(
            settings={**scorer.identity(), "per_token": job.per_token},
            batch_tokens=scorer.shapes[-1].places,
            engine=scorer.engine,
            unit="row",
            counted="row",
            run=lambda pieces, advance: _score(job, scorer, pieces, advance),
        )

    def summary(state: JobState, rows: Iterator[dict[str, Any]]) -> dict[str, Any]:
        return dataclasses.asdict(summarise(state.counts, rows))

    with Shards(job.output) as shards:
        manifest, _ = do_pieces(
            [jsonl_source(job.input)],
            shards,
            check,
            begin,
            doing="scoring",
            stall_seconds=job.stall_seconds,
            stream=stream,
        )
        found = merge_rows(job.output, shards, manifest, added, summary)
    return JobResult(Summary(**found), was_complete=False)


def _score(
    job: ScoringJob,
    scorer: Scorer,
    pieces: Iterator[tuple[Piece, list[SourceRow]]],
    advance: Callable[[int], None],
) -> Iterator[Made]:
    """Scores pieces; the batches of one follow those of the last without a gap."""
    tokens = BLOCK_BATCHES * scorer.shapes[-1].places
    waiting: collections.deque[_Part] = collections.deque()

    def parts() -> Iterator[_Part]:
        for piece, rows in pieces:
            numbered = [(row.line, row.record) for row in rows]
            for block in read_blocks(
                job.input, scorer.encoder, start=0, block_tokens=tokens, rows=numbered
            ):
                yield _Part(block, scorer, piece, last=block.end == numbered[-1][0])

    def batches() -> Iterator[Any]:
        for part in ahead(parts()):
            waiting.append(part)
            yield from part.batches

    rows: list[dict[str, Any]] = []
    counts: collections.Counter[str] = collections.Counter()
    for scores in scorer.run(batches(), per_token=job.per_token):
        waiting[0].add(scores)
        if waiting[0].missing:
            continue
        part = waiting.popleft()
        rows += part.rows(job, scorer.settings)
        counts.update(part.counts())
        advance(len(part.block.lines))
        if part.last:
            yield Made(part.piece, rows, counts)
            rows, counts = [], collections.Counter()


class _Part(RunningBlock):
    """A block of a piece on its way through the engine."""

    def __init__(self, block: Block, scorer: Scorer, piece: Piece, *, last: bool):
        super().__init__(block, scorer.shapes)
        self.piece, self.last = piece, last

    def counts(self) -> dict[str, int]:
        return {
            "tokens": self.block.sequences.tokens,
            "computed": self.packed.tokens,
            "places": self.places,
        }
