"""Compiles the step of a config for a slice of TPUs that is not here, and reads what came out.

The step is the one that training or scoring runs; its arguments are descriptions of arrays. The
compiler is libtpu's (``pip install -c constraints.txt -e '.[plan]'``), which needs no TPU. It takes
one kind of chip per process.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, topologies
from jax.sharding import AxisType, Mesh

from gram_jax.abstract_step import AbstractStep, Memory, abstract_step, argument_bytes
from gram_jax.arithmetic import Bandwidth
from gram_jax.chips import Slice
from gram_jax.collectives import Collective, collectives
from gram_jax.config import Config
from gram_jax.errors import UserError
from gram_jax.flops import device_flops
from gram_jax.hlo import parse
from gram_jax.mesh import AXES, mesh_sizes
from gram_jax.roofline import Roofline, link_bandwidth, network_seconds
from gram_jax.traffic import memory_traffic


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A step that was compiled for a slice, or that does not fit it.

    Attributes:
      flops: that a device computes, what is computed twice included.
      traffic: bytes that it reads from and writes to its memory; None if it does not fit.
      collectives: what it exchanges; None if it does not fit.
      roofline: None if it does not fit.
      seconds: that compiling took.
    """

    step: AbstractStep
    slice: Slice
    mesh: Mesh
    memory: Memory
    flops: float
    traffic: float | None
    collectives: list[Collective] | None
    roofline: Roofline | None
    seconds: float


def prepare_compiler(where: Slice) -> None:
    """Tells libtpu, before JAX loads it, that there is no TPU here and for which to compile.

    Raises:
      UserError: libtpu is not installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"--topology={where.name}: libtpu, the compiler for TPUs, is not installed;"
            " pip install -c constraints.txt -e '.[plan]'"
        )
    os.environ.update(
        TPU_SKIP_MDS_QUERY="1",
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",
        TPU_ACCELERATOR_TYPE=where.chip.accelerator,
        TPU_WORKER_HOSTNAMES="localhost",
        TPU_MIN_LOG_LEVEL="3",
        TPU_STDERR_LOG_LEVEL="3",
        TF_CPP_MIN_LOG_LEVEL="3",
    )
    jax.config.update("jax_platforms", "cpu")


def slice_mesh(config: Config, where: Slice) -> Mesh:
    """The config's mesh over the devices of a slice, in the order that suits its torus.

    Raises:
      UserError: there is no such slice, or the mesh does not fill it.
    """
    try:
        found = topologies.get_topology_desc(
            platform="tpu",
            topology_name=f"{where.chip.name}:{'x'.join(map(str, where.shape))}",
            num_slices=where.slices,
        )
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).partition(":")[2].strip() or str(error)
        raise UserError(
            f"--topology={where.name}: the compiler knows no such slice: {reason}"
        ) from None
    devices = list(found.devices)
    sizes = mesh_sizes(config.mesh, len(devices))
    if where.slices == 1:
        placed = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    else:
        outer = tuple(where.slices if axis == "data" else 1 for axis in AXES)
        if sizes[0] % where.slices:
            raise UserError(
                f"config.mesh.data={sizes[0]} must be a multiple of the {where.slices} slices: only"
                " copies of the weights go over the slow network"
            )
        inner = tuple(size // n for size, n in zip(sizes, outer, strict=True))
        placed = mesh_utils.create_hybrid_device_mesh(
            inner, outer, devices, allow_split_physical_axes=True
        )
    return Mesh(np.asarray(placed), AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def axis_bandwidths(config: Config, where: Slice) -> Bandwidth:
    """Bytes/s along axes of the config's mesh, by the links of its devices."""
    mesh = slice_mesh(config, where)

    def bandwidth(axes: tuple[str, ...]) -> float:
        index = tuple(slice(None) if axis in axes else 0 for axis in mesh.axis_names)
        group = np.asarray(mesh.devices[index]).reshape(-1)
        return link_bandwidth(where, [tuple(d.coords) for d in group])

    return bandwidth


def compile_step(config: Config, where: Slice, name: str = "train") -> Compiled:
    """Compiles the step of a config for a slice.

    Raises:
      UserError: the slice or the mesh cannot be, or a dimension does not divide by its axis.
    """
    mesh = slice_mesh(config, where)
    began = time.monotonic()
    sizes = dict(mesh.shape)
    with jax.set_mesh(mesh):
        step = abstract_step(config, mesh, name)
        traced = step.trace()
        flops = device_flops(traced.jaxpr.jaxpr, sizes)
        held = argument_bytes(step)
        try:
            compiled, text = _compile(traced.lower())
        except jax.errors.JaxRuntimeError as error:
            used, limit = out_of_memory(str(error), sum(held))
            memory = Memory(*held, 0, used - sum(held), used, limit)
            seconds = time.monotonic() - began
            return Compiled(step, where, mesh, memory, flops, None, None, None, seconds)
    found = compiled.memory_analysis()
    output = found.output_size_in_bytes - found.alias_size_in_bytes
    total = found.argument_size_in_bytes + output + found.temp_size_in_bytes
    limit = int(where.device_memory)
    memory = Memory(*held, output, found.temp_size_in_bytes, total, limit)
    program = parse(text)
    exchanges, traffic = collectives(program, sizes), memory_traffic(program)
    roofline = Roofline(
        compute=flops / where.device_flops,
        memory=traffic / where.device_memory_bandwidth,
        network=network_seconds(exchanges, where, sizes, mesh.devices),
        model_flops=step.flops / where.devices,
        peak=where.device_flops,
        tokens=step.tokens,
    )
    seconds = time.monotonic() - began
    return Compiled(step, where, mesh, memory, flops, traffic, exchanges, roofline, seconds)


def _compile(lowered: Any) -> tuple[Any, str]:
    """The executable and its program, from the compiler's own file.

    ``as_text()`` of an executable refuses programs in which an exchange goes on over several
    instructions.
    """
    with tempfile.TemporaryDirectory() as folder:
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        compiled = lowered.compile(compiler_options=options)
        (file,) = Path(folder).glob("*.after_optimizations.txt")
        return compiled, file.read_text(encoding="utf-8")


_AMOUNT = r"([\d.]+)([KMGT]?)"
_ALL = re.compile(rf"Used {_AMOUNT} of {_AMOUNT} hbm")
_TEMPORARIES = re.compile(
    rf"required for HLO temporaries \({_AMOUNT}\) exceeds available HBM \({_AMOUNT}\)"
)


def out_of_memory(message: str, arguments: int) -> tuple[int, int]:
    """(bytes needed, bytes there) as the compiler says it.

    Args:
      message: of the whole, or of what the step needs beside its arguments.
      arguments: bytes of these.

    Raises:
      RuntimeError: the message is about something else.
    """
    match = _ALL.search(message) or _TEMPORARIES.search(message)
    if match is None:
        raise RuntimeError(message)
    used, used_unit, limit, limit_unit = match.groups()
    scale = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    beside = 0 if match.re is _ALL else arguments
    there = round(float(limit) * scale[limit_unit])
    return round(float(used) * scale[used_unit]) + beside, there
