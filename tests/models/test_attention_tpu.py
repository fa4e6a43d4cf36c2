"""Splash attention over a row is the reference attention, in values and gradients."""

import attention_cases as cases
import jax.numpy as jnp
import pytest
import tiny

from gram_jax.models.attention_tpu import splash_attention, splash_view


def splash(window, kind="branches"):
    def attend(q, k, v, segment, branch, position):
        view = splash_view(segment, branch if kind == "branches" else None, position, window)
        return splash_attention(q, k, v, view, interpret=True)

    return attend


@pytest.mark.parametrize(
    ("kind", "t", "width", "window", "dtype"),
    [
        ("text", 256, 64, None, jnp.float32),
        ("branches", 256, 64, None, jnp.float32),
        ("branches", 230, 128, None, jnp.bfloat16),
        ("branches", 256, 64, 24, jnp.float32),
        ("text", 640, 64, 24, jnp.float32),
    ],
)
def test_splash_is_the_reference(kind, t, width, window, dtype):
    row, arrays = cases.rows(kind, t), cases.arrays(t, 4, 2, width, dtype)
    cases.check(splash(window, kind), row, window, arrays)


def test_a_traced_window_is_the_reference():
    row, arrays = cases.rows("text", 256), cases.arrays(256, 2, 2, 64, jnp.float32)
    cases.check(splash(jnp.int32(24), "text"), row, 24, arrays)


@pytest.mark.parametrize("kind", ["text", "branches"])
def test_splash_on_a_mesh_is_the_reference(kind):
    row, arrays = cases.rows(kind, 256), cases.arrays(256, 4, 2, 64, jnp.float32)
    cases.check(splash(None, kind), row, None, arrays, tiny.mesh(1, 2, 2, 2))
