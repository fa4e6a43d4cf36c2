"""Long rows over several devices: which places of a row each device of ``context`` computes.

With C devices a row of T places is cut into 2 C blocks; device c takes blocks c and 2 C - 1 - c. A
query sees keys before it only, so the later half of a row costs three times the earlier one; the
two blocks of every device together cost the same. Blocks, and not single places in turn, so that
attention can still leave out whole blocks of keys.

    T = 16, C = 2    device 0: places 0 .. 3 and 12 .. 15    device 1: places 4 .. 11

All that is computed of places alone stays on its device in this order. Attention gathers keys and
values of the row, in the row's order; what says which keys a query sees are the integers of the
batch, which every device has whole. A hidden state that is read goes to whoever reads it.

Batches, their indices (``target_index``, ``readout_index``) and all results are in the row's order:
nothing else knows of stripes. The functions here that say "a device's share" are for use within
`gram_jax.mesh.per_device`. Without a mesh, or with C = 1, a device's share is the row.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from gram_jax.mesh import activation_spec, context_size, per_device


def places(t: int, c: int) -> np.ndarray:
    """Which places of a row of T each of C devices has, in its order; int32 [C, T / C]."""
    blocks = np.arange(t, dtype=np.int32).reshape(2 * c, -1)
    return np.concatenate((blocks[:c], blocks[: c - 1 : -1]), axis=1)


def striped(x_bs: jax.Array) -> jax.Array:
    """[B, T, ...] in the row's order, whole, to [B, T, ...] in stripes, split over ``context``."""
    dims = "X" * (x_bs.ndim - 2)
    return per_device(own_places, f"BS{dims}->BT{dims}")(x_bs)


def own_places(x_bs: jax.Array) -> jax.Array:
    """The part of whole rows [B, T, ...] that belongs to this device's share, [B, T / C, ...]."""
    c = context_size()
    if c == 1:
        return x_bs
    blocks = x_bs.reshape(x_bs.shape[0], 2 * c, x_bs.shape[1] // (2 * c), *x_bs.shape[2:])
    mine = jax.lax.axis_index("context")
    both = [
        jax.lax.dynamic_index_in_dim(blocks, block, axis=1, keepdims=False)
        for block in (mine, 2 * c - 1 - mine)
    ]
    return jnp.concatenate(both, axis=1)


def whole_rows(x_bt: jax.Array) -> jax.Array:
    """From a device's share [B, T / C, ...] the rows [B, T, ...] in their order.

    Its gradient is summed over ``context`` and split, which moves as little as the gathering.
    """
    c = context_size()
    if c == 1:
        return x_bt
    b, t, *rest = x_bt.shape
    gathered = jax.lax.all_gather(x_bt, "context", axis=1)  # [B, C, T / C, ...]
    halves = gathered.reshape(b, c, 2, t // 2, *rest)
    in_order = jnp.concatenate((halves[:, :, 0], halves[:, ::-1, 1]), axis=1)
    return in_order.reshape(b, c * t, *rest)


def at_places(x_btd: jax.Array, places: jax.Array, dims: str) -> jax.Array:
    """The vectors at some places of each row; the backward pass adds to them what comes back.

    Each device gives those that lie in its share, and zeros, and the parts are added up: exact, and
    nothing larger than the result is sent.

    Args:
      x_btd: [B, T, D] in stripes.
      places: int32 [B, M] or [B, S], places in the row.
      dims: ``BMD``: each device gets its own part of M, which divides by ``context``; ``BSD``: it
        gets all.

    Returns:
      [B, M, D] or [B, S, D].
    """
    if jax.sharding.get_abstract_mesh().empty:
        return jnp.take_along_axis(x_btd, places[..., None], axis=1)

    def local(x: jax.Array, places: jax.Array) -> jax.Array:
        here = _stripe_of(places, x.shape[1]) - jax.lax.axis_index("context") * x.shape[1]
        mine = (here >= 0) & (here < x.shape[1])
        index = jnp.clip(here, 0, x.shape[1] - 1)[..., None]
        found = jnp.where(mine[..., None], jnp.take_along_axis(x, index, axis=1), 0)
        if dims == "BSD":
            return jax.lax.psum(found, "context")
        return jax.lax.psum_scatter(found, "context", scatter_dimension=1, tiled=True)

    inputs = activation_spec("BTD"), activation_spec("BS")
    run = jax.shard_map(local, in_specs=inputs, out_specs=activation_spec(dims))
    return run(jax.reshard(x_btd, inputs[0]), jax.reshard(places, inputs[1]))


def _stripe_of(places: jax.Array, share: int) -> jax.Array:
    """Where places of the row lie in the row as it is striped; ``share`` places are a device's."""
    c = context_size()
    if c == 1:
        return places
    size = share // 2
    block, offset = places // size, places % size
    return jnp.where(block < c, 2 * block, 2 * (2 * c - 1 - block) + 1) * size + offset
