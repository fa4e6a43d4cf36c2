"""A checksum changes with any bit and any place, and with nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gram_jax.checksums import changed, checksum, describe


def reference_checksum(x):
    """The same sums in numpy, element by element."""
    mask = (1 << 32) - 1

    def mix(h):
        h = (h ^ (h >> 16)) * 0x85EBCA6B & mask
        h = (h ^ (h >> 13)) * 0xC2B2AE35 & mask
        return h ^ (h >> 16)

    bits = x.astype(np.uint32) if x.dtype == bool else x.view(f"u{x.dtype.itemsize}")
    sums = [0, 0, 0]
    for index in np.ndindex(x.shape):
        place = 0
        for i in index:
            place = mix((place * 0x9E3779B1 + i + 1) & mask)
        first = mix(int(bits[index]) ^ place)
        finite = x.dtype.kind in "iub" or np.isfinite(np.float64(x[index]))
        for k, value in enumerate((first, mix((first + 0x9E3779B1) & mask), int(not finite))):
            sums[k] = sums[k] + value & mask
    return sums


DTYPES = ("float32", "bfloat16", "int32", "uint32", "bool", "float16", "int8")


def sample(dtype, shape=(4, 8, 2), seed=0):
    noise = np.random.default_rng(seed).normal(size=shape) * 3
    return np.asarray(jnp.asarray(noise > 0 if dtype == "bool" else noise).astype(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_checksum_is_that_of_its_definition(dtype):
    for shape in ((4, 3, 2), (7,), (), (0, 3)):
        x = sample(dtype, shape)
        assert checksum(jnp.asarray(x)).tolist() == reference_checksum(x)


@pytest.mark.skipif(jax.device_count() != 8, reason="needs eight devices")
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_checksum_does_not_depend_on_the_sharding(dtype):
    x, mesh = sample(dtype), tiny.mesh(2, 2, 2)
    expected = checksum(jnp.asarray(x)).tolist()
    for spec in (P(), P("data"), P(None, ("data", "fsdp")), P("tensor", "fsdp", "data")):
        y = jax.device_put(x, NamedSharding(mesh, spec))
        assert checksum(y).tolist() == expected
        with jax.set_mesh(mesh):
            assert checksum(y).tolist() == expected


def test_no_device_holds_a_whole_array_to_compute_its_checksum():
    spec = P("tensor", "fsdp", "data")
    x = jax.device_put(sample("float32", (8, 64, 16)), NamedSharding(tiny.mesh(2, 2, 2), spec))
    compiled = checksum.lower(x).compile()
    gathered = [line for line in compiled.as_text().splitlines() if " all-gather(" in line]
    assert gathered
    for line in gathered:  # only sums of shards: u32[1,1,2] and the like
        shape = line.split("[")[1].split("]")[0]
        assert np.prod([int(n) for n in shape.split(",")]) <= 8
    assert compiled.memory_analysis().temp_size_in_bytes < 4096


@settings(deadline=None)  # the first example of a shape compiles
@given(
    st.sampled_from([(7,), (3, 2), (2, 3, 4)]).flatmap(lambda shape: hnp.arrays(np.float32, shape)),
    st.integers(0, 2**30),
    st.integers(0, 31),
)
def test_one_flipped_bit_changes_the_checksum(x, place, bit):
    y = x.copy().reshape(-1)
    y.view(np.uint32)[place % y.size] ^= np.uint32(1 << bit)
    assert checksum(x).tolist()[:2] != checksum(y.reshape(x.shape)).tolist()[:2]


def test_parts_that_changed_places_change_the_checksum():
    x = sample("float32", (4, 8, 8))
    for y in (x[::-1], x[:, ::-1], x[..., ::-1], np.roll(x, 1, 0), x.swapaxes(1, 2)):
        assert sorted(y.reshape(-1)) == sorted(x.reshape(-1))
        assert checksum(y).tolist()[:2] != checksum(x).tolist()[:2]


def test_the_same_bits_under_another_shape_or_dtype_are_not_the_same_array():
    x = jnp.zeros((2, 3), jnp.float32)
    leaves, _ = describe({"a": x})
    for y in (jnp.zeros((3, 2)), jnp.zeros((2, 3), jnp.int32)):
        assert changed(leaves, describe({"a": y})[0]) == ["a"]
    assert changed(leaves, describe({"a": x + 0})[0]) == []


def test_elements_that_are_not_finite_are_counted():
    x = jnp.array([1.0, jnp.nan, jnp.inf, -jnp.inf, 3e38])
    assert int(checksum(x)[2]) == 3
    assert describe({"a": x, "b": jnp.ones(3), "c": jnp.arange(3)})[1] == ["a"]


def test_an_array_of_64_bits_has_no_checksum():
    with jax.enable_x64(True), pytest.raises(TypeError, match="float64"):
        checksum(jnp.zeros(3, jnp.float64))
