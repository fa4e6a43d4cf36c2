"""Where the time of a pretraining step goes: parts computed by themselves, beside the whole.

  python -m benchmarks.parts [--data=FOLDER] [--small]

The step of `benchmarks.pretraining`: 8 rows of 512 tokens, 56M parameters, float32. Attention and
the loss are computed forward and backward on arrays of the step's shapes, and the optimiser on
gradients. What is left of the step are the layers but for their attention: products with weights,
and norms, rotations and activations between them. There is no peer; the share of the peak is as in
`benchmarks.pretraining`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import needed, workloads
from benchmarks.command import Setting, finish, is_small, setting
from benchmarks.harness import say
from benchmarks.ours import peak_of_products
from benchmarks.pretraining import LENGTH, ROWS
from benchmarks.results import Case, Timing
from benchmarks.step_memory import COMPUTE
from benchmarks.steps import TrainingStep
from gram_jax import entry
from gram_jax.config import ModelConfig, OptimizerConfig, TrainConfig
from gram_jax.logprobs import next_token_loss
from gram_jax.models.backends import attention_of, backend
from gram_jax.models.decoder import init_decoder
from gram_jax.packing import PackCounts
from gram_jax.rows import Batch, Example, RowShape, stack_rows
from gram_jax.text_packing import pack_texts
from gram_jax.training import make_optimizer, split_model


def main(_: list[str]) -> None:
    """Measures, prints and writes."""
    rows, length = (2, 32) if is_small() else (ROWS, LENGTH)
    with setting("56M") as s:
        batch = _text(s, rows, length)
        flops_per_second = peak_of_products(s.peak_size)
        one_part = jax.tree.map(lambda x: x[None], batch)
        parts = _parts(s.config, batch)
        step = TrainingStep(s.config, one_part)
        runs = {"the step": (step.seconds, _step_flops(s.config, rows, length))} | parts
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for repetition in range(s.repetitions + 1):  # the first is a warm-up
            for name, (run, _flops) in runs.items():
                took = run()
                if repetition:
                    seconds[name].append(took)
            say(f"  {repetition}/{s.repetitions}")
    whole = seconds["the step"]
    rest = [took - sum(seconds[name][i] for name in parts) for i, took in enumerate(whole)]
    timings = [
        _timing(name, seconds[name], flops, flops_per_second) for name, (_, flops) in runs.items()
    ]
    of_parts = sum(flops for _, flops in parts.values())
    left = _step_flops(s.config, rows, length) - of_parts
    timings.append(_timing("the rest of the layers", rest, left, flops_per_second))
    case = Case(
        name="56M", what=f"a step on {rows} x {length} tokens", timings=timings, difference=None,
        targets=[],
    )  # fmt: skip
    finish("parts", {"XLA": flops_per_second}, [case])


def _timing(name: str, seconds: list[float], flops: float, at_most: float) -> Timing:
    return Timing(
        side=name, seconds=seconds, work=1, unit="steps", compile_seconds=0.0, warm_up_seconds=0.0,
        facts={}, flops=flops, peak=at_most,
    )  # fmt: skip


def _text(s: Setting, rows: int, length: int) -> Batch:
    """Rows of one document each."""
    examples = [
        Example(np.array(ids[:1], np.int32), (np.array(ids[1:], np.int32),), key=key)
        for key, ids in enumerate(workloads.rows_of_text(s.data, s.tokenizer, rows, length + 1))
    ]
    packed = pack_texts(examples, RowShape(length, length), counts=PackCounts())
    return jax.device_put(stack_rows([row.batch for row in packed]))


def _step_flops(config: ModelConfig, rows: int, length: int) -> float:
    return needed.BACKWARD * needed.once_a_prompt(config, [(0, [length])] * rows, "all")


def _parts(config: ModelConfig, batch: Batch) -> dict[str, tuple[Callable[[], float], float]]:
    """By name: (computes it and returns seconds, FLOPs in a step)."""
    rows, length = batch.tokens.shape
    layers, d, e = config.num_layers, config.hidden_size, config.head_dim
    forward = {
        "attention": layers * 4 * config.num_heads * e * length / 2,
        "unembedding and loss": 2.0 * d * config.vocab_size,
    }
    flops = {name: needed.BACKWARD * rows * length * value for name, value in forward.items()}
    key = jax.random.key(0)

    def normal(*shape: int) -> jax.Array:
        return jax.random.normal(key, shape, jnp.float32)

    heads = [(config.num_heads, e), (config.num_kv_heads, e), (config.num_kv_heads, e)]
    attend = attention_of(batch, backend(COMPUTE.attention))(None)
    hidden, table = normal(rows, length, d), normal(config.vocab_size, d) / d**0.5

    def loss(hidden: jax.Array, table: jax.Array) -> jax.Array:
        assert batch.targets is not None and batch.weights is not None
        return next_token_loss(hidden, table, batch.targets, batch.weights)[0]

    return {
        "attention": (
            _both_ways(
                attend,
                [normal(rows, length, *one) for one in heads],
                normal(rows, length, *heads[0]),
                layers,
            ),
            flops["attention"],
        ),
        "unembedding and loss": (
            _timed(jax.jit(jax.value_and_grad(loss, argnums=(0, 1))), (hidden, table)),
            flops["unembedding and loss"],
        ),
        "clipping and AdamW": (_optimiser(config), 0.0),
    }


def _both_ways(function: Any, arguments: Any, cotangent: Any, times: int) -> Callable[[], float]:
    """Times ``function`` with its backward pass, so often in a row, in memory used again."""

    def once(first: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        result, back = jax.vjp(function, first, *arguments[1:])
        of_first, *others = back(cotangent)
        # Each depends on the one before, and on all that is computed.
        return first + 1e-6 * of_first, sum((x.sum() for x in (result, *others)), jnp.zeros(()))

    @jax.jit
    def run(first: jax.Array) -> Any:
        last, sums = jax.lax.scan(once, first, None, length=times)
        return last.sum(), sums

    return _timed(run, arguments[:1])


def _optimiser(config: ModelConfig) -> Callable[[], float]:
    _, trainable, _ = split_model(init_decoder(config, COMPUTE, seed=0), TrainConfig())
    tx = make_optimizer(OptimizerConfig(), steps=100)

    @jax.jit
    def run(parameters: Any, state: Any) -> Any:
        changes, state = tx.update(parameters, state, parameters)  # as gradients they will do
        return optax.apply_updates(parameters, changes), state

    return _timed(run, (trainable, jax.jit(tx.init)(trainable)))


def _timed(run: Any, arguments: Any) -> Callable[[], float]:
    def seconds() -> float:
        began = time.perf_counter()
        jax.block_until_ready(run(*arguments))
        return time.perf_counter() - began

    return seconds


if __name__ == "__main__":
    entry.run(main, one_process=True)
