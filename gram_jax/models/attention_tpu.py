"""Attention over rows on TPU: JAX's splash attention, told the row's mask rule.

Rows without branches (text) take its static causal mask and segment ids: nothing of size [T, T]
exists, and the upper triangle is skipped. Other rows, and layers with a sliding window, take its
dynamic mask: blocks that it rules out are skipped, the others are read and applied. Two static
calls, one for the prefix and one for the branch, would each compute the whole triangle: with many
candidates a prompt that is several times the products, and a second pass over the outputs.

The mask is cut into blocks once per batch (`splash_view`) and shared by all heads and by the
layers of equal window.

Where a row is split over devices (gram_jax/stripes.py), each has the mask of its own queries and
all keys. What is added to a device's queries to make whole blocks are copies of its last one, which
sees its own key: with nothing to see, a query would not be finite.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention as library
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel import (
    SplashAttentionKernel,
)
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo

from gram_jax.mesh import context_size, per_device
from gram_jax.models.attention import FULL, row_mask, window_mask
from gram_jax.stripes import own_places, places, whole_rows

_BLOCK = 512
_LANES = 128


class SplashView(NamedTuple):
    """What the kernels need to know of B rows. The rest is None without branches and windows.

    A device's queries are padded to N blocks of Q places, and the keys of a row to J blocks of X.
    """

    segment_ids: jax.Array  # [B, S] int32, of whole rows
    seen: jax.Array | None = None  # [B, N, J, Q, X] bool
    seen_turned: jax.Array | None = None  # [B, N, J, X, Q]: the same
    kind: jax.Array | None = None  # [B, N, J]: nothing of a block is seen (0), some (1), all (2)
    mask_next: jax.Array | None = None  # [B, N, J]: which block of ``seen`` to fetch
    key_next: jax.Array | None = None  # [B, N, J]: which block of keys to fetch
    query_next: jax.Array | None = None  # [B, N, J]: which block of queries to fetch


_DYNAMIC_DIMS = "BS,BNJQX,BNJXQ,BNJ,BNJ,BNJ,BNJ"


def splash_view(
    segment_ids: jax.Array,
    branch_ids: jax.Array | None,
    positions: jax.Array,
    window: jax.Array | int | None = None,
) -> SplashView:
    """Prepares rows for `splash_attention`; once per batch and window.

    Args:
      segment_ids, branch_ids, positions: int32 [B, T]; branch_ids is None where every segment is
        one run, as in text.
      window: keys at positions above p - window are seen by a query at position p; None = all.
    """
    if window is None and branch_ids is None:
        return SplashView(segment_ids)
    branches = jnp.zeros_like(segment_ids) if branch_ids is None else branch_ids
    width = jnp.asarray(FULL if window is None else window, jnp.int32)
    make = per_device(_dynamic_view, f"BS,BS,BS,->{_DYNAMIC_DIMS}")
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
      view: of `splash_view`.
      interpret: run the kernels as plain JAX, for tests without a TPU.

    Returns:
      [B, T, H, E] in the dtype of v. Padding queries are finite.
    """
    fields = [field for field in view if field is not None]
    dims = "BS" if len(fields) == 1 else _DYNAMIC_DIMS
    attend = per_device(
        functools.partial(_local, interpret=interpret), f"BTHE,BTKE,BTKE,{dims}->BTHE"
    )
    return cast(jax.Array, attend(q_bthe, k_bske, v_bske, *fields))


def _local(
    q_bthe: jax.Array, k_bske: jax.Array, v_bske: jax.Array, *fields: jax.Array, interpret: bool
) -> jax.Array:
    (t, h, e), view = q_bthe.shape[1:], SplashView(*fields)
    s = view.segment_ids.shape[1]
    q = _padded(q_bthe / math.sqrt(e)).swapaxes(1, 2)
    k, v = (_padded(whole_rows(x)).swapaxes(1, 2) for x in (k_bske, v_bske))
    if view.seen is None:
        kernel = _causal_kernel(t, s, h, interpret)
        ids = library.SegmentIds(_queries(view.segment_ids, s), _padded(view.segment_ids))
        mixed = cast(jax.Array, jax.vmap(kernel)(q, k, v, ids))
    else:
        # The kernels are told by scalars which blocks to fetch, and those differ from row to row:
        # rows are taken in turn.
        row = functools.partial(_dynamic_row, sizes=_block_sizes(t, s), interpret=interpret)
        mixed = jax.lax.map(lambda xs: row(*xs), (q, k, v, view))
    return mixed.swapaxes(1, 2)[:, :t]


def _causal_kernel(t: int, s: int, heads: int, interpret: bool) -> SplashAttentionKernel:
    """Of this device's T queries of a row of S places; blocks above the diagonal are skipped."""
    shards = s // t
    place = _padded(places(s, shards), np.pad, mode="edge").reshape(-1)
    mask = library.CausalMask((place.size, -(-s // _block(s)) * _block(s)))
    mask.q_sequence = place
    kernel = library.make_splash_mha(
        library.MultiHeadMask([mask] * heads),
        block_sizes=_block_sizes(t, s),
        head_shards=1,
        q_seq_shards=shards,
        interpret=interpret,
    )
    if shards == 1:
        return cast(SplashAttentionKernel, kernel)
    mine = jax.lax.axis_index("context")

    def share(x: jax.Array | None, axis: int) -> Any:  # its types say numpy
        if x is None:
            return None
        size = x.shape[axis] // shards
        return jax.lax.dynamic_slice_in_dim(x, mine * size, size, axis)

    infos = (
        info._replace(
            data_next=share(info.data_next, 1),
            block_mask=share(info.block_mask, 1),
            q_sequence=share(info.q_sequence, 0),
        )
        for info in (kernel.fwd_mask_info, kernel.dq_mask_info, kernel.dkv_mask_info)
    )
    return SplashAttentionKernel(*infos, **kernel.kwargs)


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
    t = segment_ids.shape[1]
    queries = functools.partial(_queries, s=t)
    s, p = _padded(segment_ids), _padded(positions)
    mask = row_mask(s, _padded(branch_ids), queries) & window_mask(p, window, queries)
    # Splash divides by the sum over the keys of blocks it visits: a query of padding, which sees
    # none, is given its own key.
    place = jnp.broadcast_to(jnp.arange(s.shape[1]), s.shape)
    own = queries(place)[:, :, None] == place[:, None, :]
    mask |= own & (queries(s) == 0)[:, :, None]
    b, keys = s.shape
    size_q, size_k = _block(t // context_size()), _block(t)
    n, j = mask.shape[1] // size_q, keys // size_k
    seen = mask.reshape(b, n, size_q, j, size_k).swapaxes(2, 3)
    some, every = seen.any(axis=(3, 4)), seen.all(axis=(3, 4))
    kind = some.astype(jnp.int8) + every
    query = jnp.arange(n, dtype=jnp.int32)[:, None]
    key = jnp.arange(j, dtype=jnp.int32)
    # Where nothing is fetched the index stays, so that the pipeline has nothing to copy.
    mask_next = jnp.where(kind == 1, query * j + key, 0)
    key_next, query_next = jnp.where(some, key, 0), jnp.where(some, query, 0)
    return segment_ids, seen, seen.swapaxes(3, 4), kind, mask_next, key_next, query_next


def _block(t: int) -> int:
    """Places in a block, for rows of T tokens."""
    return min(_BLOCK, -(-t // _LANES) * _LANES)


def _block_sizes(t: int, s: int) -> library.BlockSizes:
    """For T queries and S keys."""
    queries, keys = _block(t), _block(s)
    return library.BlockSizes(
        block_q=queries,
        block_kv=keys,
        block_q_dkv=queries,
        block_kv_dkv=keys,
        block_q_dq=queries,
        block_kv_dq=keys,
    )


def _padded(x: Any, pad: Any = jnp.pad, **how: str) -> Any:
    """[B, T, ...] with zeros, or as ``how`` says, up to a whole number of blocks."""
    t = x.shape[1]
    return pad(x, ((0, 0), (0, -t % _block(t)), *((0, 0),) * (x.ndim - 2)), **how)


def _queries(x_bs: jax.Array, s: int) -> Any:
    """What belongs to this device's queries, of rows of S places, padded or not."""
    return _padded(own_places(x_bs[:, :s]), mode="edge")
