"""Weights that are added to a language model: the reward head, and LoRA's matrices.

LoRA (arXiv 2106.09685) puts two matrices A and B of a small rank r beside a frozen projection W,
which then gives x W + (alpha / r) (x A) B; they begin and are scaled as in PEFT. Training has them
apart; whatever is loaded to score, to export or to start from has them in W (`merged`).

A checkpoint's config says which of these weights its model has (`adapters_of`), so that a
model can be described before they are read.
"""

from __future__ import annotations

import dataclasses
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
    if not adapters.head and hasattr(twin, "head"):
        del twin.head
    head = adapters.head and not hasattr(twin, "head")
    new = _placed(lambda: _new_weights(model.config, head, adapters.lora, seed), like)
    for name, weight in new.items():
        setattr(twin if name in MODEL_DIMS else twin.stacks[0], name, nnx.Param(weight))
    if adapters.lora is not None:
        twin.stacks[0].lora_scale = adapters.lora.alpha / adapters.lora.rank
    return twin


def _new_weights(
    config: ModelConfig, head: bool, lora: Lora | None, seed: int
) -> dict[str, jax.Array]:
    """What a head and LoRA begin with, float32.

    The head is small, so that rewards start near 0. A is uniform within 1 / sqrt(inputs), which is
    He et al.'s with slope sqrt(5), as PEFT has it; B is zero, so that the model begins as it was.
    """
    # The decoder's own weights come from the key itself.
    head_key, lora_key = (jax.random.fold_in(jax.random.key(seed), i) for i in (1, 2))
    new: dict[str, jax.Array] = {}
    if head:
        noise = jax.random.normal(head_key, shape_of(MODEL_DIMS["head"], config), jnp.float32)
        new["head"] = config.initializer_range * noise
    if lora is None:
        return new
    for target, key in zip(
        lora.targets, jax.random.split(lora_key, len(lora.targets)), strict=True
    ):
        a, b = f"{target}_lora_a", f"{target}_lora_b"
        shape_a, shape_b = (shape_of("L" + BLOCK_DIMS[name], config, lora.rank) for name in (a, b))
        bound = 1 / math.sqrt(math.prod(shape_a[1:-1]))
        new[a] = jax.random.uniform(key, shape_a, jnp.float32, -bound, bound)
        new[b] = jnp.zeros(shape_b, jnp.float32)
    return new


def _placed(make: Callable[[], dict[str, jax.Array]], like: Any) -> dict[str, Any]:
    """New weights on the devices of ``like``, or their descriptions where that is one."""
    shapes, places = jax.eval_shape(make), {}
    for name in shapes:
        places[name] = like.sharding
        if isinstance(like.sharding, NamedSharding):
            dims = MODEL_DIMS[name] if name in MODEL_DIMS else "L" + BLOCK_DIMS[name]
            mesh = cast(jax.sharding.Mesh, like.sharding.mesh)
            places[name] = named(mesh, weight_spec(dims))
    if not isinstance(like, jax.ShapeDtypeStruct):
        return jax.jit(make, out_shardings=places)()
    return {
        name: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=places[name])
        for name, shape in shapes.items()
    }


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
