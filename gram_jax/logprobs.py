"""The primitive: log-probs of target tokens from hidden states, without a [B, T, V] array.

Logits exist for one chunk of targets at a time, in float32, forward and backward. On a mesh the
unembedding stays split over ``tensor``; what the devices need of each other is exchanged once,
after the loop over chunks. Each of forward and backward is one ``shard_map``, inside one
``custom_vjp``.
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
      hidden: [B, M, D] hidden states at the places that predict the targets.
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
    """As :func:`target_logprobs`, and log sum_v exp(logit_v), float32 [B, M]."""
    mesh = jax.sharding.get_abstract_mesh()
    unembedding = gathered(unembedding, "VD")
    if chunk == 0:
        rows, vocabulary = hidden.shape[0], unembedding.shape[0]
        if not mesh.empty:
            rows //= mesh.shape["data"] * mesh.shape["fsdp"]
            vocabulary //= mesh.shape["tensor"]
        budget = _CHUNK_BYTES_CPU if target_platform() == "cpu" else _CHUNK_BYTES
        chunk = max(1, _LEAST_TARGETS // rows, budget // (4 * rows * vocabulary))
    m = hidden.shape[1]
    steps = -(-m // min(chunk, m))
    chunk = -(-m // steps)
    pad = steps * chunk - m
    if pad:
        hidden = jnp.pad(hidden, ((0, 0), (0, pad), (0, 0)))
        targets = jnp.pad(targets, ((0, 0), (0, pad)))
    logprob, logz = _primitive(hidden, unembedding, targets, chunk)
    return logprob[:, :m], logz[:, :m]


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
) -> tuple[jax.Array, jax.Array]:
    return _forward(hidden, unembedding, targets, chunk)[0]


def _forward(
    hidden: jax.Array, unembedding: jax.Array, targets: jax.Array, chunk: int
) -> tuple[tuple[jax.Array, jax.Array], Any]:
    run = _per_device(_forward_local, "BMD,VD,BM->BM,BM", chunk)
    logprob, logz = run(hidden, unembedding, targets)
    return (logprob, logz), (hidden, unembedding, targets, logz)


def _backward(chunk: int, saved: Any, cotangents: Any) -> tuple[jax.Array, jax.Array, None]:
    hidden, unembedding, targets, logz = saved
    run = _per_device(_backward_local, "BMD,VD,BM,BM,BM,BM->BMD,VD", chunk)
    d_hidden, d_unembedding = run(hidden, unembedding, targets, logz, *cotangents)
    return d_hidden, d_unembedding, None


_primitive.defvjp(_forward, _backward)


def _per_device(local: Any, signature: str, chunk: int) -> Any:
    """``local`` on each device's share of the arrays; on whole arrays without a mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return functools.partial(local, chunk=chunk, distributed=False)
    inputs, outputs = (
        tuple(activation_spec(dims) for dims in side.split(",")) for side in signature.split("->")
    )
    return jax.shard_map(
        functools.partial(local, chunk=chunk, distributed=True), in_specs=inputs, out_specs=outputs
    )


def _chunks(x: jax.Array, chunk: int) -> jax.Array:
    """[B, M, ...] -> [M / chunk, B, chunk, ...]."""
    b, m = x.shape[:2]
    return jnp.moveaxis(x.reshape(b, m // chunk, chunk, *x.shape[2:]), 1, 0)


def _unchunk(x: jax.Array) -> jax.Array:
    """The inverse of :func:`_chunks`."""
    steps, b, chunk = x.shape[:3]
    return jnp.moveaxis(x, 0, 1).reshape(b, steps * chunk, *x.shape[3:])


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
) -> tuple[jax.Array, jax.Array]:
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
    top, total, picked = (_unchunk(x) for x in jax.lax.scan(step, None, xs)[1])
    if distributed:
        whole_top = jax.lax.pmax(top, "tensor")
        total = jax.lax.psum(total * jnp.exp(top - whole_top), "tensor")
        picked = jax.lax.psum(picked, "tensor")
        top = whole_top
    logz = top + jnp.log(total)
    return picked - logz, logz


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
        start = jax.lax.pcast(start, (*ROWS, "tensor"), to="varying")
    d_u, d_h = jax.lax.scan(step, start, tuple(_chunks(x, chunk) for x in arrays))
    d_h = _unchunk(d_h)
    if distributed:
        d_h = jax.lax.psum(d_h, "tensor")
        d_u = jax.lax.psum(d_u, ROWS)
    return d_h.astype(hidden.dtype), d_u.astype(unembedding.dtype)
