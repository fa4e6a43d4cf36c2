"""Weights that are added to a language model: so far the reward head.

A checkpoint's config says which of them its model has (:func:`adapters_of`), so that a model can be
described before its weights are read.
"""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding

from gram_jax.config import READINGS, Config, ModelConfig
from gram_jax.mesh import named, weight_spec
from gram_jax.models.decoder import MODEL_DIMS, Decoder


@dataclasses.dataclass(frozen=True, slots=True)
class Adapters:
    """What is added to a decoder.

    Attributes:
      head: a vector [D] that turns a hidden state into a reward.
    """

    head: bool = False


def adapters_of(config: Config) -> Adapters:
    """What the model of a run has beside the language model."""
    return Adapters(head=READINGS[config.objective.name] == "head")


def attach(model: Decoder, adapters: Adapters, seed: int) -> Decoder:
    """The same model with what ``adapters`` says and nothing else; new weights lie as its own do.

    The description of a model (see ``abstract_decoder``) gets their descriptions. A head that is
    there already is kept, if one is wanted.
    """
    if adapters.head == hasattr(model, "head"):
        return model
    twin = cast(Decoder, nnx.merge(*nnx.split(model)))
    if not adapters.head:
        del twin.head
        return twin
    (old,) = jax.tree.leaves(model.norm)

    def make() -> jax.Array:
        return _new_head(model.config, jax.random.key(seed))

    sharding = old.sharding
    if isinstance(sharding, NamedSharding):
        sharding = named(cast(jax.sharding.Mesh, sharding.mesh), weight_spec(MODEL_DIMS["head"]))
    if isinstance(old, jax.ShapeDtypeStruct):
        shape = jax.eval_shape(make)
        head: Any = jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)
    else:
        head = jax.jit(make, out_shardings=sharding)()
    twin.head = nnx.Param(head)
    return twin


def _new_head(config: ModelConfig, key: jax.Array) -> jax.Array:
    """A head [D], small, so that rewards start near 0."""
    # The decoder's own weights come from the key itself.
    key = jax.random.fold_in(key, 1)
    return config.initializer_range * jax.random.normal(key, (config.hidden_size,), jnp.float32)
