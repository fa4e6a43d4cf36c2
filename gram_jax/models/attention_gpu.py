"""Attention over rows on GPU: a flash attention kernel that is told each query's two key ranges.

A Pallas kernel (Triton). A block of queries visits the blocks of keys that one of them sees
(gram_jax/models/ranges.py) and no others, so a branch costs nothing to its siblings, and the mask
is worked out from three integers a query. The backward pass is FlashAttention-2's
(arXiv:2307.08691): with P = exp(S - lse), delta = sum(O * dO),

    dV = P^T dO,    dS = P * (dO V^T - delta),    dQ = dS K / sqrt(E),    dK = dS^T Q / sqrt(E)

in two kernels: one over blocks of keys for dK and dV, which adds up the query heads of a group, and
one over blocks of queries for dQ. Nothing is added atomically, so that results repeat.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from gram_jax.mesh import per_device
from gram_jax.models.attention import FULL
from gram_jax.models.ranges import key_blocks, key_ranges, query_blocks

# Places in a block of queries and of keys: forward, and backward where more is held at once.
_FORWARD = (128, 64)
_BACKWARD = (64, 64)
_LARGEST = max(*_FORWARD, *_BACKWARD)
_LOG2_E = math.log2(math.e)
_MASKED = -1e30  # finite: a query may meet a block of which it sees nothing before any other


class FlashView(NamedTuple):
    """What the kernels need to know of B rows of T places, padded to whole blocks; all int32."""

    ranges: jax.Array  # [B, 3, T]: of each query, see ranges.KeyRanges; its place is its index
    forward: jax.Array  # [B, 4, blocks]: key blocks of each query block, see ranges.Spans
    backward: jax.Array  # [B, 4, blocks]: the same with the backward pass' block sizes
    turned: jax.Array  # [B, 2, blocks]: query blocks of each key block, [first, end)


_VIEW_DIMS = "BRS,BRJ,BRJ,BRJ"


def flash_view(
    segment_ids: jax.Array,
    branch_ids: jax.Array,
    positions: jax.Array,
    window: jax.Array | int | None = None,
) -> FlashView:
    """Prepares rows for `flash_attention`; once per batch and window.

    Args:
      segment_ids, branch_ids, positions: int32 [B, T].
      window: keys at positions above p - window are seen by a query at position p; None = all.
    """
    width = jnp.asarray(FULL if window is None else window, jnp.int32)
    make = per_device(_view, f"BS,BS,BS,->{_VIEW_DIMS}")
    return FlashView(*make(segment_ids, branch_ids, positions, width))


def flash_attention(
    q_bthe: jax.Array,
    k_bske: jax.Array,
    v_bske: jax.Array,
    view: FlashView,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Attention by the row's mask rule; what ``attention`` with ``row_mask`` is the reference of.

    Scores, softmax and sums are float32; products are taken in the dtype of the arrays.

    Args:
      q_bthe: [B, T, H, E]; k_bske, v_bske: [B, T, K, E], K divides H; one dtype.
      view: of `flash_view`.
      interpret: run the kernels as plain JAX, for tests without a GPU.

    Returns:
      [B, T, H, E] in the dtype of v; zero for padding queries.
    """
    attend = per_device(
        functools.partial(_local, interpret=interpret), f"BTHE,BTKE,BTKE,{_VIEW_DIMS}->BTHE"
    )
    return cast(jax.Array, attend(q_bthe, k_bske, v_bske, *view))


def _view(
    segment_ids: jax.Array, branch_ids: jax.Array, positions: jax.Array, window: jax.Array
) -> tuple[jax.Array, ...]:
    t = segment_ids.shape[1]
    segment, branch, position = (
        jnp.pad(x, ((0, 0), (0, -t % _LARGEST))) for x in (segment_ids, branch_ids, positions)
    )
    ranges = key_ranges(segment, branch, position, window)
    queries, keys = _BACKWARD
    return (
        jnp.stack(ranges[:3], axis=1),
        jnp.stack(key_blocks(ranges, *_FORWARD), axis=1),
        jnp.stack(key_blocks(ranges, *_BACKWARD), axis=1),
        jnp.stack(query_blocks(segment, branch, keys, queries), axis=1),
    )


def _local(q: jax.Array, k: jax.Array, v: jax.Array, *view: jax.Array, interpret: bool) -> Any:
    """On one device: heads before places, E and T padded to what the kernels take."""
    t, e = q.shape[1], q.shape[3]
    places = view[0].shape[-1]
    width = max(16, pl.next_power_of_2(e))
    pads = ((0, 0), (0, 0), (0, places - t), (0, width - e))
    q, k, v = (jnp.pad(x.swapaxes(1, 2), pads) for x in (q, k, v))
    mixed = _flash(q, k, v, FlashView(*view), 1 / math.sqrt(e), interpret)
    return mixed[:, :, :t, :e].swapaxes(1, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _flash(
    q: jax.Array, k: jax.Array, v: jax.Array, view: FlashView, scale: float, interpret: bool
) -> jax.Array:
    return _forward(q, k, v, view, scale, interpret)[0]


def _forward(
    q: jax.Array, k: jax.Array, v: jax.Array, view: FlashView, scale: float, interpret: bool
) -> tuple[jax.Array, Any]:
    b, h, t, e = q.shape
    group, (queries, keys) = h // k.shape[1], _FORWARD
    some_q = pl.BlockSpec((None, None, queries, e), lambda i, j, n: (n, j, i, 0))
    all_kv = pl.BlockSpec((None, None, t, e), lambda i, j, n: (n, j // group, 0, 0))
    out, lse = pl.pallas_call(
        functools.partial(_forward_kernel, scale=scale, keys=keys),
        grid=(t // queries, h, b),
        in_specs=[some_q, all_kv, all_kv, *_of_row(view.ranges, view.forward)],
        out_specs=[some_q, pl.BlockSpec((None, None, queries), lambda i, j, n: (n, j, i))],
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, v.dtype),
            jax.ShapeDtypeStruct((b, h, t), jnp.float32),
        ],
        compiler_params=_compiler_params(e),
        interpret=interpret,
        name="row_attention_forward",
    )(q, k, v, view.ranges, view.forward)
    return out, (q, k, v, view, out, lse)


def _backward(
    scale: float, interpret: bool, saved: Any, d_out: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    q, k, v, view, out, lse = saved
    b, h, t, e = q.shape
    kv_heads, (queries, keys) = k.shape[1], _BACKWARD
    group = h // kv_heads
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1)
    call = functools.partial(
        pl.pallas_call, compiler_params=_compiler_params(e), interpret=interpret
    )

    all_q = pl.BlockSpec((None, group, t, e), lambda i, j, n: (n, j, 0, 0))
    all_sums = pl.BlockSpec((None, group, t), lambda i, j, n: (n, j, 0))
    some_kv = pl.BlockSpec((None, None, keys, e), lambda i, j, n: (n, j, i, 0))
    d_k, d_v = call(
        functools.partial(_keys_kernel, scale=scale, queries=queries),
        grid=(t // keys, kv_heads, b),
        in_specs=[
            *(all_q, some_kv, some_kv, all_q, all_sums, all_sums),
            *_of_row(view.ranges, view.turned),
        ],
        out_specs=[some_kv, some_kv],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k, v)],
        name="row_attention_backward_keys",
    )(q, k, v, d_out, lse, delta, view.ranges, view.turned)

    some_q = pl.BlockSpec((None, None, queries, e), lambda i, j, n: (n, j, i, 0))
    some_sums = pl.BlockSpec((None, None, queries), lambda i, j, n: (n, j, i))
    all_kv = pl.BlockSpec((None, None, t, e), lambda i, j, n: (n, j // group, 0, 0))
    d_q = call(
        functools.partial(_queries_kernel, scale=scale, keys=keys),
        grid=(t // queries, h, b),
        in_specs=[
            *(some_q, all_kv, all_kv, some_q, some_sums, some_sums),
            *_of_row(view.ranges, view.backward),
        ],
        out_specs=some_q,
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        name="row_attention_backward_queries",
    )(q, k, v, d_out, lse, delta, view.ranges, view.backward)
    return d_q, d_k, d_v, None


_flash.defvjp(_forward, _backward)


def _of_row(*arrays: jax.Array) -> list[pl.BlockSpec]:
    """All integers of a row, of which a kernel loads those that it needs."""
    return [pl.BlockSpec((None, *x.shape[1:]), lambda i, j, n: (n, 0, 0)) for x in arrays]


def _compiler_params(width: int) -> Any:
    return plgpu.CompilerParams(num_warps=4 if width <= 64 else 8, num_stages=2)


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """A product with float32 sums; float32 numbers are not rounded to TF32."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot(a, b, precision=precision, preferred_element_type=jnp.float32)


def _seen(ranges_ref: Any, first_query: Any, queries: int, first_key: Any, keys: int) -> jax.Array:
    """Which of a block of queries sees which of a block of keys, [queries, keys] bool."""
    query = first_query + jnp.arange(queries, dtype=jnp.int32)
    key = (first_key + jnp.arange(keys, dtype=jnp.int32))[None, :]
    start, end, own = (ranges_ref[n, pl.ds(first_query, queries)][:, None] for n in range(3))
    return ((key >= start) & (key < end)) | ((key >= own) & (key <= query[:, None]))


def _visit(spans_ref: Any, step: Any, carry: Any) -> Any:
    """``step(block, carry)`` for the blocks of the two spans of this program."""
    i = pl.program_id(0)
    for n in (0, 2):
        carry = jax.lax.fori_loop(spans_ref[n, i], spans_ref[n + 1, i], step, carry)
    return carry


def _forward_kernel(
    q_ref: Any,  # [queries, E]
    k_ref: Any,  # [T, E]
    v_ref: Any,  # [T, E]
    ranges_ref: Any,  # [3, T]
    spans_ref: Any,  # [4, blocks]
    out_ref: Any,  # [queries, E]
    lse_ref: Any,  # [queries]: log2 of the sum of exponentials
    *,
    scale: float,
    keys: int,
) -> None:
    queries, e = q_ref.shape
    first_query = pl.program_id(0) * queries
    q = q_ref[...]

    def step(block: Any, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        mixed, top, total = carry
        place = pl.ds(block * keys, keys)
        seen = _seen(ranges_ref, first_query, queries, block * keys, keys)
        scores = jnp.where(seen, _dot(q, k_ref[place, :].T) * (scale * _LOG2_E), _MASKED)
        new_top = jnp.maximum(top, scores.max(axis=1))
        # A query that has seen nothing yet has top = _MASKED, whose difference is not small.
        p = jnp.where(seen, jnp.exp2(scores - new_top[:, None]), 0.0)
        shrink = jnp.exp2(top - new_top)
        v = v_ref[place, :]
        mixed = mixed * shrink[:, None] + _dot(p.astype(v.dtype), v)
        return mixed, new_top, total * shrink + p.sum(axis=1)

    start = (
        jnp.zeros((queries, e), jnp.float32),
        jnp.full((queries,), _MASKED, jnp.float32),
        jnp.zeros((queries,), jnp.float32),
    )
    mixed, top, total = _visit(spans_ref, step, start)
    total = jnp.where(total == 0.0, 1.0, total)  # a query of padding
    out_ref[...] = (mixed / total[:, None]).astype(out_ref.dtype)
    lse_ref[...] = top + jnp.log2(total)


def _keys_kernel(
    q_ref: Any,  # [group, T, E]
    k_ref: Any,  # [keys, E]
    v_ref: Any,  # [keys, E]
    d_out_ref: Any,  # [group, T, E]
    lse_ref: Any,  # [group, T]
    delta_ref: Any,  # [group, T]
    ranges_ref: Any,  # [3, T]
    spans_ref: Any,  # [2, blocks]
    d_k_ref: Any,  # [keys, E]
    d_v_ref: Any,  # [keys, E]
    *,
    scale: float,
    queries: int,
) -> None:
    keys, e = k_ref.shape
    i = pl.program_id(0)
    k, v = k_ref[...], v_ref[...]
    first, end = spans_ref[0, i], spans_ref[1, i]

    def head(g: Any, sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        def step(block: Any, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            d_k, d_v = carry
            place = pl.ds(block * queries, queries)
            q, d_out = q_ref[g, place, :], d_out_ref[g, place, :]
            seen = _seen(ranges_ref, block * queries, queries, i * keys, keys)
            scores = _dot(q, k.T) * (scale * _LOG2_E) - lse_ref[g, place][:, None]
            p = jnp.where(seen, jnp.exp2(scores), 0.0)
            d_v += _dot(p.astype(d_out.dtype).T, d_out)
            d_s = p * (_dot(d_out, v.T) - delta_ref[g, place][:, None]) * scale
            return d_k + _dot(d_s.astype(q.dtype).T, q), d_v

        return cast(tuple[jax.Array, jax.Array], jax.lax.fori_loop(first, end, step, sums))

    zero = jnp.zeros((keys, e), jnp.float32)
    d_k, d_v = jax.lax.fori_loop(0, q_ref.shape[0], head, (zero, zero))
    d_k_ref[...] = d_k.astype(d_k_ref.dtype)
    d_v_ref[...] = d_v.astype(d_v_ref.dtype)


def _queries_kernel(
    q_ref: Any,  # [queries, E]
    k_ref: Any,  # [T, E]
    v_ref: Any,  # [T, E]
    d_out_ref: Any,  # [queries, E]
    lse_ref: Any,  # [queries]
    delta_ref: Any,  # [queries]
    ranges_ref: Any,  # [3, T]
    spans_ref: Any,  # [4, blocks]
    d_q_ref: Any,  # [queries, E]
    *,
    scale: float,
    keys: int,
) -> None:
    queries, e = q_ref.shape
    first_query = pl.program_id(0) * queries
    q, d_out = q_ref[...], d_out_ref[...]
    lse, delta = lse_ref[...][:, None], delta_ref[...][:, None]

    def step(block: Any, d_q: jax.Array) -> jax.Array:
        place = pl.ds(block * keys, keys)
        k, v = k_ref[place, :], v_ref[place, :]
        seen = _seen(ranges_ref, first_query, queries, block * keys, keys)
        p = jnp.where(seen, jnp.exp2(_dot(q, k.T) * (scale * _LOG2_E) - lse), 0.0)
        d_s = p * (_dot(d_out, v.T) - delta) * scale
        return d_q + _dot(d_s.astype(k.dtype), k)

    d_q = _visit(spans_ref, step, jnp.zeros((queries, e), jnp.float32))
    d_q_ref[...] = d_q.astype(d_q_ref.dtype)
