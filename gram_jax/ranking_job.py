"""The ranking job: a JSONL file in, the same rows in the same order with their rankings out.

Memory does not grow with the file: lines are read in blocks (see ``ranking_input``), and the rows
of a block are ranked together. A job that was killed goes on after the last block that was recorded
when the same command is given again (see ``scoring_state``); blocks know nothing of each other, so
its file is the one that an uninterrupted run would have written.

A model that is spread over several processes makes them do the same job together: each goes through
the same blocks in lock-step and gets the same numbers, and process 0 alone writes. Processes that
each hold the model rank pieces of the input (see ``ranking_by_pieces``).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np

from gram_jax.config import STALL_SECONDS
from gram_jax.distributed import is_main
from gram_jax.errors import DataError, UserError
from gram_jax.evaluation import wilson_interval
from gram_jax.packing import PackCounts
from gram_jax.ranking import METHODS, Comparer, Ranked, check_method, rank
from gram_jax.ranking_input import (
    RankBlock,
    RankFacts,
    RankRow,
    check_ranking_input,
    read_ranking_blocks,
)
from gram_jax.report import Table
from gram_jax.reporting import Progress, duration, human
from gram_jax.scorer import QuestionError, Scorer
from gram_jax.scoring import EngineCounts
from gram_jax.scoring_state import JobFiles, JobState, check_alike, check_same, short
from gram_jax.watchdog import watched

_SECONDS_BETWEEN_RECORDS = 1.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RankingJob:
    """What to rank, and how.

    Attributes:
      input, output: JSONL files; ``.gz`` is compressed.
      method: one of `gram_jax.ranking.METHODS`; "" = chosen from the kind of reward.
      reference_index: for ``reference``, which response the others are compared with; None = the
        column ``reference``.
      stall_seconds: see `watchdog.watched`.
    """

    input: str
    output: str
    method: str = ""
    reference_index: int | None = None
    stall_seconds: float = STALL_SECONDS


class Engine(NamedTuple):
    """A reward model.

    Attributes:
      settings: all that decides its numbers.
      packed, engine: where it counts what it computes.
      batch_tokens: token places of a batch.
    """

    scorer: Comparer
    settings: dict[str, Any]
    packed: PackCounts
    engine: EngineCounts
    batch_tokens: int

    @classmethod
    def of(cls, scorer: Scorer) -> Engine:
        """A checkpoint's."""
        places = scorer.shapes[-1].places
        return cls(scorer, scorer.identity(), scorer.packed, scorer.engine, places)


@dataclasses.dataclass(frozen=True, slots=True)
class RankingSummary:
    """What a completed job did; over all its runs, if it was interrupted.

    Attributes:
      kind: of reward: likelihood, judge or head.
      method: one of `gram_jax.ranking.METHODS`.
      rows, responses, truncated_rows: counts.
      comparisons: that were made.
      sequences: that the model read: two per comparison of a judge, else one per response.
      costs: comparisons of these rows by method.
      tokens_computed: a prompt counts once for all that share it.
      seconds: from the first block to the last, compilation left out.
      compile_seconds: of compiling, or of loading what was compiled before.
      labelled: rows that say which response is best.
      hits: of these, rows whose best response is the one found.
      chance: hits to be expected from choosing at random.
      longest: hits of choosing the response of most tokens, the first of several.
    """

    kind: str
    method: str
    rows: int
    responses: int
    truncated_rows: int
    comparisons: int
    sequences: int
    costs: dict[str, int]
    tokens_computed: int
    seconds: float
    compile_seconds: float
    labelled: int
    hits: int
    chance: float
    longest: int

    def text(self) -> str:
        """For a console."""
        seconds = max(self.seconds, 1e-9)
        lines = [
            f"{self.rows:,} rows, {self.responses:,} responses ranked by {self.kind}, method"
            f" {self.method}, in {duration(self.seconds)}, compilation"
            f" {self.compile_seconds:.1f} s",
            f"{self.comparisons:,} comparisons ({human(self.comparisons / seconds)} comparisons/s),"
            f" {self.sequences:,} sequences, {human(self.tokens_computed)} tokens computed"
            f" ({human(self.tokens_computed / seconds)} tokens/s)",
        ]
        if self.truncated_rows:
            lines.append(f"{self.truncated_rows:,} rows were truncated (column `truncated`)")
        if self.labelled:
            low, high = wilson_interval(self.hits, self.labelled)
            lines.append(
                f"best of N is a response labelled best in {self.hits / self.labelled:.1%}"
                f" [{low:.1%}, {high:.1%}] of {self.labelled:,} labelled rows"
                f" (at random {self.chance / self.labelled:.1%}, the longest response"
                f" {self.longest / self.labelled:.1%})"
            )
        headers = ["method", "comparisons", "sequences", "per row", "rates and orders"]
        lines += ["", "What these rows cost by method:", Table(headers, self._costs()).text()]
        return "\n".join(lines)

    def _costs(self) -> list[tuple[str, str, str, str, str]]:
        gives = {
            "scalar": "all (a likelihood or a head)",
            "reference": "all, by p of beating one response",
            "keep_best": "the best one only",
            "round_robin": "all, by ratings",
        }
        rows = []
        for method, made in self.costs.items():
            # Scoring reads a response once; a judge reads both orders of a pair.
            sequences = 2 * made if method != "scalar" else self.responses
            if method == self.method:
                sequences = self.sequences
            name = f"{method} (here)" if method == self.method else method
            per_row = f"{made / max(self.rows, 1):.1f}"
            rows.append((name, f"{made:,}", f"{sequences:,}", per_row, gives[method]))
        return rows


@dataclasses.dataclass(frozen=True, slots=True)
class RankingResult:
    """``was_complete``: there was nothing left to do, and nothing was done."""

    summary: RankingSummary
    was_complete: bool


def run_ranking(
    job: RankingJob, load: Callable[[], Engine], *, stream: TextIO | None = None
) -> RankingResult:
    """Runs a job, goes on with it, or finds that it is complete.

    Args:
      job: what to do.
      load: gives the reward model; called after the whole input has been checked.
      stream: where progress goes; standard error by default.

    Raises:
      UserError: bad input (with file and line), bad settings, or an output that belongs to another
        job.
    """
    check_job(job)
    with JobFiles(job.output) as files:
        state = files.read_state()
        at = state.lines if state else 0
        facts = check_ranking_input(job.input, job.method, job.reference_index, at)
        check_alike(job.input, facts.digests[facts.lines])
        engine = load()
        job, settings = resolved(job, engine)
        if state is None:
            state = JobState(settings, facts.digests[0])
        check_same(state, settings, facts.lines, facts.digests, files)
        if state.summary is not None:
            files.finish()
            return RankingResult(RankingSummary(**state.summary), was_complete=True)
        files.open(state)
        with watched(job.stall_seconds, "ranking"):
            state = _rank(job, engine, files, state, facts, stream)
        summary = summarise_ranking(job, engine.scorer.kind, facts, state)
        state.summary = dataclasses.asdict(summary)
        files.write_state(state)
        files.finish()
        return RankingResult(summary, was_complete=False)


def check_job(job: RankingJob) -> None:
    """Refuses what cannot be right, whatever the input and the model.

    Raises:
      UserError: says what.
    """
    if Path(job.input).resolve() == Path(job.output).resolve():
        raise UserError(f"--input and --output are both {job.input}")
    if job.reference_index is not None and job.method != "reference":
        raise UserError("--reference_index is for --method=reference")


def resolved(job: RankingJob, engine: Engine) -> tuple[RankingJob, dict[str, Any]]:
    """The job with its method, and all settings that decide what is written.

    Raises:
      UserError: the method does not go with the kind of reward.
    """
    method = check_method(job.method, engine.scorer.kind)
    settings = engine.settings | {
        "reward": engine.scorer.kind,
        "beta": engine.scorer.beta,
        "method": method,
        "reference_index": job.reference_index,
    }
    return dataclasses.replace(job, method=method), settings


def _rank(
    job: RankingJob,
    engine: Engine,
    files: JobFiles,
    state: JobState,
    facts: RankFacts,
    stream: TextIO | None,
) -> JobState:
    """Ranks what is left, keeps the state on disk up to date, and returns it."""
    unit = unit_of(job.method)
    total = facts.responses if job.method == "scalar" else facts.comparisons[job.method]
    position = int(state.counts.get(f"{unit}s", 0))
    begun = state.counts
    recorded = started = time.monotonic()
    progress = Progress(
        total,
        initial=position,
        unit=unit,
        log_every=max(total // 20, 1),
        stream=stream,
        enabled=None if is_main() else False,
    )

    def advance(made: int) -> None:
        nonlocal position
        position += made
        elapsed = time.monotonic() - started - engine.engine.compile_seconds
        rates = {
            f"{unit}s/s": position - begun.get(f"{unit}s", 0),
            "tokens/s": engine.packed.tokens,
        }
        progress.update(position, {name: n / max(elapsed, 1e-9) for name, n in rates.items()})

    files.write_state(state)
    try:
        for block in read_ranking_blocks(job.input, job.method, job.reference_index, state.lines):
            rows, counts = rank_block(job, engine.scorer, block, advance)
            size = state.size + files.append(rows)
            now = time.monotonic()
            compiling = engine.engine.compile_seconds
            spent = {
                "tokens": engine.packed.tokens,
                "seconds": now - started - compiling,
                "compile_seconds": compiling,
            }
            # What an interrupted run spent on a block that it did not end is not counted.
            spent = {name: begun.get(name, 0) + value for name, value in spent.items()}
            sums = {name: state.counts.get(name, 0) + value for name, value in counts.items()}
            # One assignment: an interruption leaves the old state or the new one.
            state = dataclasses.replace(
                state,
                input_sha256=block.digest,
                lines=block.end,
                size=size,
                counts=sums | spent,
            )
            if now - recorded > _SECONDS_BETWEEN_RECORDS:
                files.record(state)
                recorded = now
    finally:
        progress.close()
        files.record(state)
    return state


def unit_of(method: str) -> str:
    """What progress counts."""
    return "response" if method == "scalar" else "comparison"


def rank_block(
    job: RankingJob, scorer: Comparer, block: RankBlock, advance: Callable[[int], None]
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """The rows of a block with their new columns, and sums over them.

    Args:
      job: with its method.
      scorer: the reward model.
      block: what to rank.
      advance: is told after each answer how many comparisons or responses it was.

    Raises:
      DataError: a question cannot be answered; names file, line and field.
    """
    questions = [row.question for row in block.rows]
    references = [row.reference for row in block.rows if row.reference is not None]
    try:
        found = rank(scorer, questions, job.method, references=references or None, done=advance)
    except QuestionError as error:
        number = block.rows[error.question].number
        field = f"responses[{error.index}]" if error.field == "response" else error.field or None
        raise DataError(error.reason, file=job.input, line=number, field=field) from None
    rows = [_row(row, ranked) for row, ranked in zip(block.rows, found, strict=True)]
    return rows, _sums(block, found)


def _row(row: RankRow, ranked: Ranked) -> dict[str, Any]:
    """The row with its new columns."""
    ranking = ranked.ranking
    added: dict[str, Any] = {
        "rewards": [None if reward is None else short(reward) for reward in ranking.rewards],
        "ranking": list(ranking.order),
        "best": ranking.best,
        "comparisons": ranking.comparisons,
    }
    if ranked.truncated:
        added["truncated"] = True
    return row.row | added


def _sums(block: RankBlock, found: Sequence[Ranked]) -> dict[str, float]:
    new = dict.fromkeys(
        ("responses", "comparisons", "truncated", "labelled", "hits", "chance", "longest"), 0.0
    )
    for row, ranked in zip(block.rows, found, strict=True):
        n = len(row.question.responses)
        new["responses"] += n
        new["comparisons"] += ranked.ranking.comparisons
        new["truncated"] += ranked.truncated
        if row.best:
            new["labelled"] += 1
            new["hits"] += ranked.ranking.best in row.best
            new["chance"] += len(row.best) / n
            new["longest"] += int(np.argmax(ranked.num_tokens)) in row.best
    return new


def summarise_ranking(
    job: RankingJob, kind: str, facts: RankFacts, state: JobState
) -> RankingSummary:
    """What a job did that is done, by the counts of its state."""
    counts = state.counts
    made = int(counts["comparisons"])
    if kind == "judge":
        sequences = 2 * made
    elif job.method == "reference" and job.reference_index is None:
        sequences = facts.responses + facts.lines
    else:
        sequences = facts.responses
    return RankingSummary(
        kind=kind,
        method=job.method,
        rows=facts.lines,
        responses=facts.responses,
        truncated_rows=int(counts["truncated"]),
        comparisons=made,
        sequences=sequences,
        costs={method: facts.comparisons[method] for method in METHODS},
        tokens_computed=int(counts["tokens"]),
        seconds=counts["seconds"],
        compile_seconds=counts["compile_seconds"],
        labelled=int(counts["labelled"]),
        hits=int(counts["hits"]),
        chance=counts["chance"],
        longest=int(counts["longest"]),
    )
