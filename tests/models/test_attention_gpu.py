"""The GPU kernel over a row is the reference attention, in values and gradients."""

import attention_cases as cases
import jax
import jax.numpy as jnp
import pytest
import tiny

from gram_jax.models.attention_gpu import flash_attention, flash_view


def flash(window, interpret=True):
    def attend(q, k, v, segment, branch, position):
        view = flash_view(segment, branch, position, window)
        return flash_attention(q, k, v, view, interpret=interpret)

    return attend


@pytest.mark.parametrize(
    ("kind", "t", "heads", "width", "window", "dtype"),
    [
        ("text", 256, 2, 64, None, jnp.float32),
        ("branches", 256, 4, 64, None, jnp.float32),
        ("branches", 230, 6, 80, None, jnp.bfloat16),
        ("branches", 256, 4, 8, 24, jnp.float32),
        ("text", 384, 4, 128, 24, jnp.bfloat16),
    ],
)
def test_the_kernel_is_the_reference(kind, t, heads, width, window, dtype):
    row, arrays = cases.rows(kind, t), cases.arrays(t, heads, 2, width, dtype)
    cases.check(flash(window), row, window, arrays)


def test_a_traced_window_is_the_reference():
    row, arrays = cases.rows("branches", 256), cases.arrays(256, 2, 2, 16, jnp.float32)
    cases.check(flash(jnp.int32(24)), row, 24, arrays)


def test_the_kernel_on_a_mesh_is_the_reference():
    row, arrays = cases.rows("branches", 256), cases.arrays(256, 4, 2, 16, jnp.float32)
    cases.check(flash(None), row, None, arrays, tiny.mesh(1, 2, 2))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("width", [64, 128])
def test_the_kernels_lower_for_a_gpu(width, dtype):
    row, (q, k, v, _) = cases.rows("branches", 256), cases.arrays(256, 4, 2, width, dtype)

    def gradients(q, k, v):
        compiled = flash(None, interpret=False)
        return jax.grad(lambda *x: compiled(*x, *row).sum(), argnums=(0, 1, 2))(q, k, v)

    text = jax.jit(gradients).trace(q, k, v).lower(lowering_platforms=("cuda",)).as_text()
    for name in ("forward", "backward_keys", "backward_queries"):
        assert f"row_attention_{name}" in text
