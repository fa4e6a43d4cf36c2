"""Time and memory of a scoring and of a training step as one thing grows at a time.

  python -m benchmarks.growth [--repetitions=3] [--small]

Four things: the pairs of a prompt and a response that are computed, the responses to a prompt, the
vocabulary, and the layers. All else is as in `BASE`, on 8 pairs of 128 tokens, 32 of which are the
response's. Rows are exactly full, ids random, weights too. The step is compiled once and timed by
itself, but for scoring more and more pairs, which is packing, computing and reading back, 8 pairs
at a time. Memory is what XLA says that a step needs beside its arguments and results.

Writes runs/benchmarks/growth.json and, from it, growth.svg beside it; `benchmarks.growth_figure`
draws it again.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable

import jax

from benchmarks.command import finish, is_small, repetitions
from benchmarks.full_rows import FullRows
from benchmarks.growth_figure import write_figure
from benchmarks.harness import say
from benchmarks.models import SHAPES
from benchmarks.results import Case, Point, Target, ratio
from benchmarks.step_memory import COMPUTE
from benchmarks.steps import ScoringStep, TrainingStep
from gram_jax import entry
from gram_jax.config import ModelConfig
from gram_jax.models.decoder import init_decoder
from gram_jax.rows import Example
from gram_jax.scoring import score_examples

BASE = ModelConfig(
    vocab_size=32000,
    hidden_size=256,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    intermediate_size=704,
)
PREFIX, LONG_PREFIX, RESPONSE = 96, 256, 32
"""Places of a prompt and of a response; the long one is for many responses to a prompt."""
PAIRS, ROWS = 8, 2
SCORED, TRAINED = (8, 16, 32, 64, 128), (4, 8, 16, 32)
CANDIDATES = (1, 2, 4, 8, 16)
VOCABULARIES = (32_000, 64_000, 96_000, 152_000)
LAYERS = (2, 4, 8, 16)

FLAT = 1.1
"""Most that a pair may cost where there are most of them, beside where there are fewest."""


def main(_: list[str]) -> None:
    """Measures, prints, writes and draws."""
    # Small: one layer, and sizes that have their steps in common, as most of the time is compiling.
    base = dataclasses.replace(SHAPES["tiny"], num_layers=1) if is_small() else BASE
    scored, trained = (SCORED[:2], (PAIRS,)) if is_small() else (SCORED, TRAINED)
    candidates = (4,) if is_small() else CANDIDATES
    vocabularies = (base.vocab_size,) if is_small() else VOCABULARIES
    layers = (base.num_layers,) if is_small() else LAYERS
    same = f"{PAIRS} pairs in {ROWS} rows of {_pairs(PAIRS).shape.tokens:,} tokens"
    cases = [
        _growing_pairs(base, scored, trained),
        _case(
            "responses to a prompt",
            f"{ROWS} rows of 2 prompts of {LONG_PREFIX} tokens, responses of {RESPONSE}",
            "response",
            ((n, base, FullRows(2 * ROWS, n, LONG_PREFIX, RESPONSE, ROWS)) for n in candidates),
        ),
        _case(
            "vocabulary",
            same,
            "pair",
            ((v, dataclasses.replace(base, vocab_size=v), _pairs(PAIRS)) for v in vocabularies),
        ),
        _case(
            "layers",
            same,
            "pair",
            ((n, dataclasses.replace(base, num_layers=n), _pairs(PAIRS)) for n in layers),
        ),
    ]
    path = finish("growth", {}, cases)
    write_figure(path, path.with_suffix(".svg"))
    say(f"drawn in {path.with_suffix('.svg')}")


def _pairs(count: int) -> FullRows:
    return FullRows(count, 1, PREFIX, RESPONSE, count * ROWS // PAIRS)


def _growing_pairs(base: ModelConfig, scored: Iterable[int], trained: Iterable[int]) -> Case:
    """Scoring through the engine, a batch after the other, and a training step on all at once."""
    batch = _pairs(PAIRS)
    temporary = _scoring(base, batch).temporary
    model = init_decoder(base, COMPUTE, seed=0)
    points = []
    for count in scored:
        examples = _pairs(count).examples()

        def score(examples: list[Example] = examples) -> float:
            began = time.perf_counter()
            done = sum(1 for _ in score_examples(model, examples, batch.shape, ROWS))
            assert done == len(examples)
            return time.perf_counter() - began

        points.append(_point("scoring", count, score, count, temporary, "pair"))
    few, many = points[0], points[-1]
    of_many, of_few = ([seconds / point.work for seconds in point.seconds] for point in (many, few))
    times = ratio(of_many, of_few)
    flat = Target(
        what=f"scoring: cost of a pair, {many.at:,} pairs beside {few.at:,}", goal=FLAT,
        reached=times.median, unit="x", at_most=True, low=times.low, high=times.high,
    )  # fmt: skip
    for count in trained:
        step = _training(base, _pairs(count))
        points.append(_point("training", count, step.seconds, count, step.temporary, "pair"))
    return Case(
        name="pairs",
        what=f"{PAIRS // ROWS} in a row of {batch.shape.tokens:,} tokens; scoring takes {PAIRS} at"
        " a time, training all at once",
        timings=[],
        difference=None,
        targets=[flat],
        points=points,
    )


def _case(
    name: str, what: str, unit: str, steps: Iterable[tuple[int, ModelConfig, FullRows]]
) -> Case:
    """Both steps at each size of the one thing that grows."""
    points = []
    for at, config, rows in steps:
        count = rows.prompts * rows.candidates
        scoring = _scoring(config, rows)
        points.append(_point("scoring", at, scoring.seconds, count, scoring.temporary, unit))
        training = _training(config, rows)
        points.append(_point("training", at, training.seconds, count, training.temporary, unit))
    return Case(name=name, what=what, timings=[], difference=None, targets=[], points=points)


def _scoring(config: ModelConfig, rows: FullRows) -> ScoringStep:
    return ScoringStep(config, rows.batch(), rows.sequences)


def _training(config: ModelConfig, rows: FullRows) -> TrainingStep:
    return TrainingStep(config, jax.tree.map(lambda x: x[None], rows.batch()))


def _point(
    side: str, at: int, seconds: Callable[[], float], work: int, temporary: int, unit: str
) -> Point:
    seconds()  # a warm-up
    point = Point(
        side=side,
        at=at,
        seconds=[seconds() for _ in range(repetitions())],
        work=work,
        unit=unit,
        temporary_bytes=temporary,
    )
    say(f"  {side} at {at:,}: {point.milliseconds:.3g} ms a {unit}")
    return point


if __name__ == "__main__":
    entry.run(main, one_process=True)
