"""Decoders that end in one number: the reward head alone, without an unembedding.

Such a decoder is what transformers and servers call a sequence classifier with one label. A model
trained by bradley_terry becomes one by losing its unembedding. A judge becomes one too, as the
log-odds of its two labels are linear in the hidden state.
"""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gram_jax.mesh import weight_spec
from gram_jax.models.decoder import Decoder


def classifier(model: Decoder) -> Decoder:
    """The same model with its head, and without an unembedding."""
    twin = cast(Decoder, nnx.merge(*nnx.split(model)))
    if hasattr(twin, "unembedding"):
        del twin.unembedding
    twin.config = dataclasses.replace(model.config, has_unembedding=False)
    return twin


def judge_classifier(model: Decoder, labels: tuple[int, int]) -> Decoder:
    """A judge as a classifier: z_A - z_B = <h, W_A> - <h, W_B> = <h, W_A - W_B>.

    Args:
      model: a judge; its head, if there is one, gives way.
      labels: ids of the judge's labels, that of "the first is better" first.

    Returns:
      A classifier whose head, float32 [D], is the difference of the labels' rows of the
      unembedding. What it reads are judge prompts.
    """
    twin = cast(Decoder, nnx.merge(*nnx.split(model)))
    twin.head = nnx.Param(_difference(model.unembedding_vd(), labels))
    return classifier(twin)


def _difference(unembedding_vd: jax.Array, labels: tuple[int, int]) -> jax.Array:
    """W_A - W_B, float32 [D], whole on every device that holds a part of W."""
    sharding, rows, out = unembedding_vd.sharding, None, None
    if isinstance(sharding, NamedSharding):
        rows = NamedSharding(sharding.mesh, P(None, *weight_spec("D")))
        out = NamedSharding(sharding.mesh, P(None))

    def difference(weights: Any) -> Any:
        rows_ld = weights.at[jnp.array(labels)].get(out_sharding=rows).astype(jnp.float32)
        row_d = rows_ld[0] - rows_ld[1]
        return row_d if out is None else jax.reshard(row_d, out)

    return cast(jax.Array, jax.jit(difference)(unembedding_vd))
