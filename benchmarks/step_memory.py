"""How much memory compiled steps need, as XLA says it."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from gram_jax.config import (
    ComputeConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    TrainConfig,
)
from gram_jax.models.decoder import abstract_decoder
from gram_jax.readouts import Readout
from gram_jax.rows import Batch, RowShape, empty_row, stack_rows
from gram_jax.scoring import score_rows
from gram_jax.training import init_state, make_optimizer, make_train_step, split_model

COMPUTE = ComputeConfig()


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
