"""The train step and its state: one for both stages.

``train_step(state, batch) -> (state, metrics)`` is pure and donates its state. What differs between
pretraining and fine-tuning is the batch and the objective, nothing here.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from gram_jax.config import ModelConfig, ObjectiveConfig, OptimizerConfig, TrainConfig
from gram_jax.errors import UserError
from gram_jax.models.decoder import Decoder, is_lora, is_matrix, weight_dims, weight_name
from gram_jax.objectives import Metrics, objective
from gram_jax.readouts import Readout
from gram_jax.rows import Batch

COUNTS = ("tokens", "pairs")
"""Metrics that are counts of a step; all others are divided by the loss's denominator."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
    """All that a step changes, and the frozen weights it reads."""

    step: Any  # int32 scalar: optimiser steps done
    trainable: Any  # nnx.State
    frozen: Any  # nnx.State; empty where all weights are trained
    opt_state: Any


def split_model(model: Decoder, train: TrainConfig) -> tuple[Any, Any, Any]:
    """(structure, trainable, frozen), as ``last_blocks``, ``head_only`` or ``lora_rank`` say.

    By default all is trained. LoRA's matrices are those that the model was given by ``attach``.

    Raises:
      UserError: the model has no ``last_blocks`` blocks to train.
    """
    depth, last_blocks = model.config.num_layers, train.last_blocks
    if last_blocks > depth:
        raise UserError(f"train.last_blocks={last_blocks}, but the model has {depth} blocks")
    if train.head_only or train.lora_rank:

        def is_added(path: tuple[Any, ...], _: Any) -> bool:
            return path[0] == "head" or is_lora(str(path[-1]))

        return cast(tuple[Any, Any, Any], nnx.split(model, is_added, ...))
    if last_blocks == 0:
        graph, trainable = nnx.split(model)
        return graph, trainable, nnx.State({})
    stack = 0
    if last_blocks < depth:
        # On shapes alone as well, where a state is described before it is restored.
        shapes_only = isinstance(jax.tree.leaves(model)[0], jax.ShapeDtypeStruct)
        run = jax.jit(lambda m: m.split_stacks(last_blocks))
        model, stack = model.split_stacks(last_blocks) if shapes_only else run(model), 1

    def is_trainable(path: tuple[Any, ...], _: Any) -> bool:
        return path[0] in ("norm", "head") or path[:2] == ("stacks", stack)

    return cast(tuple[Any, Any, Any], nnx.split(model, is_trainable, ...))


def merge_model(graph: Any, trainable: Any, frozen: Any) -> Decoder:
    """The inverse of `split_model` (blocks stay in two stacks where they were split)."""
    return cast(Decoder, nnx.merge(graph, trainable, frozen))


def learning_rate(config: OptimizerConfig, steps: int) -> Callable[[Any], Any]:
    """The schedule over ``steps`` optimiser steps: a linear warm-up, then as configured."""
    peak, warmup = config.learning_rate, round(config.warmup * steps)
    end = config.final * peak
    up = optax.linear_schedule(0.0, peak, max(warmup, 1))
    if config.schedule == "constant":
        return cast(Any, optax.join_schedules([up, optax.constant_schedule(peak)], [warmup]))
    if config.schedule == "cosine":
        down = optax.cosine_decay_schedule(peak, max(steps - warmup, 1), alpha=config.final)
        return cast(Any, optax.join_schedules([up, down], [warmup]))
    decay = round(config.decay * steps)
    flat, down = optax.constant_schedule(peak), optax.linear_schedule(peak, end, max(decay, 1))
    return cast(Any, optax.join_schedules([up, flat, down], [warmup, steps - decay]))


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clipping by the global norm, then AdamW with decay on matrices only."""

    def decays(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: is_matrix(weight_dims(path)), params
        )

    adamw = optax.adamw(
        learning_rate(config, steps),
        b1=config.beta1,
        b2=config.beta2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=decays,
    )
    return optax.chain(optax.clip_by_global_norm(config.clip), adamw) if config.clip else adamw


def init_state(tx: optax.GradientTransformation, trainable: Any, frozen: Any) -> TrainState:
    """A fresh state; moments are created in the shards of the weights they belong to."""
    return TrainState(jnp.zeros((), jnp.int32), trainable, frozen, jax.jit(tx.init)(trainable))


def make_train_step(
    graph: Any, tx: optax.GradientTransformation, config: ObjectiveConfig, readout: Readout | None
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The jitted step over a batch of shape [parts, rows, ...].

    Gradients, losses and denominators are summed over the parts and divided once, so the result
    does not depend on how many parts there are.
    """

    def loss(trainable: Any, frozen: Any, part: Batch) -> Any:
        return objective(merge_model(graph, trainable, frozen), part, config, readout)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        def sums(part: Batch) -> Any:
            (_, extra), grads = jax.value_and_grad(loss, has_aux=True)(
                state.trainable, state.frozen, part
            )
            return grads, extra

        grads, (denominator, metrics) = _sum_over_parts(sums, batch)
        denominator = jnp.maximum(denominator, 1e-9)
        grads = jax.tree.map(lambda g: g / denominator, grads)
        updates, opt_state = tx.update(grads, state.opt_state, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        metrics = divide(metrics, denominator)
        metrics["grad_norm"] = optax.global_norm(grads)
        return TrainState(state.step + 1, trainable, state.frozen, opt_state), metrics

    return jax.jit(train_step, donate_argnums=0)


def make_eval_step(
    graph: Any, config: ObjectiveConfig, readout: Readout | None
) -> Callable[[TrainState, Batch], Any]:
    """The jitted (denominator, metric sums) of a batch of shape [parts, rows, ...], no gradient."""

    def eval_step(state: TrainState, batch: Batch) -> Any:
        model = merge_model(graph, state.trainable, state.frozen)
        return _sum_over_parts(lambda part: objective(model, part, config, readout)[1], batch)

    return jax.jit(eval_step)


def divide(metrics: Metrics, denominator: Any) -> Metrics:
    """Sums over their denominator; counts as they are."""
    return {k: v if k in COUNTS else v / denominator for k, v in metrics.items()}


def _sum_over_parts(function: Callable[[Batch], Any], batch: Batch) -> Any:
    """Sum of ``function(part)`` over the leading axis, one part's intermediates at a time."""
    first = function(jax.tree.map(lambda x: x[0], batch))
    if batch.tokens.shape[0] == 1:
        return first

    def add(total: Any, part: Batch) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, function(part)), None

    return jax.lax.scan(add, first, jax.tree.map(lambda x: x[1:], batch))[0]


def flops_per_token(
    model: ModelConfig, train: TrainConfig, context: int, targets_per_token: float
) -> float:
    """FLOPs of a training step per token; see ``ModelConfig.flops_per_token``.

    A product's backward pass is two more of its size: one for the gradient of its input, one for
    that of its weight. Frozen weights save the latter, and below the first trained block there is
    no backward pass. LoRA's own products, and what is computed twice (remat), are not counted.
    """
    forward = model.flops_per_token(context, targets_per_token=targets_per_token)
    if train.head_only:
        return forward
    blocks = model.flops_per_token(context, targets_per_token=0)
    unembedding = forward - blocks
    if train.lora_rank:
        weights = model.flops_per_token(0, targets_per_token=0)
        return forward + weights + 2 * (blocks - weights) + unembedding
    if k := train.last_blocks:
        last = dataclasses.replace(model, num_layers=k, windows=model.windows[-k:])
        return forward + 2 * last.flops_per_token(context, targets_per_token=0) + unembedding
    return 3 * forward


def trainable_names(trainable: Any) -> list[str]:
    """Names of the trained weights, for a log line."""
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(trainable)[0]]
    return sorted({weight_name(path) for path in paths})


@functools.cache
def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of one chip, None where it is not known.

    Sources: Google Cloud's TPU system architecture pages; NVIDIA's data sheets (without sparsity).
    """
    table = {
        "TPU v4": 275e12,
        "TPU v5 lite": 197e12,
        "TPU v5e": 197e12,
        "TPU v5": 459e12,
        "TPU v5p": 459e12,
        "TPU v6 lite": 918e12,
        "TPU v6e": 918e12,
        "A100": 312e12,
        "H100": 989e12,
        "H200": 989e12,
    }
    if device_kind in table:
        return table[device_kind]
    return next((v for k, v in table.items() if k in device_kind and "TPU" not in k), None)
