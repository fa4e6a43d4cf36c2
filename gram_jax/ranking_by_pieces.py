"""The ranking job of several processes that each hold the whole model; see ``piecework``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TextIO

from gram_jax.pieces import Piece, SourceRow, count_of, jsonl_source
from gram_jax.piecework import Made, Work, add, do_pieces, merge_rows
from gram_jax.ranking import METHODS
from gram_jax.ranking_input import (
    COLUMNS,
    RankFacts,
    counted,
    parse_rank_row,
    read_ranking_blocks,
)
from gram_jax.ranking_job import (
    Engine,
    RankingJob,
    RankingResult,
    RankingSummary,
    check_job,
    rank_block,
    resolved,
    summarise_ranking,
    unit_of,
)
from gram_jax.scoring_state import JobState
from gram_jax.shards import Shards


def rank_pieces(
    job: RankingJob, load: Callable[[], Engine], *, stream: TextIO | None = None
) -> RankingResult:
    """Runs a job, or goes on with it.

    Arguments and errors are those of `ranking_job.run_ranking`; the model is on this process's
    devices.
    """
    check_job(job)
    begun: list[tuple[RankingJob, Engine]] = []

    def check(row: SourceRow) -> Mapping[str, int]:
        parsed = parse_rank_row(
            row.record,
            file=row.file,
            line=row.line,
            method=job.method,
            reference_index=job.reference_index,
        )
        return counted(parsed)

    def begin() -> Work:
        engine = load()
        ready, settings = resolved(job, engine)
        begun.append((ready, engine))
        unit = unit_of(ready.method)
        return Work(
            settings=settings,
            batch_tokens=engine.batch_tokens,
            engine=engine.engine,
            unit=unit,
            counted="response" if unit == "response" else ready.method,
            run=lambda pieces, advance: _rank(ready, engine, pieces, advance),
        )

    with Shards(job.output) as shards:
        manifest, blocks = do_pieces(
            [jsonl_source(job.input)],
            shards,
            check,
            begin,
            doing="ranking",
            stall_seconds=job.stall_seconds,
            stream=stream,
        )
        ((ready, engine),) = begun
        costs = {method: count_of(blocks, method) for method in METHODS}
        facts = RankFacts(manifest.rows, {}, count_of(blocks, "response"), costs)

        def summary(state: JobState, _: Iterator[dict[str, Any]]) -> dict[str, Any]:
            found = summarise_ranking(ready, engine.scorer.kind, facts, state)
            return dataclasses.asdict(found)

        found = merge_rows(job.output, shards, manifest, COLUMNS, summary)
    return RankingResult(RankingSummary(**found), was_complete=False)


def _rank(
    job: RankingJob,
    engine: Engine,
    pieces: Iterator[tuple[Piece, list[SourceRow]]],
    advance: Callable[[int], None],
) -> Iterator[Made]:
    for piece, rows in pieces:
        before = engine.packed.tokens
        made: list[dict[str, Any]] = []
        counts: dict[str, float] = {}
        numbered = [(row.line, row.record) for row in rows]
        for block in read_ranking_blocks(
            job.input, job.method, job.reference_index, 0, rows=numbered
        ):
            some, sums = rank_block(job, engine.scorer, block, advance)
            made += some
            add(counts, sums)
        yield Made(piece, made, {**counts, "tokens": engine.packed.tokens - before})
