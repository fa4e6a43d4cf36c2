"""Meshes: which devices lie together, what does not divide, and how a pod would hold a model."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.sharding import AbstractMesh, AxisType

from gram_jax.config import ComputeConfig, MeshConfig, ObjectiveConfig, TrainConfig
from gram_jax.errors import UserError
from gram_jax.mesh import AXES, ROWS, arranged, check_divides, make_mesh
from gram_jax.models.decoder import abstract_decoder, weight_dims
from gram_jax.objectives import objective
from gram_jax.rows import Batch
from gram_jax.training import init_state, merge_model, split_model

POD = AbstractMesh((4, 8, 4, 2), AXES, axis_types=(AxisType.Explicit,) * 4)
B, T = 64, 1536
# Sizes that are found nowhere else, so that a dimension is known by its size.
MODEL = tiny.config(
    vocab_size=4 * 331,
    hidden_size=16 * 13,
    num_layers=3,
    num_heads=8,
    num_kv_heads=4,
    head_dim=22,
    intermediate_size=4 * 97,
)


@dataclasses.dataclass(frozen=True)
class Chip:
    """What is read of a TPU: where it is."""

    id: int
    slice_index: int
    coords: tuple[int, int, int]
    platform: str = "tpu"
    device_kind: str = "TPU v4"
    core_on_chip: int = 0
    process_index: int = 0


def chips(slices, side=2):
    """Slices of a torus of 2 x 2 x side chips, in no order."""
    found = [
        Chip(100 * s + n, s, (n % 2, n // 2 % 2, n // 4))
        for s in range(slices)
        for n in range(4 * side)
    ]
    return [found[i] for i in np.random.default_rng(0).permutation(len(found))]


@pytest.mark.parametrize("sizes", [(2, 4, 2, 1), (4, 1, 2, 2), (16, 1, 1, 1), (2, 2, 2, 2)])
def test_only_data_crosses_from_slice_to_slice(sizes):
    devices = arranged(sizes, chips(2))
    assert devices.shape == sizes
    assert len({chip.id for chip in devices.flat}) == 16
    half = sizes[0] // 2
    assert [{chip.slice_index for chip in part.flat} for part in np.split(devices, 2)] == [{0}, {1}]
    for chip in devices[:half].flat:
        assert chip.slice_index == 0


def test_copies_of_the_model_that_do_not_divide_by_the_slices_are_an_error():
    with pytest.raises(UserError, match=r"mesh.data=1 does not divide by the 2 slices"):
        make_mesh(MeshConfig(data=1, fsdp=-1), chips(2))
    with pytest.raises(UserError, match=r"slices differ in size \(6 to 8 devices\)"):
        make_mesh(MeshConfig(data=2, fsdp=7), sorted(chips(2), key=lambda chip: chip.id)[:14])


def test_hosts_with_gpus_are_no_slices():
    gpus = [
        dataclasses.replace(
            chip, platform="gpu", device_kind="H100", process_index=chip.slice_index
        )
        for chip in chips(2)
    ]
    assert arranged((1, 16, 1, 1), gpus).shape == (1, 16, 1, 1)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((1, 1, 3, 1), r"model.vocab_size=64 does not divide by mesh axis tensor=3"),
        ((1, 3, 1, 1), r"model.hidden_size=32 does not divide by mesh axis fsdp x context=3"),
        ((1, 1, 1, 64), r"model.hidden_size=32 does not divide by mesh axis fsdp x context=64"),
        ((5, 1, 1, 1), r"rows computed at once=8 does not divide by mesh axis data x fsdp=5"),
        ((1, 1, 1, 8), r"row_length=72 does not divide by mesh axis 2 x context=16"),
    ],
)
def test_a_size_that_does_not_divide_is_named(sizes, message):
    with pytest.raises(UserError, match=message):
        check_divides(AbstractMesh(sizes, AXES), tiny.config(), 8, 72)


def pod_state():
    model = abstract_decoder(MODEL, ComputeConfig(dtype="bfloat16", attention="blocks"), POD)
    graph, trainable, frozen = split_model(model, TrainConfig())
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    return graph, jax.eval_shape(lambda t: init_state(tx, t, frozen), trainable)


SPLIT = {"D": ("fsdp", "context"), "V": "tensor", "H": "tensor", "K": "tensor", "F": "tensor"}


def test_each_weight_and_moment_is_split_over_a_pod_as_its_dimensions_say():
    with jax.sharding.use_abstract_mesh(POD):
        _, state = pod_state()
    moments = [s for s in jax.tree.leaves(state.opt_state, is_leaf=is_adam) if is_adam(s)]
    (adam,) = moments
    for tree in (state.trainable, adam.mu, adam.nu):
        leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
        assert len(leaves) == 12
        for path, leaf in leaves:
            wanted = jax.P(*(SPLIT.get(dim) for dim in weight_dims(path)))
            assert leaf.sharding.spec == wanted, weight_dims(path)
    matrices = [leaf for leaf in jax.tree.leaves(state.trainable) if leaf.size > 1000]
    assert all(shards(leaf) == 64 for leaf in matrices)
    assert sum(leaf.size for leaf in matrices) > 0.99 * MODEL.num_parameters()


def is_adam(state):
    return isinstance(state, optax.ScaleByAdamState)


def shards(leaf):
    """Over how many devices an array is split."""
    return leaf.size // math.prod(leaf.sharding.shard_shape(leaf.shape))


def arrays_of(jaxpr):
    """All arrays that are computed outside of kernels."""
    for equation in jaxpr.eqns:
        yield from (var.aval for var in equation.outvars)
        if equation.primitive.name == "shard_map":
            continue
        for value in jax.tree.leaves(equation.params, is_leaf=is_jaxpr):
            if is_jaxpr(value):
                yield from arrays_of(getattr(value, "jaxpr", value))


def is_jaxpr(value):
    return isinstance(value, ClosedJaxpr | Jaxpr)


def test_each_activation_of_a_step_is_split_over_a_pod():
    """Forward and backward: rows over data and fsdp, places over context, width over tensor."""
    integers = jax.ShapeDtypeStruct((B, T), jnp.int32, sharding=jax.NamedSharding(POD, jax.P(ROWS)))
    numbers = jax.ShapeDtypeStruct((B, T), jnp.float32, sharding=integers.sharding)
    batch = Batch(
        tokens=integers, positions=integers, segment_ids=integers, branch_ids=integers,
        target_index=integers, targets=integers, weights=numbers,
    )  # fmt: skip

    def loss(trainable, frozen, batch):
        model = merge_model(graph, trainable, frozen)
        return objective(model, batch, ObjectiveConfig(name="next_token"), None)[0]

    with jax.sharding.use_abstract_mesh(POD):
        graph, state = pod_state()
        step = jax.make_jaxpr(jax.grad(loss))(state.trainable, state.frozen, batch)
    wide = {T: 2, MODEL.num_heads: 4, MODEL.num_kv_heads: 4, MODEL.intermediate_size: 4}
    found = set()
    for array in arrays_of(step.jaxpr):
        # Numbers of a place, such as log-probs and norms, are whole where they are added up.
        if array.shape[:1] != (B,) or array.ndim < 3 or array.shape[-1] == 1:
            continue
        if array.sharding.mesh != POD:  # the embedding's gather, where the compiler decides
            assert array.shape[1:] == (T, 208)
            continue
        expected = 32 * math.prod(wide.get(size, 1) for size in array.shape[1:])
        assert shards(array) == expected, (array, array.sharding)
        found.add(array.shape[1:])
    assert {(T, 208), (T, 8, 22), (T, 4, 22), (T, 388)} <= found
