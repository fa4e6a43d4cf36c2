"""Attention over a row, and its rotary positions.

This is the plain XLA path: the reference that every faster backend is tested against.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from gram_jax.config import ModelConfig, RopeScaling

FULL = np.iinfo(np.int32).max
"""The window of a layer that sees everything."""


def _all(x: jax.Array) -> jax.Array:
    return x


def row_mask(
    segment_ids: jax.Array,
    branch_ids: jax.Array,
    queries: Callable[[jax.Array], jax.Array] = _all,
) -> jax.Array:
    """Which keys each query may see, [B, T, S] bool (query, key), windows apart.

    Query i sees key j iff j <= i, both lie in the same segment (not padding), and j is in the
    shared prefix or in i's own branch.

    Args:
      segment_ids, branch_ids: int32 [B, S], of whole rows.
      queries: takes the queries' places, [B, T], out of such an array; by default all.
    """
    place = jnp.broadcast_to(jnp.arange(segment_ids.shape[1]), segment_ids.shape)
    causal = queries(place)[:, :, None] >= place[:, None, :]
    query_s, key_s = queries(segment_ids)[:, :, None], segment_ids[:, None, :]
    query_b, key_b = queries(branch_ids)[:, :, None], branch_ids[:, None, :]
    same_segment = (query_s == key_s) & (query_s != 0)
    return causal & same_segment & ((key_b == 0) | (key_b == query_b))


def mask_bias(mask_bts: jax.Array) -> jax.Array:
    """What is added to scores: 0 where a key is seen, a large negative number where it is not.

    Finite, because a padding query sees no key and must stay finite. A row's scores take this
    once for all heads and layers, which on CPU is three times faster than selecting in each.
    """
    return jnp.where(mask_bts, 0.0, -1e30).astype(jnp.float32)


def window_mask(
    positions_bs: jax.Array, window: jax.Array, queries: Callable[[jax.Array], jax.Array] = _all
) -> jax.Array:
    """Keys within a sliding window, [B, T, S] bool: at positions above p - window for a query at p.

    Positions, not places in the row, so a branch sees the end of the prefix that it continues.
    ``queries`` as in `row_mask`.
    """
    return queries(positions_bs)[:, :, None] - positions_bs[:, None, :] < window


def attention(
    q_bthe: jax.Array, k_bske: jax.Array, v_bske: jax.Array, bias_bts: jax.Array
) -> jax.Array:
    """Grouped-query attention with an additive bias; scores and softmax are float32.

    Returns:
      [B, T, H, E] in the dtype of v.
    """
    b, t, h, e = q_bthe.shape
    k = k_bske.shape[2]
    q_bkgte = q_bthe.reshape(b, t, k, h // k, e).transpose(0, 2, 3, 1, 4)
    k_bkse, v_bkse = k_bske.transpose(0, 2, 1, 3), v_bske.transpose(0, 2, 1, 3)
    scores_bkgts = jnp.einsum(
        "bkgte,bkse->bkgts", q_bkgte, k_bkse, preferred_element_type=jnp.float32
    )
    scores_bkgts = scores_bkgts * (1 / math.sqrt(e)) + bias_bts[:, None, None]
    top = jax.lax.stop_gradient(scores_bkgts.max(axis=-1, keepdims=True))
    p_bkgts = jnp.exp(scores_bkgts - top)
    total = p_bkgts.sum(axis=-1, keepdims=True)
    # Dividing after the product costs E numbers a query instead of T.
    mixed_bkgte = jnp.einsum(
        "bkgts,bkse->bkgte",
        p_bkgts.astype(v_bske.dtype),
        v_bkse,
        preferred_element_type=jnp.float32,
    )
    mixed_bkgte = (mixed_bkgte / total).astype(v_bske.dtype)
    return mixed_bkgte.transpose(0, 3, 1, 2, 4).reshape(b, t, h, e)


def rope_frequencies(config: ModelConfig) -> tuple[np.ndarray, float]:
    """Angular frequencies [E/2] in radians per position, and the scale of cos and sin.

    The rules are those of transformers' ``modeling_rope_utils`` (default, linear, llama3, yarn).
    """
    e, scaling = config.head_dim, config.rope_scaling
    base = 1.0 / config.rope_theta ** (np.arange(0, e, 2, dtype=np.float64) / e)
    if scaling.kind == "linear":
        return base / scaling.factor, 1.0
    if scaling.kind == "llama3":
        return _llama3(base, scaling), 1.0
    if scaling.kind == "yarn":
        attention_factor = scaling.attention_factor or (
            0.1 * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0
        )
        return _yarn(base, scaling, config), attention_factor
    return base, 1.0


def _llama3(base: np.ndarray, s: RopeScaling) -> np.ndarray:
    wavelength = 2 * np.pi / base
    # 0 where the wavelength is long (stretched), 1 where it is short (kept), linear between.
    kept = (s.original_max_position / wavelength - s.low_freq_factor) / (
        s.high_freq_factor - s.low_freq_factor
    )
    kept = np.clip(kept, 0, 1)
    return (1 - kept) * base / s.factor + kept * base


def _yarn(base: np.ndarray, s: RopeScaling, config: ModelConfig) -> np.ndarray:
    def dimension(rotations: float) -> float:
        """The dimension that turns so many times over the original context."""
        turns = s.original_max_position / (rotations * 2 * math.pi)
        return config.head_dim * math.log(turns) / (2 * math.log(config.rope_theta))

    low = max(math.floor(dimension(s.beta_fast)), 0)
    high = min(math.ceil(dimension(s.beta_slow)), config.head_dim - 1)
    ramp = np.clip((np.arange(len(base)) - low) / max(high - low, 0.001), 0, 1)
    return base / s.factor * ramp + base * (1 - ramp)


def rope_tables(config: ModelConfig, positions_bt: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin of the rotary angles, float32 [B, T, 1, E/2]."""
    frequencies, scale = rope_frequencies(config)
    angles = positions_bt[:, :, None, None].astype(jnp.float32) * frequencies.astype(np.float32)
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def rotate(x_bthe: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates dimension i with dimension i + E/2, as Hugging Face checkpoints are laid out."""
    first, second = jnp.split(x_bthe.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1)
    return turned.astype(x_bthe.dtype)
