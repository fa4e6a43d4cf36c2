"""The input pipeline beside the step that it feeds: rows a second, and how many times the step's.

  python -m benchmarks.input [--data=FOLDER] [--small]

Training: rows of 512 tokens of text, prepared before, read from their files in shuffled order and
put on the device, 8 at a time; beside a training step. Scoring, and judging in both orders: a
preference file, read, checked, tokenised, packed into rows and put on the device; beside the step
on its first batch. The model has 56M parameters, and there is no peer. Both sides have the whole
machine, as they take turns; in a run they share it, and the input takes 1 / ratio of it.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from benchmarks.command import Setting, finish, is_small, setting
from benchmarks.corpus import documents, preference_rows
from benchmarks.harness import say
from benchmarks.results import Case, Target, Timing, ratio
from benchmarks.steps import TrainingStep
from gram_jax import entry
from gram_jax.checkpoints import load_model
from gram_jax.config import ComputeConfig, DataConfig, MeshConfig
from gram_jax.data.examples import Layout
from gram_jax.data.loader import RowOrder, device_batch
from gram_jax.data.meter import Meter
from gram_jax.data.prepare import prepared_rows
from gram_jax.data.rowset import Rows
from gram_jax.mesh import make_mesh
from gram_jax.rows import stack_rows
from gram_jax.scorer import RewardSettings, Scorer
from gram_jax.scoring import Running
from gram_jax.scoring_input import check_input, read_blocks
from gram_jax.scoring_job import BLOCK_BATCHES

TARGET = 10.0
LENGTH, BATCH_ROWS, BATCHES = 512, 8, 25
_STEP_ROWS = 2
_DOCUMENTS = 1000


class Fed(NamedTuple):
    """Two ways to spend time on rows; each call does it once and returns (seconds, rows)."""

    input: Callable[[], tuple[float, int]]
    step: Callable[[], tuple[float, int]]


def main(_: list[str]) -> None:
    """Measures, prints and writes."""
    with setting("56M") as s:
        pairs = 20 if is_small() else 1000
        cases = [
            _case("training", f"text in rows of {LENGTH} tokens", _training(s), s),
            _case("scoring", f"{pairs:,} preferences", _scoring(s, "likelihood", pairs), s),
            _case("judging", f"{pairs // 4:,} preferences", _scoring(s, "judge", pairs // 4), s),
        ]
    finish("input", {}, cases)


def _case(name: str, what: str, fed: Fed, s: Setting) -> Case:
    say(f"{name}: {what}")
    found: dict[str, list[float]] = {"input": [], "step": []}  # seconds a row
    rows = {}
    for repetition in range(s.repetitions + 1):  # the first is a warm-up
        for side, spend in zip(found, fed, strict=True):
            seconds, rows[side] = spend()
            if repetition:
                found[side].append(seconds / rows[side])
    rates = {side: 1 / np.median(seconds) for side, seconds in found.items()}
    say("  " + ", ".join(f"{side} {rate:,.3g} rows/s" for side, rate in rates.items()))
    timings = [
        Timing(
            side=side, seconds=seconds, work=1, unit="rows", compile_seconds=0.0,
            warm_up_seconds=0.0, facts={"measured_rows": rows[side]},
        )
        for side, seconds in found.items()
    ]  # fmt: skip
    times = ratio(found["step"], found["input"])
    target = Target(
        what="rows/s of the input, step = 1", goal=TARGET, reached=times.median, unit="x",
        low=times.low, high=times.high,
    )  # fmt: skip
    return Case(name=name, what=what, timings=timings, difference=None, targets=[target])


def _training(s: Setting) -> Fed:
    """What the loop of a stage does before a step, and the step."""
    file, mesh = s.scratch / "text.jsonl", make_mesh(MeshConfig())
    texts = itertools.islice(documents(s.data), 20 if is_small() else _DOCUMENTS)
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    data = DataConfig(row_length=LENGTH)
    layout = Layout("text", targets=True)
    prepared = prepared_rows(
        str(file), data, s.tokenizer, s.scratch / "rows",
        layout=layout, replace=False, meter=Meter(quiet=True),
    )  # fmt: skip
    rows = Rows([prepared])
    order = RowOrder(rows.sizes, seed=0)
    position = itertools.count(step=BATCH_ROWS)

    def load() -> tuple[float, int]:
        began = time.perf_counter()
        for _ in range(BATCHES):
            numbers = order.numbers(next(position), BATCH_ROWS)
            jax.block_until_ready(device_batch(rows, numbers, 1, mesh))
        return time.perf_counter() - began, BATCHES * BATCH_ROWS

    with jax.set_mesh(mesh):
        batch = device_batch(rows, order.numbers(0, _STEP_ROWS), 1, mesh)
        step = TrainingStep(s.config, batch, mesh)

    def train() -> tuple[float, int]:
        with jax.set_mesh(mesh):
            return step.seconds(), _STEP_ROWS

    return Fed(load, train)


def _scoring(s: Setting, reading: str, pairs: int) -> Fed:
    """What `score` does before a batch is computed, and the computation."""
    file = s.scratch / f"{reading}.jsonl"
    some = itertools.islice(preference_rows(s.data), pairs)
    file.write_text("".join(json.dumps(row) + "\n" for row in some), encoding="utf-8")
    settings = RewardSettings(reading=reading, too_long="truncate")
    scorer = Scorer(load_model(s.model, ComputeConfig()), settings)

    def read() -> tuple[float, int]:
        began, rows = time.perf_counter(), 0
        check_input(file, (), reading=reading)
        for running in _blocks(file, scorer):
            for batch in running.batches:
                jax.block_until_ready(jax.device_put(stack_rows([row.batch for row in batch.rows])))
                rows += len(batch.rows)
        return time.perf_counter() - began, rows

    (first, *_) = next(_blocks(file, scorer)).batches

    def score() -> tuple[float, int]:
        began = time.perf_counter()
        for _ in scorer.run([first]):
            pass
        return time.perf_counter() - began, len(first.rows)

    return Fed(read, score)


def _blocks(file: Path, scorer: Scorer) -> Iterator[Running]:
    """The blocks of a file, each packed into rows."""
    block_tokens = BLOCK_BATCHES * scorer.shapes[-1].places
    for block in read_blocks(file, scorer.encoder, start=0, block_tokens=block_tokens):
        yield Running(block.sequences.examples(), scorer.shapes)


if __name__ == "__main__":
    entry.run(main, one_process=True)
