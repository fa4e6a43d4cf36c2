"""gram_jax's side: the paths that its commands take, with their defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks import peak, workloads
from gram_jax.checkpoints import load_model
from gram_jax.config import (
    ComputeConfig,
    DataConfig,
    MeshConfig,
    ObjectiveConfig,
    OptimizerConfig,
    TrainConfig,
)
from gram_jax.data.examples import Layout, row_shape
from gram_jax.mesh import ROWS, make_mesh
from gram_jax.packing import PackCounts, pack
from gram_jax.pair import Pair
from gram_jax.readouts import Readout
from gram_jax.rows import Example, stack_rows
from gram_jax.scorer import Question, RewardSettings, Scorer
from gram_jax.text_packing import pack_texts
from gram_jax.training import init_state, make_optimizer, make_train_step, split_model

Found = tuple[list[float], dict[str, Any]]

_COMPILING = (
    "/jax/core/compile/jaxpr_trace_duration",
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "/jax/core/compile/backend_compile_duration",
)


class _Ours:
    """What all of them share: compile time, and the peak."""

    def __init__(self) -> None:
        self.compile_seconds = 0.0
        jax.monitoring.register_event_duration_secs_listener(self._count)

    def _count(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event in _COMPILING:
            self.compile_seconds += duration_secs

    def peak(self, size: int) -> Found:
        """Measures the peak with XLA, in float32 and in bfloat16."""
        return [peak_of_products(size), peak_of_products(size, jnp.bfloat16)], {}


def peak_of_products(size: int, dtype: Any = jnp.float32) -> float:
    """FLOP/s of matrix products by XLA."""
    left, right = jax.random.normal(jax.random.key(0), (2, size, size)).astype(dtype)

    @jax.jit
    def products(x: Any) -> Any:
        for _ in range(peak.PRODUCTS):
            x = x @ right / size
        return x

    return peak.measure(lambda: products(left).block_until_ready(), size)


class Scoring(_Ours):
    """Answers questions by `Scorer`, texts in and numbers out."""

    def __init__(self, *, model: str, questions: str, reading: str):
        super().__init__()
        self._scorer = Scorer(load_model(model, ComputeConfig()), RewardSettings(reading=reading))
        pairs = [(0, 1)] if reading == "judge" else []
        self._questions = [
            Question(one.prompt, one.responses, pairs) for one in workloads.load(Path(questions))
        ]

    def warm_up(self) -> Found:
        """Compiles all that a run needs."""
        return self.run()

    def run(self) -> Found:
        """Scores all questions: the log-prob of each response, or both orders of a judge."""
        engine, packed = self._scorer.engine, self._scorer.packed
        places, tokens = engine.places, packed.tokens
        numbers = []
        for verdict in self._scorer.score(self._questions):
            if verdict.rewards is not None:
                numbers += verdict.rewards.tolist()
            else:
                assert verdict.forward is not None and verdict.backward is not None
                numbers += [*verdict.forward.tolist(), *verdict.backward.tolist()]
        places, tokens = engine.places - places, packed.tokens - tokens
        settings = self._scorer.settings
        return numbers, {
            "places": places,
            "padding": 1 - tokens / places,
            "row_length": settings.row_length,
            "batch_rows": settings.batch_rows,
        }


class Training(_Ours):
    """Train steps of a stage, on one batch of packed rows."""

    def __init__(
        self,
        *,
        model: str,
        sequences: list[list[Any]],
        row_length: int,
        learning_rate: float,
        objective: dict[str, Any],
    ):
        """Args: sequences: of each example (prompt ids, response ids, ...); two are a pair."""
        super().__init__()
        config = ObjectiveConfig(**objective)
        self._mesh = make_mesh(MeshConfig())
        examples = [
            Example(
                np.asarray(prompt, np.int32),
                tuple(np.asarray(response, np.int32) for response in responses),
                pairs=(Pair(0, 1),) if len(responses) > 1 else (),
                key=key,
            )
            for key, (prompt, *responses) in enumerate(sequences)
        ]
        is_text = config.name == "next_token"
        layout = Layout("text" if is_text else "likelihood", targets=True)
        data = DataConfig(row_length=row_length) if row_length else DataConfig()
        shape, counts = row_shape(data, layout), PackCounts()
        packed = (pack_texts if is_text else pack)(examples, shape, counts=counts)
        rows = [row.batch for row in packed]
        self._facts = {
            "places": counts.places,
            "padding": counts.padding,
            "row_length": shape.tokens,
            "batch_rows": len(rows),
        }
        one_part = jax.tree.map(lambda x: x[None], stack_rows(rows))
        self._batch = jax.device_put(one_part, NamedSharding(self._mesh, PartitionSpec(None, ROWS)))
        optimizer = OptimizerConfig(learning_rate=learning_rate, schedule="constant", warmup=0.0)
        tx = make_optimizer(optimizer, steps=100)
        with jax.set_mesh(self._mesh):
            loaded = load_model(model, ComputeConfig(), self._mesh)
            graph, trainable, frozen = split_model(loaded.model, TrainConfig())
            self._state = init_state(tx, trainable, frozen)
        readout = None if is_text else Readout("likelihood", shape.sequences)
        self._step = make_train_step(graph, tx, config, readout)

    def warm_up(self) -> Found:
        """Compiles, and takes the first step: its loss and gradient norm."""
        metrics = self._take_step()
        return [metrics["loss"], metrics["grad_norm"]], self._facts

    def run(self) -> Found:
        """Takes a step: its loss."""
        return [self._take_step()["loss"]], self._facts

    def _take_step(self) -> dict[str, float]:
        with jax.set_mesh(self._mesh):
            self._state, metrics = self._step(self._state, self._batch)
        jax.block_until_ready(self._state)
        return {name: float(value) for name, value in metrics.items()}
