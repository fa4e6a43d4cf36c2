"""Products of activations with weights, with a backward pass that suits every compiler.

The gradient of a weight is x^T dy. Derived automatically it is (dy^T x)^T, for which XLA on CPU
makes a transposed copy of dy and fuses what dy came from into that copy, so that this is computed
twice.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from gram_jax.mesh import out_spec


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(x: jax.Array, weight: jax.Array, dims: str) -> jax.Array:
    """``einsum(dims, x, weight)``, e.g. ``BTD,DHE->BTHE``; letters as in the decoder.

    Every dimension of the weight is one of the input or of the output, and no other is summed over.
    """
    return jnp.einsum(dims, x, weight, out_sharding=out_spec(dims.partition("->")[2]))


def _forward(x: jax.Array, weight: jax.Array, dims: str) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return product(x, weight, dims), (x, weight)


def _backward(
    dims: str, saved: tuple[jax.Array, jax.Array], d_y: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, weight = saved
    inputs, outputs = dims.split("->")
    of_x, of_weight = inputs.split(",")
    d_x = jnp.einsum(f"{outputs},{of_weight}->{of_x}", d_y, weight, out_sharding=out_spec(of_x))
    sharding = None if out_spec(outputs) is None else jax.typeof(weight).sharding.spec
    d_weight = jnp.einsum(f"{of_x},{outputs}->{of_weight}", x, d_y, out_sharding=sharding)
    return d_x, d_weight


product.defvjp(_forward, _backward)
