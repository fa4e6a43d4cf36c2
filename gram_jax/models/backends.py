"""Which attention computes a row: one function per backend, all equal to the reference.

xla     the reference (gram_jax/models/attention.py): scores of a whole row at once
blocks  blocks of keys that a block of queries sees (gram_jax/models/attention_blocks.py)
splash  splash attention, on TPU alone (gram_jax/models/attention_tpu.py)
flash   a kernel told each query's two ranges, on GPU alone (gram_jax/models/attention_gpu.py)
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from gram_jax.errors import UserError
from gram_jax.mesh import context_size, per_device, target_platform
from gram_jax.models.attention import FULL, attention, mask_bias, row_mask, window_mask
from gram_jax.models.attention_blocks import block_attention, block_view
from gram_jax.models.attention_gpu import flash_attention, flash_view
from gram_jax.models.attention_tpu import splash_attention, splash_view
from gram_jax.rows import Batch
from gram_jax.stripes import own_places, whole_rows

Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""(q [B, T, H, E], k and v [B, T, K, E]) -> [B, T, H, E]."""


def backend(name: str) -> str:
    """The backend that ``compute.attention`` names; auto is the fastest of the platform."""
    if name != "auto":
        return name
    return {"cpu": "blocks", "tpu": "splash"}.get(target_platform(), "xla")


def attention_of(batch: Batch, name: str) -> Callable[[jax.Array | None], Attend]:
    """Attention over B rows, for layers of one window: what depends on the rows is made once.

    Args:
      batch: rows.
      name: a backend.

    Returns:
      A function of a sliding window (None = a layer sees everything) that returns the attention
      of layers with that window.
    """
    segments, positions = batch.segment_ids, batch.positions
    if name == "splash":
        return lambda window: functools.partial(
            splash_attention, view=splash_view(segments, batch.branch_ids, positions, window)
        )
    branches = jnp.zeros_like(segments) if batch.branch_ids is None else batch.branch_ids
    if name == "blocks":
        return lambda window: functools.partial(
            block_attention, view=block_view(segments, branches, positions, window)
        )
    if name == "flash":
        if context_size() > 1:
            raise UserError(
                "compute.attention=flash does not split rows over devices: use xla or blocks, or"
                " a mesh with context=1"
            )
        return lambda window: functools.partial(
            flash_attention, view=flash_view(segments, branches, positions, window)
        )

    def reference(window: jax.Array | None) -> Attend:
        width = jnp.asarray(FULL if window is None else window, jnp.int32)
        bias = per_device(_bias, "BS,BS,BS,->BTS")(segments, branches, positions, width)
        attend = per_device(_attention, "BTHE,BTKE,BTKE,BTS->BTHE")
        return lambda q, k, v: attend(q, k, v, bias)

    return reference


def _bias(
    segments: jax.Array, branches: jax.Array, positions: jax.Array, window: jax.Array
) -> jax.Array:
    seen = row_mask(segments, branches, own_places) & window_mask(positions, window, own_places)
    return mask_bias(seen)


def _attention(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array) -> jax.Array:
    return attention(q, whole_rows(k), whole_rows(v), bias)
