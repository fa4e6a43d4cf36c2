"""Time and memory of a scoring and of a training step as one thing grows at a time.

  python -m benchmarks.growth [--repetitions=3] [--small]

Four things: the pairs of a prompt and a response that are computed, the responses to a prompt, the
vocabulary, and the layers. All else is as in `BASE`, on 16 pairs of 128 tokens, 32 of which are the
response's. Rows are exactly full, ids random, weights too. The step is compiled once and timed by
itself, but for scoring more and more pairs, which is packing, computing and reading back, 16 pairs
at a time. Memory is what XLA says that a step needs beside its arguments and results.

Writes runs/benchmarks/growth.json and, from it, growth.svg beside it; `benchmarks.growth_figure`
draws it again.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import numpy as np

from benchmarks.command import finish, is_small, repetitions
from benchmarks.growth_figure import write_figure
from benchmarks.harness import say
from benchmarks.models import SHAPES
from benchmarks.results import Case, Point, Target, ratio
from benchmarks.step_memory import COMPUTE
from benchmarks.steps import ScoringStep, TrainingStep
from gram_jax import entry
from gram_jax.config import ModelConfig
from gram_jax.models.decoder import init_decoder
from gram_jax.packing import pack
from gram_jax.rows import Batch, Example, RowShape, stack_rows
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
"""Places of a prompt but for its last token, and of a response; where responses
to a prompt are counted, the prompt is the long one."""
PAIRS = 16
SCORED, TRAINED = (16, 32, 64, 128, 256), (8, 16, 32, 64)
CANDIDATES = (1, 2, 4, 8, 16)
VOCABULARIES = (32_000, 64_000, 96_000, 152_000)
LAYERS = (2, 4, 8, 16)

FLAT = 1.1
"""Most that a pair may cost where there are most of them, beside where there are fewest."""


class Work(NamedTuple):
    """What a step is given: rows that are exactly full of prompts with their responses.

    Attributes:
      prompts: in all.
      candidates: responses to each.
      prefix: places of a prompt.
      rows: that they fill.
    """

    prompts: int = PAIRS
    candidates: int = 1
    prefix: int = PREFIX
    rows: int = 2

    @property
    def sequences(self) -> int:
        """Responses in a row."""
        return self.prompts * self.candidates // self.rows

    @property
    def shape(self) -> RowShape:
        """Of the rows, with no token place to spare."""
        tokens = self.prompts // self.rows * self.prefix + self.sequences * RESPONSE
        return RowShape(tokens, tokens, self.sequences)

    def examples(self) -> list[Example]:
        """The prompts with their responses, ids at random."""
        rng = np.random.default_rng(0)

        def ids(count: int) -> np.ndarray:
            return rng.integers(3, 500, count, np.int32)

        return [
            Example(
                ids(self.prefix + 1),
                tuple(ids(RESPONSE) for _ in range(self.candidates)),
                key=key,
            )
            for key in range(self.prompts)
        ]

    def batch(self) -> Batch:
        """The rows [B, ...], as numpy arrays, without target slots that are not used."""
        rows = list(pack(self.examples(), self.shape))
        assert len(rows) == self.rows, "rows are not full"
        batch, slots = stack_rows([row.batch for row in rows]), self.sequences * RESPONSE
        short = {
            name: getattr(batch, name)[:, :slots]
            for name in ("target_index", "targets", "weights", "sequence_ids")
        }
        return dataclasses.replace(batch, **short)


def main(_: list[str]) -> None:
    """Measures, prints, writes and draws."""
    base = SHAPES["tiny"] if is_small() else BASE
    cases = [
        _pairs(base),
        _case(
            "responses to a prompt",
            f"2 rows of 2 prompts of {LONG_PREFIX} tokens, responses of {RESPONSE}",
            "response",
            [(n, base, Work(4, n, LONG_PREFIX)) for n in _some(CANDIDATES)],
        ),
        _case(
            "vocabulary",
            f"{PAIRS} pairs in 2 rows of 1,024 tokens",
            "pair",
            [
                (v, dataclasses.replace(base, vocab_size=v), Work())
                for v in (_some(VOCABULARIES) if not is_small() else (512, 1024))
            ],
        ),
        _case(
            "layers",
            f"{PAIRS} pairs in 2 rows of 1,024 tokens",
            "pair",
            [(n, dataclasses.replace(base, num_layers=n), Work()) for n in _some(LAYERS)],
        ),
    ]
    path = finish("growth", {}, cases)
    write_figure(path, path.with_suffix(".svg"))
    say(f"drawn in {path.with_suffix('.svg')}")


def _some(values: tuple[int, ...]) -> tuple[int, ...]:
    return values[:2] if is_small() else values


def _pairs(base: ModelConfig) -> Case:
    """Scoring and training on more and more pairs."""
    name, temporary = "pairs", _scoring(base, Work()).temporary
    model, shape = init_decoder(base, COMPUTE, seed=0), Work().shape
    points = []
    for count in _some(SCORED):
        examples = Work(count, rows=count * Work().rows // PAIRS).examples()

        def score(examples: list[Example] = examples) -> float:
            began = time.perf_counter()
            scored = sum(1 for _ in score_examples(model, examples, shape, Work().rows))
            assert scored == len(examples)
            return time.perf_counter() - began

        points.append(_point("scoring", count, score, count, temporary, "pair"))
    few, many = points[0], points[-1]
    each = [[seconds / p.work for seconds in p.seconds] for p in (many, few)]
    times = ratio(*each)
    target = Target(
        what=f"scoring: cost of a pair, {many.at:,} pairs beside {few.at:,}", goal=FLAT,
        reached=times.median, unit="x", at_most=True, low=times.low, high=times.high,
    )  # fmt: skip
    for count in _some(TRAINED):
        step = _training(base, Work(count, rows=count * Work().rows // PAIRS))
        points.append(_point("training", count, step.seconds, count, step.temporary, "pair"))
    what = f"8 in a row of 1,024 tokens; scoring takes {PAIRS} at a time, training all at once"
    return Case(name=name, what=what, timings=[], difference=None, targets=[target], points=points)


def _case(name: str, what: str, unit: str, steps: Iterable[tuple[int, ModelConfig, Work]]) -> Case:
    points = []
    for at, config, work in steps:
        count = work.prompts * work.candidates
        for side, made in (
            ("scoring", _scoring(config, work)),
            ("training", _training(config, work)),
        ):
            points.append(_point(side, at, made.seconds, count, made.temporary, unit))
    return Case(name=name, what=what, timings=[], difference=None, targets=[], points=points)


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


def _scoring(config: ModelConfig, work: Work) -> ScoringStep:
    return ScoringStep(config, work.batch(), work.sequences)


def _training(config: ModelConfig, work: Work) -> TrainingStep:
    return TrainingStep(config, jax.tree.map(lambda x: x[None], work.batch()))


if __name__ == "__main__":
    entry.run(main, one_process=True)
