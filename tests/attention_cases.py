"""Rows, arrays and the reference that tests of attention backends share."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np

from gram_jax.mesh import out_spec, per_device
from gram_jax.models.attention import FULL, attention, mask_bias, row_mask, window_mask
from gram_jax.stripes import own_places, whole_rows

EXAMPLES = {
    # Each example: (prefix, branch, branch, ...); what remains of T is padding.
    "branches": [[(40, 30, 25, 50), (0, 20, 20)], [(150, 33, 1), (30, 9, 6)]],
    "text": [[(0, 100), (0, 90), (0, 31)], [(0, 220)]],
}


def rows(kind, t):
    """segment_ids, branch_ids and positions, int32 [2, t], of rows with prefixes and branches."""
    segment, branch, position = np.zeros((3, 2, t), np.int32)
    for row, examples in enumerate(EXAMPLES[kind]):
        at = 0
        for number, (prefix, *branches) in enumerate(examples, start=1):
            for k, length in enumerate((prefix, *branches)):
                place = slice(at, at + length)
                segment[row, place], branch[row, place] = number, k
                position[row, place] = (prefix if k else 0) + np.arange(length)
                at += length
        assert at < t
    return tuple(map(jnp.asarray, (segment, branch, position)))


def arrays(t, heads, kv_heads, width, dtype, seed=0):
    """q, k, v and a cotangent of the output, for two rows."""
    keys = jax.random.split(jax.random.key(seed), 4)
    shapes = [(2, t, n, width) for n in (heads, kv_heads, kv_heads, heads)]
    return [
        jax.random.normal(k, shape).astype(dtype) for k, shape in zip(keys, shapes, strict=True)
    ]


def check(attend, row, window, arrays, mesh=None):
    """Outputs and gradients of ``attend(q, k, v, *row)`` are those of the reference.

    To 1e-5 of the largest number in float32. bfloat16 keeps 8 bits, and gradients are rounded to
    it several times on their way.
    """
    place = jax.device_put if mesh is not None else lambda x, _: x
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        found, finite = jax.jit(functools.partial(_with_gradients, in_stripes(attend)))(
            [place(x, out_spec("BS")) for x in row], *(place(x, out_spec("BSHE")) for x in arrays)
        )
    plain = functools.partial(reference, window)
    expected, _ = jax.jit(functools.partial(_with_gradients, plain))(row, *arrays)
    assert finite
    tolerance = 1e-5 if arrays[0].dtype == jnp.float32 else 2e-2
    for name, a, b in zip(("output", "dq", "dk", "dv"), found, expected, strict=True):
        a, b = np.asarray(a), np.asarray(b)
        np.testing.assert_allclose(a, b, atol=tolerance * abs(b).max(), rtol=0, err_msg=name)


def in_stripes(attend):
    """The same of arrays in the row's order."""
    stripe = per_device(own_places, "BSHE->BTHE")
    order = per_device(whole_rows, "BTHE->BSHE")
    return lambda q, k, v, *row: order(attend(stripe(q), stripe(k), stripe(v), *row))


def _with_gradients(attend, row, q, k, v, cotangent):
    """Outputs and the gradients of q, k and v; float32, without those of padding queries."""
    live = (row[0] != 0)[:, :, None, None]
    out, pull = jax.vjp(lambda q, k, v: attend(q, k, v, *row), q, k, v)
    found = (jnp.where(live, out, 0), *pull(jnp.where(live, cotangent, 0).astype(out.dtype)))
    return [x.astype(jnp.float32) for x in found], jnp.isfinite(out).all()


def reference(window, q, k, v, segment, branch, position):
    """The plain attention over the row's mask, in float32."""
    mask = row_mask(segment, branch) & window_mask(position, window or FULL)
    return attention(*(x.astype(jnp.float32) for x in (q, k, v)), mask_bias(mask))
