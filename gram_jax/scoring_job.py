"""The scoring job: a JSONL file in, the same rows in the same order with their scores out.

Memory hardly grows with the file. Lines are read in blocks (see ``scoring_input``) of a bounded
number of tokens and lines, by prompts where those of a prompt stand apart (``grouping``), which
takes two numbers a line; at any time at most ``BLOCKS_IN_FLIGHT`` exist: one being read and
tokenised in another thread, one being computed, and one whose last batch has not come back. Only
the summary of preference pairs keeps three numbers and a reference per pair.

A job that was killed goes on where it stopped when the same command is given again (see
``scoring_state``), and its file is the one that an uninterrupted run would have written.

Several processes do the same job together: each reads and tokenises the whole input, which costs
little beside the model, and computes its share of every batch. Process 0 alone writes.
"""

from __future__ import annotations

import array
import collections
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TextIO, TypeVar

import numpy as np
from jax.sharding import Mesh

from gram_jax.config import STALL_SECONDS
from gram_jax.distributed import is_main, main_first
from gram_jax.errors import UserError
from gram_jax.evaluation import Accuracy, by_subset
from gram_jax.grouping import IntArray, has_places, rows_of
from gram_jax.report import Table
from gram_jax.reporting import Progress, duration, human
from gram_jax.scorer import Loaded, RewardSettings, Scorer, judge_probability
from gram_jax.scoring import BatchShape, EngineCounts, RowBatch, Running
from gram_jax.scoring_input import Block, Line, check_input, read_blocks
from gram_jax.scoring_state import JobFiles, JobState, check_alike, check_same, short
from gram_jax.watchdog import watched

BLOCKS_IN_FLIGHT = 3
BLOCK_BATCHES = 128
"""Batches of a block: what is computed again after a kill, at most, once what was done is on disk.
What is together in a block shares its prompts, and its last batch is partly padding: shorter blocks
would cost more than they save."""

_SECONDS_BETWEEN_RECORDS = 1.0

_Item = TypeVar("_Item")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ScoringJob:
    """What to score.

    Attributes:
      input, output: JSONL files; ``.gz`` is compressed.
      reward: how a reward is read.
      per_token: write the log-prob of every token, too.
      stall_seconds: see `watchdog.watched`.
    """

    input: str
    output: str
    reward: RewardSettings = dataclasses.field(default_factory=RewardSettings)
    per_token: bool = False
    stall_seconds: float = STALL_SECONDS

    def columns(self) -> list[str]:
        """The columns that the job may write."""
        own = {"likelihood": ["logprob"], "judge": ["log_odds"], "head": []}
        names = [*own[self.reward.reading], "num_tokens", "reward"]
        if self.per_token:
            names.append("token_logprobs")
        if self.reward.too_long == "truncate":
            names.append("truncated")
        return names


@dataclasses.dataclass(frozen=True, slots=True)
class Summary:
    """What a completed job did; over all its runs, if it was interrupted.

    Attributes:
      rows, candidates, truncated_rows: counts.
      tokens: of prompt + response, over all candidates, after truncation.
      tokens_computed: of these, after sharing prompts and equal responses.
      padding: share of the computed places that held no token.
      seconds: from the first batch to the last, compilation left out.
      compile_seconds: of compiling, or of loading what was compiled before.
      pairs: over rows with chosen and rejected, None without any.
      subsets: of these, by the column ``subset``, if the file has one.
    """

    rows: int
    candidates: int
    truncated_rows: int
    tokens: int
    tokens_computed: int
    padding: float
    seconds: float
    compile_seconds: float
    pairs: dict[str, Any] | None
    subsets: dict[str, dict[str, Any]]

    def text(self) -> str:
        """For a console."""
        seconds = max(self.seconds, 1e-9)
        lines = [
            f"{self.rows:,} rows, {self.candidates:,} candidates in {duration(self.seconds)}"
            f" ({human(self.rows / seconds)} rows/s), compilation {self.compile_seconds:.1f} s",
            f"{human(self.tokens)} tokens of prompt + response, {human(self.tokens_computed)}"
            f" computed ({human(self.tokens_computed / seconds)} tokens/s),"
            f" padding {self.padding:.1%}",
        ]
        if self.truncated_rows:
            lines.append(f"{self.truncated_rows:,} rows were truncated (column `truncated`)")
        if self.pairs is not None:
            groups = {**self.subsets, "all": self.pairs} if self.subsets else {"all": self.pairs}
            headers = ["subset", "pairs", "accuracy", "ties", "mean margin", "longer wins"]
            rows = [
                (name, p["n"], _interval(p["accuracy"]), p["ties"], f"{p['margin_mean']:.4f}",
                 _interval(p["longer_wins"]))
                for name, p in groups.items()
            ]  # fmt: skip
            lines += ["", Table(headers, rows).text()]
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True, slots=True)
class JobResult:
    """``was_complete``: there was nothing left to do, and nothing was done."""

    summary: Summary
    was_complete: bool


def run_job(
    job: ScoringJob,
    load: Callable[[], Loaded],
    *,
    mesh: Mesh | None = None,
    stream: TextIO | None = None,
) -> JobResult:
    """Runs a job, goes on with it, or finds that it is complete.

    Args:
      job: what to do.
      load: gives the model; called after the whole input has been checked.
      mesh: what the model is spread over, or None for one device.
      stream: where progress goes; standard error by default.

    Raises:
      UserError: bad input (with file and line), bad settings, or an output that belongs to another
        job.
    """
    if Path(job.input).resolve() == Path(job.output).resolve():
        raise UserError(f"--input and --output are both {job.input}")
    with JobFiles(job.output) as files:
        state = files.read_state()
        reading = job.reward.reading
        at = state.lines if state else 0
        facts = check_input(job.input, job.columns(), at=at, reading=reading)
        digest = facts.digests[facts.lines]
        check_alike(job.input, digest)
        order = facts.by_prompt if has_places(job.input) else None
        scorer = Scorer(load(), job.reward, mesh)
        settings = {**scorer.identity(), "per_token": job.per_token}
        if state is None:
            done = facts.digests[0] if order is None else digest
            state = JobState(settings, done, by_prompt=order is not None)
        if not state.by_prompt:  # one that was begun so goes on so
            order = None
        digests = {state.lines: digest} if state.by_prompt else facts.digests
        check_same(state, settings, facts.lines, digests, files)
        if state.summary is not None:
            files.finish(order)
            return JobResult(Summary(**state.summary), was_complete=True)
        files.open(state)
        with watched(job.stall_seconds, "scoring"):
            state = _score(job, scorer, files, state, facts.lines, order, stream)
        counts = state.counts
        state.summary = main_first(lambda: dataclasses.asdict(summarise(counts, files.rows())))
        files.write_state(state)
        files.finish(order)
        return JobResult(Summary(**state.summary), was_complete=False)


def _score(
    job: ScoringJob,
    scorer: Scorer,
    files: JobFiles,
    state: JobState,
    total: int,
    order: IntArray | None,
    stream: TextIO | None,
) -> JobState:
    """Scores what is left, keeps the state on disk up to date, and returns it."""
    blocks = read_blocks(
        job.input,
        scorer.encoder,
        start=state.lines if order is None else 0,
        block_tokens=BLOCK_BATCHES * scorer.shapes[-1].places,
        rows=None if order is None else rows_of(job.input, order[state.lines :]),
    )
    engine = scorer.engine
    waiting: collections.deque[RunningBlock] = collections.deque()

    def batches() -> Iterator[RowBatch]:
        for running in ahead(RunningBlock(block, scorer.shapes) for block in blocks):
            waiting.append(running)
            yield from running.batches

    progress = Progress(
        total,
        initial=state.lines,
        unit="row",
        log_every=max(total // 20, 1),
        stream=stream,
        enabled=None if is_main() else False,
    )
    files.write_state(state)
    begun = state
    recorded = started = time.monotonic()
    try:
        for scores in scorer.run(batches(), per_token=job.per_token):
            running = waiting[0]
            running.add(scores)
            if running.missing:
                continue
            waiting.popleft()
            size = state.size + files.append(running.rows(job, scorer.settings))
            now = time.monotonic()
            # One assignment: an interruption leaves the old state or the new one.
            state = _after(begun, state, running, size, engine, now - started)
            if now - recorded > _SECONDS_BETWEEN_RECORDS:
                files.record(state)
                recorded = now
            seconds = max(now - started - engine.compile_seconds, 1e-9)
            computed = state.counts["computed"] - begun.counts.get("computed", 0)
            rates = {
                "rows/s": (state.lines - begun.lines) / seconds,
                "tokens/s": computed / seconds,
            }
            progress.update(state.lines, rates)
    finally:
        progress.close()
        files.record(state)
    return state


def _after(
    begun: JobState,
    state: JobState,
    running: RunningBlock,
    size: int,
    engine: EngineCounts,
    elapsed: float,
) -> JobState:
    """The state after one more block; its seconds are those of all runs."""

    def total(name: str, value: float, of: JobState = state) -> float:
        return of.counts.get(name, 0) + value

    counts = {
        "tokens": total("tokens", running.block.sequences.tokens),
        "computed": total("computed", running.packed.tokens),
        "places": total("places", running.places),
        "seconds": total("seconds", elapsed - engine.compile_seconds, begun),
        "compile_seconds": total("compile_seconds", engine.compile_seconds, begun),
    }
    return dataclasses.replace(
        state,
        input_sha256=state.input_sha256 if state.by_prompt else running.block.digest,
        lines=state.lines + len(running.block.lines),
        size=size,
        counts=counts,
    )


class RunningBlock(Running):
    """A block on its way through the engine."""

    def __init__(self, block: Block, shapes: Sequence[BatchShape]):
        super().__init__(block.sequences.examples(), shapes, first=block.lines[0].number == 1)
        self.block = block

    def rows(self, job: ScoringJob, settings: RewardSettings) -> list[dict[str, Any]]:
        """The block's rows with their new columns."""
        return [self._row(line, job, settings) for line in self.block.lines]

    def _row(self, line: Line, job: ScoringJob, settings: RewardSettings) -> dict[str, Any]:
        scores = [self[place] for place in line.places]
        if not all(math.isfinite(score.score) for score in scores):
            raise UserError(
                f"{job.input}:{line.number}: the model gives a score that is not finite; its"
                " weights may be damaged, or too large for the compute dtype"
            )

        def column(values: Sequence[Any]) -> Any:
            return values[0] if line.single else list(values)

        row = dict(line.row)
        numbers = np.array([score.score for score in scores])
        if settings.reading == "likelihood":
            row["logprob"] = column([short(number) for number in numbers])
            if settings.average == "mean":
                numbers = numbers / line.num_tokens
        elif settings.reading == "judge":
            row["log_odds"] = [short(number) for number in numbers]
            (p,) = judge_probability(numbers[:1], numbers[1:])
            numbers = np.array([p, 1 - p])
        row["num_tokens"] = column(line.num_tokens)
        row["reward"] = column([short(number) for number in numbers])
        if job.per_token:
            tokens = [s.token_logprobs for s in scores if s.token_logprobs is not None]
            row["token_logprobs"] = column([[short(x) for x in values] for values in tokens])
        if line.cut:
            row["truncated"] = {
                "prompt_tokens": line.cut.prompt,
                "response_tokens": column(list(line.cut.responses)),
            }
        return row


def ahead(items: Iterator[_Item]) -> Iterator[_Item]:
    """Yields the items; the next one is made in another thread while the last one is in use."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(next, items, None)
        while (item := future.result()) is not None:
            future = pool.submit(next, items, None)
            yield item


def summarise(counts: dict[str, float], rows: Iterator[dict[str, Any]]) -> Summary:
    """Reads the finished rows once, so that those of earlier runs are in it."""
    number = candidates = truncated = 0
    numbers = [array.array("d") for _ in range(3)]
    subsets: list[str] = []
    names: dict[str, str] = {}
    for row in rows:
        number += 1
        candidates += len(row["reward"]) if isinstance(row["reward"], list) else 1
        truncated += "truncated" in row
        if "chosen" in row:
            chosen, rejected = row["reward"]
            for column, value in zip(numbers, (chosen - rejected, *row["num_tokens"]), strict=True):
                column.append(value)
            subset = row.get("subset", "")
            subsets.append(names.setdefault(subset, subset))
    pairs, by_name = None, {}
    if subsets:
        found = by_subset(subsets, *numbers)
        pairs = dataclasses.asdict(found.micro)
        if set(names) != {""}:
            by_name = {name or "(none)": dataclasses.asdict(s) for name, s in found.subsets.items()}
    return Summary(
        rows=number,
        candidates=candidates,
        truncated_rows=truncated,
        tokens=int(counts["tokens"]),
        tokens_computed=int(counts["computed"]),
        padding=1 - counts["computed"] / counts["places"],
        seconds=counts["seconds"],
        compile_seconds=counts["compile_seconds"],
        pairs=pairs,
        subsets=by_name,
    )


def _interval(accuracy: dict[str, Any] | None) -> str | None:
    if accuracy is None:
        return None
    a = Accuracy(**accuracy)
    return f"{a.value:.1%} [{a.low:.1%}, {a.high:.1%}]"
