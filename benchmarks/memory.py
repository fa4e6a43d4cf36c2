"""Memory of a compiled scoring step and of a compiled training step, as the vocabulary grows.

  python -m benchmarks.memory [--small]

Nothing is computed: XLA says of each compiled step how many bytes it needs beside its arguments
(weights, moments, the batch) and its results. Logits of all targets at once, [B, M, V] float32,
would be the largest array by far, and grow with the vocabulary; a step must need far less.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from benchmarks.command import finish, is_small
from benchmarks.harness import say
from benchmarks.models import SHAPES
from benchmarks.results import Case, Target
from gram_jax import entry
from gram_jax.config import (
    ComputeConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    TrainConfig,
)
from gram_jax.models.decoder import abstract_decoder
from gram_jax.readouts import Readout
from gram_jax.report import Table
from gram_jax.rows import Batch, RowShape, empty_row, stack_rows
from gram_jax.scoring import score_rows, scoring_shape
from gram_jax.training import init_state, make_optimizer, make_train_step, split_model

VOCABULARIES = (32_000, 64_000, 96_000, 152_000)
ROWS, TOKENS = 8, 512
COMPUTE = ComputeConfig()
MEBI = 2**20

SHARE = 0.05
"""Most that may be left of an array of all logits."""


def scoring_bytes(config: ModelConfig, shape: RowShape, rows: int) -> int:
    """`temporary_bytes` of the scoring step of such a model on rows of this shape."""
    model = abstract_decoder(config, COMPUTE)
    readout = Readout("likelihood", shape.sequences)
    compiled = score_rows.lower(model, abstract_batch(shape, (rows,)), readout).compile()
    return temporary_bytes(compiled)


def training_bytes(config: ModelConfig, length: int, rows: int) -> int:
    """The same of a pretraining step of AdamW on rows of ``length`` tokens."""
    shape = RowShape(length, length)
    graph, trainable, frozen = split_model(abstract_decoder(config, COMPUTE), TrainConfig())
    tx = make_optimizer(OptimizerConfig(), steps=100)
    state = jax.eval_shape(functools.partial(init_state, tx), trainable, frozen)
    step: Any = make_train_step(graph, tx, ObjectiveConfig(name="next_token"), None)
    return temporary_bytes(step.lower(state, abstract_batch(shape, (1, rows))).compile())


def abstract_batch(shape: RowShape, leading: tuple[int, ...]) -> Batch:
    """Shapes and dtypes of rows, with these axes in front."""
    row = stack_rows([empty_row(shape)])
    abstract: Batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((*leading, *x.shape[1:]), jnp.asarray(x).dtype), row
    )
    return abstract


def temporary_bytes(compiled: Any) -> int:
    """What a compiled function needs beside its arguments and results."""
    return int(compiled.memory_analysis().temp_size_in_bytes)


def step_bytes(config: ModelConfig, tokens: int, rows: int) -> NDArray[np.int64]:
    """[B, M, V] in float32, the scoring step and the training step, on rows of so many tokens."""
    shape = scoring_shape(tokens)
    logits = 4 * rows * shape.targets * config.vocab_size
    say(f"  V {config.vocab_size:,}, {rows} rows of {tokens} tokens")
    return np.array(
        [logits, scoring_bytes(config, shape, rows), training_bytes(config, tokens, rows)]
    )


def main(_: list[str]) -> None:
    """Compiles, prints and writes."""
    base = SHAPES["tiny" if is_small() else "56M"]
    vocabularies = (512, 4096) if is_small() else VOCABULARIES
    rows, tokens = (8, 128) if is_small() else (ROWS, TOKENS)
    models = [dataclasses.replace(base, vocab_size=vocab_size) for vocab_size in vocabularies]
    found = [step_bytes(model, tokens, rows) for model in models]
    longer = [step_bytes(model, 2 * tokens, rows) for model in (models[0], models[-1])]
    table = [
        (f"{model.vocab_size:,}", *(f"{x / MEBI:,.0f}" for x in sizes),
         f"{4 * model.vocab_size * model.hidden_size / MEBI:,.0f}")
        for model, sizes in zip(models, found, strict=True)
    ]  # fmt: skip
    headers = ["V", "[B, M, V] float32", "scoring step", "training step", "[V, D] float32"]
    print(f"Temporary memory of {rows} rows of {tokens} tokens, MiB:")
    print(Table(headers, table).text(), end="\n\n")
    shares = share_of_logits(found[0], found[-1], *longer)
    targets = [
        Target(
            what=f"{name} step: growth with vocabulary x targets, of [B, M, V]'s", goal=SHARE,
            reached=share, unit="%", at_most=True,
        )
        for name, share in zip(("scoring", "training"), shares, strict=True)
    ]  # fmt: skip
    each = "; ".join(
        f"V {model.vocab_size}: scoring {sizes[1]}, training {sizes[2]}"
        for model, sizes in zip(models, found, strict=True)
    )
    case = Case(
        name="tiny" if is_small() else "56M",
        what=f"bytes of compiled steps, {rows} rows of {tokens} tokens: {each}",
        timings=[],
        difference=0.0,
        targets=targets,
    )
    finish("memory", {}, [case])


def share_of_logits(
    little: NDArray[np.int64],
    words: NDArray[np.int64],
    targets: NDArray[np.int64],
    both: NDArray[np.int64],
) -> list[float]:
    """How far the steps grow with vocabulary x targets, of how far [B, M, V] does.

    Gradients and copies of [V, D] matrices grow with V alone, hidden states with M alone. What
    grows faster with V where a row has more targets is an array of logits.

    Args:
      little: `step_bytes` with a small vocabulary and few targets; the others have more of one, of
        the other, and of both.
    """
    logits, *steps = both - targets - words + little
    return [float(step / logits) for step in steps]


if __name__ == "__main__":
    entry.run(main, one_process=True)
