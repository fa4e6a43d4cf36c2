"""Attention over rows on TPU: JAX's splash attention, told the row's mask rule.

Rows without branches (text) take its static causal mask and segment ids: nothing of size [T, T]
exists, and the upper triangle is skipped. Other rows, and layers with a sliding window, take its
dynamic mask: blocks that it rules out are skipped, the others are read and applied. Two static
calls, one for the prefix and one for the branch, would each compute the whole triangle: with many
candidates a prompt that is several times the products, and a second pass over the outputs.

The mask is cut into blocks once per batch (:func:`splash_view`) and shared by all heads and by the
layers of equal window.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as library
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel import (
    SplashAttentionKernel,
)
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo

from gram_jax.mesh import per_device
from gram_jax.models.attention import FULL, row_mask, window_mask

_BLOCK = 512
_LANES = 128


class SplashView(NamedTuple):
    """What the kernels need to know of B rows. The rest is None without branches and windows.

    A row is padded to a whole number N of blocks; a block has S places.
    """

    segment_ids: jax.Array  # [B, T] int32
    seen: jax.Array | None = None  # [B, N, N, S, S] bool (query block, key block, query, key)
    seen_turned: jax.Array | None = None  # [B, N, N, S, S]: the same with (key, query) last
    kind: jax.Array | None = None  # [B, N, N]: nothing of a block is seen (0), some (1), all (2)
    mask_next: jax.Array | None = None  # [B, N, N]: which block of ``seen`` to fetch
    key_next: jax.Array | None = None  # [B, N, N]: which block of keys to fetch
    query_next: jax.Array | None = None  # [B, N, N]: which block of queries to fetch


_DYNAMIC_DIMS = "BT,BNNSS,BNNSS,BNN,BNN,BNN,BNN"


def splash_view(
    segment_ids: jax.Array,
    branch_ids: jax.Array | None,
    positions: jax.Array,
    window: jax.Array | int | None = None,
) -> SplashView:
    """Prepares rows for :func:`splash_attention`; once per batch and window.

    Args:
      segment_ids, branch_ids, positions: int32 [B, T]; branch_ids is None where every segment is
        one run, as in text.
      window: keys at positions above p - window are seen by a query at position p; None = all.
    """
    if window is None and branch_ids is None:
        return SplashView(segment_ids)
    branches = jnp.zeros_like(segment_ids) if branch_ids is None else branch_ids
    width = jnp.asarray(FULL if window is None else window, jnp.int32)
    make = per_device(_dynamic_view, f"BT,BT,BT,->{_DYNAMIC_DIMS}")
    return SplashView(*make(segment_ids, branches, positions, width))


def splash_attention(
    q_bthe: jax.Array,
    k_bske: jax.Array,
    v_bske: jax.Array,
    view: SplashView,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Attention by the row's mask rule; what ``attention`` with ``row_mask`` is the reference of.

    Args:
      q_bthe: [B, T, H, E]; k_bske, v_bske: [B, T, K, E], K divides H; one dtype.
      view: of :func:`splash_view`.
      interpret: run the kernels as plain JAX, for tests without a TPU.

    Returns:
      [B, T, H, E] in the dtype of v. Padding queries are finite.
    """
    fields = [field for field in view if field is not None]
    dims = "BT" if len(fields) == 1 else _DYNAMIC_DIMS
    attend = per_device(
        functools.partial(_local, interpret=interpret), f"BTHE,BTKE,BTKE,{dims}->BTHE"
    )
    return cast(jax.Array, attend(q_bthe, k_bske, v_bske, *fields))


def _local(
    q_bthe: jax.Array, k_bske: jax.Array, v_bske: jax.Array, *fields: jax.Array, interpret: bool
) -> jax.Array:
    t, h, e = q_bthe.shape[1:]
    q, k, v = (_padded(x).swapaxes(1, 2) for x in (q_bthe / math.sqrt(e), k_bske, v_bske))
    view = SplashView(*fields)
    if view.seen is None:
        ids = _padded(view.segment_ids)
        kernel = library.make_splash_mha(
            library.MultiHeadMask([library.CausalMask((q.shape[2],) * 2)] * h),
            block_sizes=_block_sizes(t),
            head_shards=1,
            q_seq_shards=1,
            interpret=interpret,
        )
        mixed = jax.vmap(kernel)(q, k, v, library.SegmentIds(ids, ids))
    else:
        # The kernels are told by scalars which blocks to fetch, and those differ from row to row:
        # rows are taken in turn.
        row = functools.partial(_dynamic_row, sizes=_block_sizes(t), interpret=interpret)
        mixed = jax.lax.map(lambda xs: row(*xs), (q, k, v, view))
    return mixed.swapaxes(1, 2)[:, :t]


def _dynamic_row(
    q_hte: jax.Array,
    k_kse: jax.Array,
    v_kse: jax.Array,
    view: SplashView,
    *,
    sizes: library.BlockSizes,
    interpret: bool,
) -> jax.Array:
    def info(following: jax.Array | None, seen: jax.Array | None) -> MaskInfo:
        # One mask for all heads: a leading axis of one.
        fetched: Any = (following, view.mask_next, view.kind, seen)  # its types say numpy
        first, second, third, fourth = (None if x is None else x[None] for x in fetched)
        return MaskInfo(first, second, third, fourth, q_sequence=None, is_dynamic_mask=True)

    by_query = info(view.key_next, view.seen)
    kernel = SplashAttentionKernel(
        by_query,
        by_query,
        info(view.query_next, view.seen_turned),
        block_sizes=sizes,
        is_mqa=False,
        save_residuals=False,
        mask_value=_MASKED,
        attn_logits_soft_cap=None,
        residual_checkpoint_name=None,
        mask_function=None,
        interpret=interpret,
    )
    return cast(jax.Array, kernel(q_hte, k_kse, v_kse))


_MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)
"""The score of a key that is not seen: finite, and far below any score."""


def _dynamic_view(
    segment_ids: jax.Array, branch_ids: jax.Array, positions: jax.Array, window: jax.Array
) -> tuple[jax.Array, ...]:
    s, p = _padded(segment_ids), _padded(positions)
    mask = row_mask(s, _padded(branch_ids)) & window_mask(p, window)
    # Splash divides by the sum over the keys of blocks it visits: a query of padding, which sees
    # none, is given its own key.
    mask |= jnp.eye(s.shape[1], dtype=bool) & (s == 0)[:, :, None]
    b, t = s.shape
    size = _block(segment_ids.shape[1])
    n = t // size
    seen = mask.reshape(b, n, size, n, size).swapaxes(2, 3)
    some, every = seen.any(axis=(3, 4)), seen.all(axis=(3, 4))
    kind = some.astype(jnp.int8) + every
    number = jnp.arange(n, dtype=jnp.int32)
    # Where nothing is fetched the index stays, so that the pipeline has nothing to copy.
    mask_next = jnp.where(kind == 1, number[:, None] * n + number, 0)
    key_next, query_next = jnp.where(some, number, 0), jnp.where(some, number[:, None], 0)
    return segment_ids, seen, seen.swapaxes(3, 4), kind, mask_next, key_next, query_next


def _block(t: int) -> int:
    """Places in a block, for rows of T tokens."""
    return min(_BLOCK, -(-t // _LANES) * _LANES)


def _block_sizes(t: int) -> library.BlockSizes:
    size = _block(t)
    return library.BlockSizes(
        block_q=size,
        block_kv=size,
        block_q_dkv=size,
        block_kv_dkv=size,
        block_q_dq=size,
        block_kv_dq=size,
    )


def _padded(x: jax.Array) -> jax.Array:
    """[B, T, ...] with zeros up to a whole number of blocks."""
    t = x.shape[1]
    return jnp.pad(x, ((0, 0), (0, -t % _block(t)), *((0, 0),) * (x.ndim - 2)))
