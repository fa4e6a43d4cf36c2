"""Attention in blocks is the reference attention, in values and gradients."""

import attention_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from gram_jax.models.attention_blocks import block_attention, block_view


def blocks(window):
    def attend(q, k, v, segment, branch, position):
        view = block_view(segment, branch, position, window)
        return block_attention(q, k, v, view)

    return attend


@pytest.mark.parametrize(
    ("kind", "t", "width", "window", "dtype"),
    [
        ("text", 256, 64, None, jnp.float32),
        ("branches", 256, 64, None, jnp.float32),
        ("branches", 230, 128, None, jnp.bfloat16),
        ("branches", 256, 64, 24, jnp.float32),
        ("text", 300, 32, 24, jnp.float32),
    ],
)
def test_blocks_are_the_reference(kind, t, width, window, dtype):
    cases.check(blocks(window), cases.rows(kind, t), window, cases.arrays(t, 4, 2, width, dtype))


@pytest.mark.parametrize("kind", ["text", "branches"])
def test_blocks_on_a_mesh_are_the_reference(kind):
    row, arrays = cases.rows(kind, 256), cases.arrays(256, 4, 2, 64, jnp.float32)
    cases.check(blocks(None), row, None, arrays, tiny.mesh(1, 2, 2, 2))


def test_a_query_visits_only_blocks_that_it_sees():
    """Keys of other blocks may be anything, even not a number."""
    row, (q, k, v, _) = cases.rows("text", 256), cases.arrays(256, 2, 2, 64, jnp.float32)
    # Row 0 has documents of 100, 90 and 31 tokens: the last, from place 190 on, starts in the
    # block of 128 .. 191.
    bad = k.at[:, :128].set(jnp.nan), v.at[:, :128].set(jnp.nan)
    found = jax.jit(blocks(None))(q, *bad, *row)[0, 192:221]
    whole = jax.jit(blocks(None))(q, k, v, *row)[0, 192:221]
    np.testing.assert_array_equal(found, whole)
