"""The device mesh and which of its axes each named dimension is split over.

Arrays are split in two ways only. Weights: D over ``fsdp`` and ``context``; V, H, K and F over
``tensor``. Everything that has rows: B over ``data`` and ``fsdp``; places and targets over
``context`` (gram_jax/stripes.py); heads, features and vocabulary as the weights they come from. A
weight is gathered along D just before use (`gathered`).

Without a mesh (``jax.set_mesh`` not entered) all functions here leave arrays as they are, so a
model works on one device with no ceremony.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gram_jax.config import MeshConfig, ModelConfig
from gram_jax.config_rules import unknown_field
from gram_jax.distributed import barrier, process_count
from gram_jax.errors import UserError

AXES = ("data", "fsdp", "tensor", "context")
ROWS = ("data", "fsdp")
"""The axes that rows are split over."""
_PARTS = ("fsdp", "context")
"""The axes that the model width of weights, gradients and moments is split over."""

_Tree = TypeVar("_Tree")

_TENSOR = dict.fromkeys("VHKF", "tensor")
_WEIGHT_AXES = {"D": _PARTS, **_TENSOR}
_ACTIVATION_AXES = {"B": ROWS, **dict.fromkeys("TNM", "context"), **_TENSOR}


def weight_spec(dims: str) -> P:
    """The sharding of a weight whose dimensions have these letters, e.g. ``LDHE``.

    L layers, D model, H heads, K key-value heads, E head width, F feed-forward, V vocabulary,
    R rank of LoRA's matrices; lower-case ``d`` is the model width of a vector, which is not split.
    """
    return P(*(_WEIGHT_AXES.get(dim) for dim in dims))


def activation_spec(dims: str) -> P:
    """The sharding of an activation, e.g. ``BTHE``.

    T places and M targets, of which each device of ``context`` has its own, and N blocks of such
    places; S places, or sequences, of which it has all.
    """
    return P(*(_ACTIVATION_AXES.get(dim) for dim in dims))


def out_spec(dims: str) -> P | None:
    """For ``out_sharding=``: the activation's sharding, or None where there is no mesh."""
    return None if _no_mesh() else activation_spec(dims)


def gathered(weight: jax.Array, dims: str) -> jax.Array:
    """A weight made whole along D for the computation; the other dimensions stay split."""
    if _no_mesh():
        return weight
    return jax.reshard(weight, P(*(None if d == "D" else _WEIGHT_AXES.get(d) for d in dims)))


def per_device(local: Any, signature: str) -> Any:
    """``local`` on each device's share of the rows and heads; on whole arrays without a mesh.

    For kernels, which the compiler cannot split. ``signature`` names the dimensions of its arrays,
    e.g. ``BTHE,BT->BTHE``; nothing may depend on what other devices hold, but what is asked of them
    (gram_jax/stripes.py).
    """
    if _no_mesh():
        return local
    inputs, outputs = (
        tuple(activation_spec(dims) for dims in side.split(",")) for side in signature.split("->")
    )
    # A kernel does not say over which axes its results vary; all of them do.
    run = jax.shard_map(
        local,
        in_specs=inputs,
        out_specs=outputs if len(outputs) > 1 else outputs[0],
        check_vma=False,
    )
    # Rows that are whole on every device are split first.
    return lambda *arrays: run(*map(jax.reshard, arrays, inputs))


def context_size() -> int:
    """Over how many devices a row is split."""
    return 1 if _no_mesh() else int(jax.sharding.get_abstract_mesh().shape["context"])


def _no_mesh() -> bool:
    return bool(jax.sharding.get_abstract_mesh().empty)


def target_platform() -> str:
    """What the function being traced is for: ``cpu``, ``gpu`` or ``tpu``.

    That of the mesh's devices, which need not be here: a step can be compiled for others.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else str(device.platform)


def mesh_sizes(config: MeshConfig, devices: int) -> tuple[int, ...]:
    """Sizes of the axes over so many devices, with -1 replaced.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    sizes = [getattr(config, axis) for axis in AXES]
    if any(size == 0 or size < -1 for size in sizes) or sizes.count(-1) > 1:
        raise UserError(
            f"mesh {dict(zip(AXES, sizes, strict=True))}: sizes are positive, one may be -1"
        )
    if -1 in sizes:
        rest = math.prod(size for size in sizes if size != -1)
        sizes[sizes.index(-1)] = max(devices // rest, 1)
    if math.prod(sizes) != devices:
        raise UserError(
            f"mesh {dict(zip(AXES, sizes, strict=True))} needs {math.prod(sizes)} devices;"
            f" there are {devices}"
        )
    return tuple(sizes)


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with axes data, fsdp, tensor, context over all devices (or those given).

    The devices may be those of a topology that is not here (jax.experimental.topologies).

    Raises:
      UserError: the sizes do not multiply to the number of devices, or ``data`` does not divide by
        the number of slices.
    """
    found = list(devices) if devices is not None else jax.devices()
    sizes = mesh_sizes(config, len(found))
    mesh = Mesh(arranged(sizes, found), AXES, axis_types=(AxisType.Explicit,) * len(AXES))
    if devices is None and process_count() > 1 and found[0].platform == "cpu":
        _connect(mesh)
    return mesh


def arranged(sizes: Sequence[int], devices: Sequence[Any]) -> np.ndarray:
    """Devices as an array of these sizes of `AXES`, so that neighbours talk most.

    TPU slices are joined by a slow network, which only ``data`` crosses: each slice holds a whole
    number of copies of the model, and gradients are summed over it once a step.

    Raises:
      UserError: ``data`` does not divide by the number of slices, or slices differ in size.
    """
    slices: dict[int, list[Any]] = {}
    for device in devices:
        # Hosts with GPUs have such numbers too; there fsdp over several hosts is what people do.
        number = getattr(device, "slice_index", 0) if device.platform == "tpu" else 0
        slices.setdefault(number, []).append(device)
    data, count = sizes[0], len(slices)
    if data % count:
        raise UserError(
            f"mesh.data={data} does not divide by the {count} slices of these devices; only data"
            " may cross from slice to slice"
        )
    if len(lengths := {len(some) for some in slices.values()}) > 1:
        raise UserError(f"the slices differ in size ({min(lengths)} to {max(lengths)} devices)")
    inner = (data // count, *sizes[1:])
    return np.concatenate(
        [
            mesh_utils.create_device_mesh(inner, slices[number], allow_split_physical_axes=True)
            for number in sorted(slices)
        ]
    )


def _connect(mesh: Mesh) -> None:
    """Makes the devices along each axis, and along several, compute together once.

    On CPU the first collective of a group of devices fails if a process is half a minute late.
    Later ones wait, and processes may well compile for longer than that.
    """
    split = [axis for axis in AXES if mesh.shape[axis] > 1]
    groups = [g for n in range(1, len(split) + 1) for g in itertools.combinations(split, n)]

    def meet(x: jax.Array) -> jax.Array:
        return sum((jax.lax.psum(x, group) for group in groups), x)

    meet_all = jax.shard_map(meet, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    barrier("mesh")
    jax.block_until_ready(jax.jit(meet_all)(np.zeros((), np.float32)))


def parse_mesh(text: str) -> MeshConfig:
    """``fsdp=2,tensor=4`` as a MeshConfig.

    Raises:
      UserError: an axis that does not exist, or a size that is no number.
    """
    config = MeshConfig()
    for part in filter(None, text.split(",")):
        name, _, size = part.partition("=")
        if name not in AXES:
            raise UserError(unknown_field(f"mesh.{name}", list(AXES)))
        try:
            setattr(config, name, int(size))
        except ValueError:
            raise UserError(f"--mesh={text}: {part!r} must read {name}=NUMBER") from None
    return config


def check_divides(mesh: Mesh, model: ModelConfig, batch_rows: int = 0, row_length: int = 0) -> None:
    """Every split dimension must divide by its axis; a size of 0 is not looked at.

    Raises:
      UserError: names the dimension, its size and the axis.
    """
    data, fsdp, tensor, context = (mesh.shape[axis] for axis in AXES)
    for name, size, parts, axis in (
        ("model.vocab_size", model.vocab_size, tensor, "tensor"),
        ("model.num_heads", model.num_heads, tensor, "tensor"),
        ("model.num_kv_heads", model.num_kv_heads, tensor, "tensor"),
        ("model.intermediate_size", model.intermediate_size, tensor, "tensor"),
        ("model.hidden_size", model.hidden_size, fsdp * context, "fsdp x context"),
        ("rows computed at once", batch_rows, data * fsdp, "data x fsdp"),
        # Two blocks each (gram_jax/stripes.py).
        ("row_length", row_length, row_parts(mesh), "2 x context"),
    ):
        if size % parts:
            raise UserError(f"{name}={size} does not divide by mesh axis {axis}={parts}")


def row_shards(mesh: Mesh | None) -> int:
    """Over how many devices rows are spread."""
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in ROWS)


def row_parts(mesh: Mesh | None) -> int:
    """What the length of a row must divide by: two stripes for each device that holds a part."""
    context = 1 if mesh is None else mesh.shape["context"]
    return 2 * context if context > 1 else 1


def named(mesh: Mesh, spec: P) -> NamedSharding:
    return NamedSharding(mesh, spec)


def put(batch: _Tree, mesh: Mesh) -> _Tree:
    """Numpy arrays [B, ...] on the mesh; every process has all of them, and places its own rows."""
    rows = named(mesh, activation_spec("B"))
    return cast(_Tree, jax.tree.map(lambda x: place(x.shape, rows, lambda index: x[index]), batch))


def place(
    shape: tuple[int, ...],
    sharding: NamedSharding,
    read: Callable[[tuple[slice, ...]], np.ndarray],
) -> jax.Array:
    """An array whose parts come from the host, on purpose: where `no_surprises` is in force.

    Args:
      read: gives the part at an index, and is asked for those that this process holds.
    """
    with jax.transfer_guard_host_to_device("allow"):
        return jax.make_array_from_callback(shape, sharding, lambda index: read(index or ()))


def no_surprises() -> contextlib.AbstractContextManager[None]:
    """Within it, what moves between host and device without being asked to is an error.

    A number that is read by the way makes the host wait for the device, and the device then for
    the host. (A CPU's arrays are the host's own, so there only what goes in is seen.)
    """
    return jax.transfer_guard("disallow")


def split(array: jax.Array, dims: str) -> jax.Array:
    """The same array with its named dimensions split as an activation's, and no others."""
    return array if _no_mesh() else jax.reshard(array, activation_spec(dims))


def whole(array: jax.Array) -> jax.Array:
    """The same array on every device, so that every process can read all of it."""
    return array if _no_mesh() else jax.reshard(array, P())
