"""Splash attention over a row is the reference attention, in values and gradients."""

import functools

import attention_cases as cases
import jax.numpy as jnp
import pytest
import tiny

from gram_jax.models.attention_tpu import splash

splash = functools.partial(splash, interpret=True)


@pytest.mark.parametrize(
    ("kind", "t", "width", "window", "dtype"),
    [
        ("text", 256, 64, 0, jnp.float32),
        ("branches", 256, 64, 0, jnp.float32),
        ("branches", 230, 128, 0, jnp.bfloat16),
        ("branches", 256, 64, 24, jnp.float32),
        ("text", 640, 64, 24, jnp.float32),
    ],
)
def test_splash_is_the_reference(kind, t, width, window, dtype):
    row, arrays = cases.rows(kind, t), cases.arrays(t, 4, 2, width, dtype)
    fast = functools.partial(splash, window=window, has_branches=kind == "branches")
    cases.check(fast, row, window, arrays)


def test_a_traced_window_is_the_reference():
    row, arrays = cases.rows("text", 256), cases.arrays(256, 2, 2, 64, jnp.float32)
    fast = functools.partial(splash, window=jnp.int32(24), has_branches=False)
    cases.check(fast, row, 24, arrays)


@pytest.mark.parametrize("kind", ["text", "branches"])
def test_splash_on_a_mesh_is_the_reference(kind):
    row, arrays = cases.rows(kind, 256), cases.arrays(256, 4, 2, 64, jnp.float32)
    fast = functools.partial(splash, window=0, has_branches=kind == "branches")
    cases.check(fast, row, 0, arrays, tiny.mesh(1, 2, 2))
