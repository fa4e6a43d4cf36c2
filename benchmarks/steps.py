"""A scoring step and a training step of a random model, each compiled for one batch."""

from __future__ import annotations

import time
from typing import Any

import jax
from jax.sharding import Mesh

from benchmarks.step_memory import COMPUTE, temporary_bytes
from gram_jax.config import ModelConfig, ObjectiveConfig, OptimizerConfig, TrainConfig
from gram_jax.models.decoder import init_decoder
from gram_jax.readouts import Readout
from gram_jax.rows import Batch
from gram_jax.scoring import score_rows
from gram_jax.training import init_state, make_optimizer, make_train_step, split_model


class ScoringStep:
    """Log-probs of the responses of a batch [B, ...] with ``sequence_ids``, of at most S a row.

    Attributes:
      temporary: bytes that it needs beside weights, batch and results.
    """

    def __init__(self, config: ModelConfig, batch: Batch, sequences: int):
        self._model = init_decoder(config, COMPUTE, seed=0)
        self._batch = jax.device_put(batch)
        readout = Readout("likelihood", sequences)
        self._compiled: Any = score_rows.lower(self._model, self._batch, readout).compile()
        self.temporary = temporary_bytes(self._compiled)

    def seconds(self) -> float:
        """Takes the step, and says how long it took."""
        began = time.perf_counter()
        jax.block_until_ready(self._compiled(self._model, self._batch))
        return time.perf_counter() - began


class TrainingStep:
    """Next-token prediction on a batch [parts, B, ...]: gradients, clipping, AdamW.

    Attributes:
      temporary: bytes that it needs beside weights, moments and batch.
    """

    def __init__(self, config: ModelConfig, batch: Batch, mesh: Mesh | None = None):
        """Args: mesh: entered, if the batch is on one."""
        model = init_decoder(config, COMPUTE, seed=0, mesh=mesh)
        self._batch = jax.device_put(batch) if mesh is None else batch
        graph, trainable, frozen = split_model(model, TrainConfig())
        tx = make_optimizer(OptimizerConfig(), steps=100)
        self._state = init_state(tx, trainable, frozen)
        step: Any = make_train_step(graph, tx, ObjectiveConfig(name="next_token"), None)
        self._compiled: Any = step.lower(self._state, self._batch).compile()
        self.temporary = temporary_bytes(self._compiled)

    def seconds(self) -> float:
        """Takes the step, and says how long it took."""
        began = time.perf_counter()
        self._state, metrics = self._compiled(self._state, self._batch)
        jax.block_until_ready((self._state, metrics))
        return time.perf_counter() - began
