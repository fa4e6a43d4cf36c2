"""Products with weights: the values and gradients of einsum, and which factor is copied."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import NamedSharding

from gram_jax.mesh import activation_spec, gathered, weight_spec
from gram_jax.models.products import product

SIZES = {"B": 8, "T": 6, "D": 16, "H": 4, "E": 8, "F": 24, "R": 2}
DIMS = ["BTD,DHE->BTHE", "BTHE,HED->BTD", "BTD,DF->BTF", "BTF,FD->BTD", "BTD,DR->BTR"]


def arrays(dims, **sizes):
    rng = np.random.default_rng(0)
    shapes = [[(SIZES | sizes)[d] for d in side] for side in re.split(",|->", dims)]
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def run(multiply, x, weight, scale):
    def total(x, weight):
        y = multiply(x, weight)
        return (y * scale).sum(), y

    (_, y), gradients = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))(x, weight)
    return y, *gradients


@pytest.mark.parametrize("sizes", [None, (2, 2, 2)], ids=["no mesh", "2x2x2"])
@pytest.mark.parametrize("dims", DIMS)
def test_values_and_gradients_are_those_of_einsum(dims, sizes):
    x, weight, scale = arrays(dims)
    expected = run(lambda x, w: jnp.einsum(dims, x, w, precision="highest"), x, weight, scale)
    of_x, of_weight, of_y = re.split(",|->", dims)
    if sizes is None:
        found = run(lambda x, w: product(x, w, dims), x, weight, scale)
    else:
        mesh = tiny.mesh(*sizes)
        specs = (activation_spec(of_x), weight_spec(of_weight), activation_spec(of_y))
        with jax.set_mesh(mesh):
            placed = [
                jax.device_put(array, NamedSharding(mesh, spec))
                for array, spec in zip((x, weight, scale), specs, strict=True)
            ]
            found = run(lambda x, w: product(x, gathered(w, of_weight), dims), *placed)
        assert found[2].sharding.is_equivalent_to(NamedSharding(mesh, specs[1]), len(of_weight))
    for value, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(value, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def copied(multiply, x, weight, dy):
    """Sizes of what the compiled backward pass copies in another order."""

    def backward(x, weight, dy):
        return jax.vjp(multiply, x, weight)[1](dy)

    hlo = jax.jit(backward).lower(x, weight, dy).compile().as_text()
    shapes = re.findall(r" = f32\[([\d,]+)\]\S* (?:copy|transpose)\(", hlo)
    return [np.prod([int(n) for n in shape.split(",")]) for shape in shapes]


def test_the_gradient_of_a_weight_takes_no_transposed_copy_of_dy():
    dims = "BTD,DF->BTF"
    x, weight, dy = arrays(dims, T=64, F=256)
    assert dy.size not in copied(lambda x, w: product(x, w, dims), x, weight, dy)
    # What is avoided is there, or this test would see nothing.
    assert dy.size in copied(lambda x, w: jnp.einsum(dims, x, w), x, weight, dy)
