"""Weights that are added to a language model: the reward head, and LoRA's matrices.

LoRA (arXiv 2106.09685) puts two matrices A and B of a small rank r beside a frozen projection W,
which then gives x W + (alpha / r) (x A) B; they begin and are scaled as in PEFT. Training has them
apart; whatever is loaded to score, to export or to start from has them in W (:func:`merged`).

A checkpoint's config says which of these weights its model has (:func:`adapters_of`), so that a
model can be described before they are read.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding

from gram_jax.config import READINGS, Config, ModelConfig
from gram_jax.mesh import named, weight_spec
from gram_jax.models.decoder import BLOCK_DIMS, MODEL_DIMS, Block, Decoder, is_lora, shape_of


@dataclasses.dataclass(frozen=True, slots=True)
class Lora:
    """LoRA's matrices: their rank r, their weight alpha / r, and the projections they go beside."""

    rank: int
    alpha: float
    targets: tuple[str, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Adapters:
    """What is added to a decoder.

    Attributes:
      head: a vector [D] that turns a hidden state into a reward.
      lora: matrices beside projections; None = no LoRA.
    """

    head: bool = False
    lora: Lora | None = None


def adapters_of(config: Config) -> Adapters:
    """What the model of a run has beside the language model."""
    t = config.train
    lora = Lora(t.lora_rank, t.lora_alpha, t.lora_targets) if t.lora_rank else None
    return Adapters(head=READINGS[config.objective.name] == "head", lora=lora)


def attach(model: Decoder, adapters: Adapters, seed: int) -> Decoder:
    """The same model with what ``adapters`` says and nothing else; new weights lie as its own do.

    The description of a model (see ``abstract_decoder``) gets their descriptions. A head that is
    there already is kept, if one is wanted. LoRA's matrices are always new.
    """
    twin = cast(Decoder, nnx.merge(*nnx.split(model)))
    (like,) = jax.tree.leaves(model.norm)
    # The decoder's own weights come from the key itself.
    head_key, lora_key = (jax.random.fold_in(jax.random.key(seed), i) for i in (1, 2))
    if not adapters.head and hasattr(twin, "head"):
        del twin.head
    if adapters.head and not hasattr(twin, "head"):
        twin.head = _placed(lambda: _new_head(model.config, head_key), MODEL_DIMS["head"], like)
    if adapters.lora is not None:
        (stack,) = twin.stacks
        _attach_lora(stack, model.config, adapters.lora, lora_key, like)
    return twin


def _attach_lora(stack: Block, config: ModelConfig, lora: Lora, key: jax.Array, like: Any) -> None:
    """A uniform within 1 / sqrt(inputs), B zero, so that the model begins as it was."""
    stack.lora_scale = lora.alpha / lora.rank
    for name, target_key in zip(
        lora.targets, jax.random.split(key, len(lora.targets)), strict=True
    ):
        a, b = f"{name}_lora_a", f"{name}_lora_b"
        shapes = {n: shape_of("L" + BLOCK_DIMS[n], config, lora.rank) for n in (a, b)}
        # He et al.'s uniform with slope sqrt(5), as PEFT begins: sqrt(6 / ((1 + 5) inputs)).
        bound = 1 / math.sqrt(math.prod(shapes[a][1:-1]))
        uniform = functools.partial(
            jax.random.uniform, target_key, shapes[a], minval=-bound, maxval=bound
        )
        setattr(stack, a, _placed(uniform, "L" + BLOCK_DIMS[a], like))
        zeros = functools.partial(jnp.zeros, shapes[b])
        setattr(stack, b, _placed(zeros, "L" + BLOCK_DIMS[b], like))


def _placed(make: Callable[[], jax.Array], dims: str, like: Any) -> nnx.Param:
    """A new weight on the devices of ``like``, or its description where that is one."""
    sharding = like.sharding
    if isinstance(sharding, NamedSharding):
        sharding = named(cast(jax.sharding.Mesh, sharding.mesh), weight_spec(dims))
    if isinstance(like, jax.ShapeDtypeStruct):
        shape = jax.eval_shape(make)
        return nnx.Param(jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding))
    return nnx.Param(jax.jit(make, out_shardings=sharding)())


def _new_head(config: ModelConfig, key: jax.Array) -> jax.Array:
    """A head [D], small, so that rewards start near 0."""
    return config.initializer_range * jax.random.normal(key, (config.hidden_size,), jnp.float32)


def merged(model: Decoder) -> Decoder:
    """The model without LoRA's matrices, which go into the weights: W + (alpha / r) A B.

    In float32, then in the dtype of W. The weights of the model given are used up: the new ones
    take their memory.
    """
    graph, lora, plain = nnx.split(model, lambda path, _: is_lora(str(path[-1])), ...)
    if not jax.tree.leaves(lora):
        return model

    def merge(plain: Any, lora: Any) -> Decoder:
        twin = cast(Decoder, nnx.merge(graph, lora, plain))
        for stack in twin.stacks:
            _merge_stack(stack)
        return twin

    return cast(Decoder, jax.jit(merge, donate_argnums=0)(plain, lora))


def _merge_stack(stack: Block) -> None:
    for a in [name for name in vars(stack) if name.endswith("_lora_a")]:
        name = a.removesuffix("_lora_a")
        b = f"{name}_lora_b"
        weight, dims = getattr(stack, name), BLOCK_DIMS[name]
        product = jnp.einsum(
            f"L{BLOCK_DIMS[a]},L{BLOCK_DIMS[b]}->L{dims}",
            getattr(stack, a)[...].astype(jnp.float32),
            getattr(stack, b)[...].astype(jnp.float32),
            precision=jax.lax.Precision.HIGHEST,
        )
        whole = weight[...].astype(jnp.float32) + stack.lora_scale * product
        setattr(stack, name, nnx.Param(whole.astype(weight[...].dtype)))
        delattr(stack, a)
        delattr(stack, b)
    if "lora_scale" in vars(stack):
        del stack.lora_scale
