"""Attention over rows in blocks of keys and queries, in plain XLA: what a CPU runs.

A query sees two ranges of keys (gram_jax/models/ranges.py), so each block of queries visits the
blocks of keys that hold them, with the softmax of what was visited so far, and no others. Scores
exist for one pair of blocks at a time and stay in the cache; nothing is of size [T, T].

The backward pass visits the same pairs again. With the log-sum-exp of each query kept,
p_ij = exp(s_ij - lse_i) is recomputed, and

    dv_j = sum_i p_ij do_i
    ds_ij = p_ij (do_i . v_j - do_i . o_i)
    dq_i = sum_j ds_ij k_j,  dk_j = sum_i ds_ij q_i

Letters beside the usual: N blocks of queries, Q queries in a block, G = H / K.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from gram_jax.mesh import per_device
from gram_jax.models.attention import FULL
from gram_jax.models.ranges import KeyRanges, Spans, key_blocks, key_ranges
from gram_jax.stripes import own_places, whole_rows

# Measured on CPU: the work in the cache's reach, and little of it ruled out by the mask.
_QUERIES = _KEYS = 64
_MASKED = -1e30
"""The score of a key that is not seen: finite, so that padding queries are."""


class BlockView(NamedTuple):
    """What each query of B rows sees, and which blocks hold it.

    A device's queries are padded to whole blocks, and so are the keys of a row.
    """

    ranges: KeyRanges
    spans: Spans


_VIEW_DIMS = "BT,BT,BT,BT,BN,BN,BN,BN"
_RANGES = len(KeyRanges._fields)


def block_view(
    segment_ids: jax.Array,
    branch_ids: jax.Array,
    positions: jax.Array,
    window: jax.Array | int | None = None,
) -> BlockView:
    """Prepares rows for `block_attention`, once for all layers of equal window.

    Args:
      segment_ids, branch_ids, positions: int32 [B, T].
      window: keys at positions above p - window are seen by a query at p; None = all.
    """

    def local(
        segment: jax.Array, branch: jax.Array, position: jax.Array, width: jax.Array
    ) -> tuple[jax.Array, ...]:
        whole = key_ranges(segment, branch, position, width)
        ranges = KeyRanges(*(_padded(own_places(x)) for x in whole))
        # Zeros are a query that sees key 0; those that are added see nothing.
        there = jnp.arange(ranges.place.shape[1]) < own_places(segment).shape[1]
        ranges = ranges._replace(place=jnp.where(there, ranges.place, -1))
        return *ranges, *key_blocks(ranges, _QUERIES, _KEYS)

    width = jnp.asarray(FULL if window is None else window, jnp.int32)
    make = per_device(local, f"BS,BS,BS,->{_VIEW_DIMS}")
    found = make(segment_ids, branch_ids, positions, width)
    return BlockView(KeyRanges(*found[:_RANGES]), Spans(*found[_RANGES:]))


def block_attention(
    q_bthe: jax.Array, k_bske: jax.Array, v_bske: jax.Array, view: BlockView
) -> jax.Array:
    """Attention by the row's mask rule; what ``attention`` with ``row_mask`` is the reference of.

    Args:
      q_bthe: [B, T, H, E]; k_bske, v_bske: [B, T, K, E], K divides H; one dtype.
      view: of `block_view`.

    Returns:
      [B, T, H, E] in the dtype of v. Padding queries are finite.
    """
    attend = per_device(_local, f"BTHE,BTKE,BTKE,{_VIEW_DIMS}->BTHE")
    return cast(jax.Array, attend(q_bthe, k_bske, v_bske, *view.ranges, *view.spans))


def _local(q: jax.Array, k: jax.Array, v: jax.Array, *view: jax.Array) -> jax.Array:
    b, t, h, e = q.shape
    heads = k.shape[2]
    k, v = whole_rows(k), whole_rows(v)
    q, k, v = (_padded(x) for x in (q / math.sqrt(e), k, v))
    n = q.shape[1] // _QUERIES
    # Queries of a block lie together, with all heads of their group: one product for the group.
    q_bnkgqe = q.reshape(b, n, _QUERIES, heads, h // heads, e).transpose(0, 1, 3, 4, 2, 5)
    k_bkse, v_bkse = k.swapaxes(1, 2), v.swapaxes(1, 2)
    mixed = jax.lax.map(lambda xs: _row(*xs), (q_bnkgqe, k_bkse, v_bkse, view))
    out = mixed.transpose(0, 1, 4, 2, 3, 5).reshape(b, n * _QUERIES, h, e)
    return out[:, :t]


@jax.custom_vjp
def _row(q_nkgqe: jax.Array, k_kse: jax.Array, v_kse: jax.Array, view: Any) -> jax.Array:
    return _forward(q_nkgqe, k_kse, v_kse, view)[0]


class _Block(NamedTuple):
    """One block of queries: what its queries see, and the blocks to visit."""

    ranges: KeyRanges  # [Q]
    spans: Spans  # scalars

    @property
    def visits(self) -> jax.Array:
        return self._first_size + self.spans.second_end - self.spans.second

    @property
    def _first_size(self) -> jax.Array:
        return jnp.maximum(self.spans.first_end - self.spans.first, 0)

    def key_block(self, visit: jax.Array) -> jax.Array:
        first, second = self.spans.first, self.spans.second
        size = self._first_size
        return jnp.where(visit < size, first + visit, second + visit - size)

    def seen(self, block: jax.Array) -> jax.Array:
        """[Q, keys of the block]."""
        place = block * _KEYS + jnp.arange(_KEYS)
        r = KeyRanges(*(x[:, None] for x in self.ranges))
        prefix = (place >= r.prefix_start) & (place < r.prefix_end)
        return prefix | ((place >= r.branch_start) & (place <= r.place))


def _blocks(view: tuple[jax.Array, ...]) -> _Block:
    """All blocks of a row, stacked."""
    ranges = KeyRanges(*(x.reshape(-1, _QUERIES) for x in view[:_RANGES]))
    return _Block(ranges, Spans(*view[_RANGES:]))


def _keys(x_kse: jax.Array, block: jax.Array) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x_kse, block * _KEYS, _KEYS, axis=1)


def _scores(q_kgqe: jax.Array, k_kse: jax.Array, block: _Block, number: jax.Array) -> jax.Array:
    """[K, G, Q, keys] float32, and _MASKED where a key is not seen."""
    scores = _product("kqe,kse->kqs", _grouped(q_kgqe), k_kse)
    scores = scores.reshape(*q_kgqe.shape[:3], -1)
    return jnp.where(block.seen(number), scores, _MASKED)


def _forward(q_nkgqe: jax.Array, k_kse: jax.Array, v_kse: jax.Array, view: Any) -> Any:
    def block(_: None, xs: tuple[jax.Array, _Block]) -> tuple[None, tuple[jax.Array, jax.Array]]:
        q_kgqe, this = xs
        shape = q_kgqe.shape

        def visit(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            top, total, mixed = carry
            number = this.key_block(i)
            scores = _scores(q_kgqe, _keys(k_kse, number), this, number)
            new_top = jnp.maximum(top, scores.max(axis=-1))
            p = jnp.exp(scores - new_top[..., None])
            old = jnp.exp(top - new_top)
            values = _product("kqs,kse->kqe", _grouped(p).astype(v_kse.dtype), _keys(v_kse, number))
            mixed = mixed * old[..., None] + values.reshape(shape)
            return new_top, total * old + p.sum(axis=-1), mixed

        start = (
            jnp.full(shape[:3], _MASKED, jnp.float32),
            jnp.zeros(shape[:3], jnp.float32),
            jnp.zeros(shape, jnp.float32),
        )
        top, total, mixed = jax.lax.fori_loop(0, this.visits, visit, start)
        # A query of a block of padding has visited nothing.
        total = jnp.maximum(total, 1e-30)
        return None, ((mixed / total[..., None]).astype(v_kse.dtype), top + jnp.log(total))

    _, (out, lse) = jax.lax.scan(block, None, (q_nkgqe, _blocks(view)))
    return out, (q_nkgqe, k_kse, v_kse, view, out, lse)


def _backward(saved: Any, d_out: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    q_nkgqe, k_kse, v_kse, view, out, lse_nkgq = saved
    delta_nkgq = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(axis=-1)

    def block(carry: Any, xs: Any) -> tuple[Any, jax.Array]:
        q_kgqe, do_kgqe, lse_kgq, delta_kgq, this = xs
        shape = q_kgqe.shape
        q_kqe, do_kqe = _grouped(q_kgqe), _grouped(do_kgqe)

        def visit(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            d_q, d_k, d_v = carry
            number = this.key_block(i)
            k, v = _keys(k_kse, number), _keys(v_kse, number)
            p = jnp.exp(_scores(q_kgqe, k, this, number) - lse_kgq[..., None])
            d_p = _product("kqe,kse->kqs", do_kqe, v).reshape(p.shape)
            d_s = _grouped((p * (d_p - delta_kgq[..., None])).astype(k.dtype))
            d_q += _product("kqs,kse->kqe", d_s, k)
            d_k = _add(d_k, _product("kqs,kqe->kse", d_s, q_kqe), number)
            d_v = _add(d_v, _product("kqs,kqe->kse", _grouped(p).astype(v.dtype), do_kqe), number)
            return d_q, d_k, d_v

        start = (jnp.zeros(q_kqe.shape, jnp.float32), *carry)
        d_q, *carry = jax.lax.fori_loop(0, this.visits, visit, start)
        return tuple(carry), d_q.reshape(shape).astype(q_nkgqe.dtype)

    zeros = (jnp.zeros(k_kse.shape, jnp.float32), jnp.zeros(v_kse.shape, jnp.float32))
    xs = (q_nkgqe, d_out, lse_nkgq, delta_nkgq, _blocks(view))
    (d_k, d_v), d_q = jax.lax.scan(block, zeros, xs)
    return d_q, d_k.astype(k_kse.dtype), d_v.astype(v_kse.dtype), None


_row.defvjp(_forward, _backward)


def _add(total_kse: jax.Array, part: jax.Array, block: jax.Array) -> jax.Array:
    """``total`` with ``part`` added to one block of keys."""
    return jax.lax.dynamic_update_slice_in_dim(
        total_kse, _keys(total_kse, block) + part, block * _KEYS, axis=1
    )


def _grouped(x_kgqs: jax.Array) -> jax.Array:
    """[K, G, Q, ...] -> [K, G Q, ...]."""
    return x_kgqs.reshape(x_kgqs.shape[0], -1, x_kgqs.shape[-1])


_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def _padded(x: jax.Array) -> jax.Array:
    """[B, T, ...] with zeros up to a whole number of blocks."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % _QUERIES), *((0, 0),) * (x.ndim - 2)))
