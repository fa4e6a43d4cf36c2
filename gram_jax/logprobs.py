"""The primitive: log-probs of target tokens from hidden states, without a [B, T, V] array.

Logits exist for one chunk of targets at a time, in float32, forward and backward. On a mesh the
unembedding stays split over ``tensor``, and targets over ``context``; what the devices need of each
other is exchanged once, after the loop over chunks. Each of forward and backward is one
``shard_map``, inside one ``custom_vjp``.

A gradient that depends on the log-probs, such as that of a ranking loss, needs the logits a second
time. Where the loss is a weighted sum of them, `next_token_loss` takes its gradient in the
same pass: one product of the size of the logits less.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from gram_jax.mesh import ROWS, activation_spec, gathered, target_platform

# Float32 logits alive on one device. On CPU they had better stay in the cache: measured.
_CHUNK_BYTES = 64 * 2**20
_CHUNK_BYTES_CPU = 4 * 2**20
_LEAST_TARGETS = 256  # fewer than this at once make thin, slow matrix products


def target_logprobs(
    hidden: jax.Array, unembedding: jax.Array, targets: jax.Array, *, chunk: int = 0
) -> jax.Array:
    """log softmax(hidden @ unembedding^T)[targets].

    Args:
      hidden: [B, M, D] hidden states at the places that predict the targets; on a mesh, M divides
        by ``context``.
      unembedding: [V, D].
      targets: [B, M] int32 ids in [0, V).
      chunk: targets per row whose logits exist at once; 0 = chosen from the sizes.

    Returns:
      float32 [B, M].
    """
    return target_logprobs_and_logz(hidden, unembedding, targets, chunk=chunk)[0]


def target_logprobs_and_logz(
    hidden: jax.Array, unembedding: jax.Array, targets: jax.Array, *, chunk: int = 0
) -> tuple[jax.Array, jax.Array]:
    """As `target_logprobs`, and log sum_v exp(logit_v), float32 [B, M]."""
    return read_targets(hidden, unembedding, targets, chunk=chunk)[:2]


def read_targets(
    hidden: jax.Array, unembedding: jax.Array, targets: jax.Array, *, chunk: int = 0
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `target_logprobs_and_logz`, and whether no token is likelier, bool [B, M]."""
    unembedding, chunk = _prepared(unembedding, targets, chunk)
    return _primitive(hidden, unembedding, targets, chunk)


def next_token_loss(
    hidden: jax.Array,
    unembedding: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    z_loss: float = 0.0,
    chunk: int = 0,
) -> tuple[jax.Array, jax.Array]:
    """(sum of w (-log p + z logz^2), sum of w (-log p)) over the targets.

    The same as `next_token_sums` of `target_logprobs_and_logz`, with the gradient
    taken in the forward pass: d logit_v = w ((1 + 2 z logz) p_v - 1[v = target]). Only the first
    sum has a gradient, in ``hidden`` and ``unembedding``.

    On a mesh that splits the vocabulary p is known only after the devices have told each other, so
    there the logits are computed twice rather than waiting in every chunk.

    Args:
      hidden, unembedding, targets, chunk: see `target_logprobs_and_logz`.
      weights: float32 [B, M]; 0 = an unused slot, whose other numbers mean nothing.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.shape["tensor"] > 1:
        tokens = target_logprobs_and_logz(hidden, unembedding, targets, chunk=chunk)
        return next_token_sums(*tokens, weights, z_loss)
    # Zeros, so that what an unused slot holds (NaN, even) is not multiplied by its weight.
    hidden = jnp.where((weights != 0)[..., None], hidden, 0)
    unembedding, chunk = _prepared(unembedding, targets, chunk)
    return _fused(hidden, unembedding, targets, weights, z_loss, chunk)


def next_token_sums(
    logprob_bm: jax.Array, logz_bm: jax.Array, weights_bm: jax.Array, z_loss: float = 0.0
) -> tuple[jax.Array, jax.Array]:
    """(sum of w (-log p + z logz^2), sum of w (-log p)) over target tokens, from [B, M] each."""
    used = weights_bm != 0
    # where, not a product: an unused slot's number means nothing. Before the square as well, whose
    # slope at a NaN is NaN.
    nll = jnp.where(used, -weights_bm * logprob_bm, 0.0).sum()
    if not z_loss:
        return nll, nll
    logz_bm = jnp.where(used, logz_bm, 0.0)
    return nll + z_loss * (weights_bm * jnp.square(logz_bm)).sum(), nll


def _prepared(unembedding: jax.Array, targets: jax.Array, chunk: int) -> tuple[jax.Array, int]:
    """The unembedding with D whole, and how many targets of a row are computed at once."""
    mesh = jax.sharding.get_abstract_mesh()
    unembedding = gathered(unembedding, "VD")
    (rows, m), vocabulary = targets.shape, unembedding.shape[0]
    if not mesh.empty:
        rows //= mesh.shape["data"] * mesh.shape["fsdp"]
        m //= mesh.shape["context"]
        vocabulary //= mesh.shape["tensor"]
    if chunk == 0:
        budget = _CHUNK_BYTES_CPU if target_platform() == "cpu" else _CHUNK_BYTES
        chunk = max(1, _LEAST_TARGETS // rows, budget // (4 * rows * vocabulary))
    steps = -(-m // min(chunk, m))
    return unembedding, -(-m // steps)


def reference_logprobs(
    hidden: jax.Array, unembedding: jax.Array, targets: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The same numbers the plain way, with all logits: what the primitive is tested against."""
    logits = jnp.einsum(
        "bmd,vd->bmv",
        hidden.astype(jnp.float32),
        unembedding.astype(jnp.float32),
        precision="highest",
    )
    logz = jax.nn.logsumexp(logits, axis=-1)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return picked - logz, logz


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _primitive(
    hidden: jax.Array, unembedding: jax.Array, targets: jax.Array, chunk: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    return _forward(hidden, unembedding, targets, chunk)[0]


def _forward(
    hidden: jax.Array, unembedding: jax.Array, targets: jax.Array, chunk: int
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], Any]:
    run = _per_device(_forward_local, "BMD,VD,BM->BM,BM,BM", chunk)
    logprob, logz, likeliest = run(hidden, unembedding, targets)
    return (logprob, logz, likeliest), (hidden, unembedding, targets, logz)


def _backward(chunk: int, saved: Any, cotangents: Any) -> tuple[jax.Array, jax.Array, None]:
    hidden, unembedding, targets, logz = saved
    run = _per_device(_backward_local, "BMD,VD,BM,BM,BM,BM->BMD,VD", chunk)
    d_logprob, d_logz, _ = cotangents  # a bool has none
    d_hidden, d_unembedding = run(hidden, unembedding, targets, logz, d_logprob, d_logz)
    return d_hidden, d_unembedding, None


_primitive.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _fused(
    hidden: jax.Array,
    unembedding: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    z_loss: float,
    chunk: int,
) -> tuple[jax.Array, jax.Array]:
    logprob, logz, _ = _primitive(hidden, unembedding, targets, chunk)
    return next_token_sums(logprob, logz, weights, z_loss)


def _fused_forward(
    hidden: jax.Array,
    unembedding: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    z_loss: float,
    chunk: int,
) -> tuple[tuple[jax.Array, jax.Array], Any]:
    run = _per_device(_fused_local, "BMD,VD,BM,BM->BM,BM,BMD,VD", chunk, z_loss=z_loss)
    logprob, logz, d_hidden, d_unembedding = run(hidden, unembedding, targets, weights)
    return next_token_sums(logprob, logz, weights, z_loss), (d_hidden, d_unembedding)


def _fused_backward(
    z_loss: float, chunk: int, saved: Any, cotangents: Any
) -> tuple[jax.Array, jax.Array, None, None]:
    d_hidden, d_unembedding = saved
    d_total, _ = cotangents
    return (
        (d_total * d_hidden).astype(d_hidden.dtype),
        (d_total * d_unembedding).astype(d_unembedding.dtype),
        None,
        None,
    )


_fused.defvjp(_fused_forward, _fused_backward)


def _per_device(local: Any, signature: str, chunk: int, **settings: Any) -> Any:
    """``local`` on each device's share of the arrays; on whole arrays without a mesh."""
    local = functools.partial(local, chunk=chunk, **settings)
    if jax.sharding.get_abstract_mesh().empty:
        return functools.partial(local, distributed=False)
    inputs, outputs = (
        tuple(activation_spec(dims) for dims in side.split(",")) for side in signature.split("->")
    )
    return jax.shard_map(
        functools.partial(local, distributed=True), in_specs=inputs, out_specs=outputs
    )


def _chunks(x: jax.Array, chunk: int) -> jax.Array:
    """[B, M, ...] -> [M / chunk, B, chunk, ...]; the last chunk is filled up with zeros."""
    pad = -x.shape[1] % chunk
    x = jnp.pad(x, ((0, 0), (0, pad), *((0, 0),) * (x.ndim - 2)))
    b, m = x.shape[:2]
    return jnp.moveaxis(x.reshape(b, m // chunk, chunk, *x.shape[2:]), 1, 0)


def _unchunk(x: jax.Array, m: int) -> jax.Array:
    """The inverse of `_chunks`."""
    steps, b, chunk = x.shape[:3]
    return jnp.moveaxis(x, 0, 1).reshape(b, steps * chunk, *x.shape[3:])[:, :m]


def _logits(hidden: jax.Array, unembedding: jax.Array) -> jax.Array:
    return jnp.einsum("bcd,vd->bcv", hidden, unembedding, preferred_element_type=jnp.float32)


def _local_ids(
    targets: jax.Array, vocabulary: int, distributed: bool
) -> tuple[jax.Array, jax.Array]:
    """Target ids counted from this device's first vocabulary row, and whether they lie on it."""
    first = jax.lax.axis_index("tensor") * vocabulary if distributed else 0
    local = targets - first
    return jnp.clip(local, 0, vocabulary - 1), (local >= 0) & (local < vocabulary)


def _forward_local(
    hidden: jax.Array, unembedding: jax.Array, targets: jax.Array, *, chunk: int, distributed: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    ids, mine = _local_ids(targets, unembedding.shape[0], distributed)
    u = unembedding.astype(hidden.dtype)

    def step(_: None, xs: tuple[jax.Array, ...]) -> tuple[None, tuple[jax.Array, ...]]:
        h, i, here = xs
        logits = _logits(h, u)
        top = logits.max(axis=-1)
        total = jnp.exp(logits - top[..., None]).sum(axis=-1)
        picked = jnp.take_along_axis(logits, i[..., None], axis=-1)[..., 0]
        return None, (top, total, jnp.where(here, picked, 0.0))

    xs = tuple(_chunks(x, chunk) for x in (hidden, ids, mine))
    m = targets.shape[1]
    top, total, picked = (_unchunk(x, m) for x in jax.lax.scan(step, None, xs)[1])
    if distributed:
        whole_top = jax.lax.pmax(top, "tensor")
        total = jax.lax.psum(total * jnp.exp(top - whole_top), "tensor")
        picked = jax.lax.psum(picked, "tensor")
        top = whole_top
    logz = top + jnp.log(total)
    return picked - logz, logz, picked == top


def _backward_local(
    hidden: jax.Array,
    unembedding: jax.Array,
    targets: jax.Array,
    logz: jax.Array,
    d_logprob: jax.Array,
    d_logz: jax.Array,
    *,
    chunk: int,
    distributed: bool,
) -> tuple[jax.Array, jax.Array]:
    """d logit_v = d_logprob (1[v = target] - p_v) + d_logz p_v, chunk by chunk."""
    ids, mine = _local_ids(targets, unembedding.shape[0], distributed)
    u = unembedding.astype(hidden.dtype)

    def step(d_u: jax.Array, xs: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        h, i, here, z, g, g_z = xs
        p = jnp.exp(_logits(h, u) - z[..., None])
        onehot = (jnp.arange(u.shape[0]) == i[..., None]) & here[..., None]
        d_logits = jnp.where(onehot, g[..., None], 0.0) + (g_z - g)[..., None] * p
        d_logits = d_logits.astype(h.dtype)
        d_h = jnp.einsum("bcv,vd->bcd", d_logits, u, preferred_element_type=jnp.float32)
        d_u += jnp.einsum("bcv,bcd->vd", d_logits, h, preferred_element_type=jnp.float32)
        return d_u, d_h

    arrays = (hidden, ids, mine, logz, d_logprob, d_logz)
    start = jnp.zeros(unembedding.shape, jnp.float32)
    if distributed:
        start = jax.lax.pcast(start, (*ROWS, "context", "tensor"), to="varying")
    d_u, d_h = jax.lax.scan(step, start, tuple(_chunks(x, chunk) for x in arrays))
    d_h = _unchunk(d_h, targets.shape[1])
    if distributed:
        d_h = jax.lax.psum(d_h, "tensor")
        d_u = jax.lax.psum(d_u, (*ROWS, "context"))
    return d_h.astype(hidden.dtype), d_u.astype(unembedding.dtype)


def _fused_local(
    hidden: jax.Array,
    unembedding: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    chunk: int,
    z_loss: float,
    distributed: bool,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """log p, logz, and the gradients of the weighted sum; every device has the whole vocabulary."""
    u = unembedding.astype(hidden.dtype)
    places = jnp.arange(u.shape[0])

    def step(d_u: jax.Array, xs: tuple[jax.Array, ...]) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        h, i, w = xs
        logits = _logits(h, u)
        logz = jax.nn.logsumexp(logits, axis=-1)
        picked = jnp.take_along_axis(logits, i[..., None], axis=-1)[..., 0]
        slope = w * (1 + 2 * z_loss * logz)
        d_logits = slope[..., None] * jnp.exp(logits - logz[..., None])
        d_logits = d_logits - jnp.where(places == i[..., None], w[..., None], 0.0)
        d_logits = d_logits.astype(h.dtype)
        d_h = jnp.einsum("bcv,vd->bcd", d_logits, u, preferred_element_type=jnp.float32)
        d_u += jnp.einsum("bcv,bcd->vd", d_logits, h, preferred_element_type=jnp.float32)
        return d_u, (picked - logz, logz, d_h.astype(h.dtype))

    start = jnp.zeros(unembedding.shape, jnp.float32)
    if distributed:
        start = jax.lax.pcast(start, (*ROWS, "context", "tensor"), to="varying")
    d_u, found = jax.lax.scan(
        step, start, tuple(_chunks(x, chunk) for x in (hidden, targets, weights))
    )
    per_target = tuple(_unchunk(x, targets.shape[1]) for x in found)
    if distributed:
        # The axis of the vocabulary is one device wide: this only says that all there is was added.
        per_target = jax.lax.psum(per_target, "tensor")
        d_u = jax.lax.psum(d_u, (*ROWS, "context"))
    logprob, logz, d_h = per_target
    return logprob, logz, d_h, d_u.astype(unembedding.dtype)
