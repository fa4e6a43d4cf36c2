"""What the devices of a mesh exchange in a compiled program: kind, mesh axes, bytes, how often."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import cast

import numpy as np

from gram_jax.hlo import Computation, Instruction, Program

KINDS = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all",
    "collective-permute", "collective-broadcast",
)  # fmt: skip


_MANUAL_CHANNEL = "1"  # JAX gives it to every exchange that a shard_map asks for


@dataclasses.dataclass(frozen=True, slots=True)
class Collective:
    """One exchange.

    Attributes:
      kind: one of `KINDS`.
      axes: mesh axes that it goes over.
      size: devices that take part in one exchange.
      whole: bytes of the array that is gathered, reduced or exchanged, whole.
      times: how often it runs in a step.
      dtype: of the array.
    """

    kind: str
    axes: tuple[str, ...]
    size: int
    whole: int
    times: float
    dtype: str

    @property
    def sent(self) -> float:
        """Bytes that one device sends in a step, with the best algorithm on a ring or a torus."""
        share = (self.size - 1) / self.size
        factor = {"all-reduce": 2 * share, "collective-permute": 1.0}.get(self.kind, share)
        return self.whole * factor * self.times


def collectives(program: Program, mesh: Mapping[str, int]) -> list[Collective]:
    """All exchanges of a step, in the order of the program.

    The compiler spreads an asynchronous exchange over several fusions, each with the whole
    instruction in it: those of one channel are one exchange. Between slices arrays are handed to
    the host (``send``), each device's to its twins in the other slices; slices differ along
    ``data`` alone (`mesh.make_mesh`).

    Args:
      program: of a module that is partitioned over ``mesh``, whose devices are in its order.
      mesh: size of each axis.
    """
    found: dict[str, Collective] = {}
    for computation, times in program.runs():
        for i in computation.instructions.values():
            for inner, scatters in _of(program, i):
                made = _collective(inner, scatters, times, mesh)
                if made is None:
                    continue
                channel = inner.attribute("channel_id")
                shared = channel in ("", _MANUAL_CHANNEL)
                key = f"{computation.name} {inner.name}" if shared else f"channel {channel}"
                if key not in found or made.times > found[key].times:
                    found[key] = made
    return list(found.values())


def grouped(found: list[Collective]) -> list[Collective]:
    """One entry per kind and axes, largest first; ``whole`` is that of all their runs together."""
    groups: dict[tuple[str, tuple[str, ...], str], list[Collective]] = {}
    for c in found:
        groups.setdefault((c.kind, c.axes, c.dtype), []).append(c)
    merged = [
        Collective(
            kind, axes, many[0].size, round(sum(c.whole * c.times for c in many)), 1.0, dtype
        )
        for (kind, axes, dtype), many in groups.items()
    ]
    return sorted(merged, key=lambda c: -c.sent)


def _of(program: Program, i: Instruction) -> list[tuple[Instruction, bool]]:
    """The collectives that an instruction is or holds, and whether each is then scattered."""
    kind = i.opcode.removesuffix("-start")
    if kind in KINDS or (kind == "send" and _between_slices(i)):
        return [(i, False)]
    if i.opcode != "fusion":
        return []
    found = []
    for name in i.called("calls"):
        inside: Computation = program.computations[name]
        scatters = name.startswith("all-reduce-scatter")
        for inner in inside.instructions.values():
            if inner.opcode == "fusion":
                found += _of(program, inner)
            elif inner.opcode.removesuffix("-start") in KINDS:
                found.append((inner, scatters))
    return found


def _collective(
    i: Instruction, scatters: bool, times: float, mesh: Mapping[str, int]
) -> Collective | None:
    kind = i.opcode.removesuffix("-start")
    if kind == "send":
        kind, size = cast(tuple[str, int], _between_slices(i))
        return Collective(kind, ("data",), size, i.arrays[0].bytes, times, i.arrays[0].dtype)
    axes, size = group_axes(i, mesh)
    if size == 1:
        return None
    arrays = i.arrays
    if i.opcode.endswith("-start") and kind in ("all-gather", "collective-permute"):
        # (operands, results, contexts): of equal numbers of arrays.
        arrays = arrays[len(i.operands) : 2 * len(i.operands)]
    whole = sum(array.bytes for array in arrays)
    if kind == "reduce-scatter":
        whole *= size
    if kind == "all-reduce" and scatters:
        kind = "reduce-scatter"
    largest = max(arrays, key=lambda array: array.bytes)
    return Collective(kind, axes, size, whole, times, largest.dtype)


def _between_slices(i: Instruction) -> tuple[str, int] | None:
    """The kind of an exchange between slices, and how many slices take part; None if it is none."""
    kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', i.attributes)
    slices = re.search(r'_xla_megascale_target="\{([\d,:]+)\}', i.attributes)
    if kind is None or slices is None:
        return None
    ranges = [part.split(":") for part in slices.group(1).split(",")]
    count = sum(int(ends[-1]) - int(ends[0]) + 1 for ends in ranges)
    return kind.group(1).lower().replace("_", "-"), count


def group_axes(i: Instruction, mesh: Mapping[str, int]) -> tuple[tuple[str, ...], int]:
    """The mesh axes along which the devices of one group differ, and how many they are."""
    shape, names = tuple(mesh.values()), tuple(mesh)
    pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", i.attributes)
    if pairs:
        ids = np.array(re.findall(r"(\d+),(\d+)", pairs.group(1)), np.int64).reshape(-1, 2)
        ids = ids[ids[:, 0] != ids[:, 1]]
        places = np.array(np.unravel_index(ids, shape)).reshape(len(shape), -1, 2)
        moved = (places[..., 0] != places[..., 1]).any(axis=1)
        axes = tuple(name for name, moves in zip(names, moved, strict=True) if moves)
        return axes, int(np.prod([mesh[name] for name in axes])) if axes else 1
    group = _first_group(i.attributes, int(np.prod(shape)))
    places = np.array(np.unravel_index(group, shape))
    differ = (places != places[:, :1]).any(axis=1)
    return tuple(n for n, d in zip(names, differ, strict=True) if d), len(group)


def _first_group(attributes: str, devices: int) -> np.ndarray:
    """Devices of the first group of ``replica_groups``, in any of the ways that it is written."""
    named = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, ?device_ids=\(([^)]*)\))? ?\{([^}]*)\}", attributes
    )
    if named:
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named.group(1))}
        order = np.arange(devices)
        if named.group(2):
            order = _tiled(named.group(2))
        grid = order.reshape(tuple(sizes.values()))
        within = re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", named.group(3))
        for axis, (name, size) in enumerate(sizes.items()):
            for used, before, part in within:
                if used != name:
                    continue
                if part:  # a part of the axis: (size before it) and its size
                    after = size // (int(before) * int(part))
                    split = (int(before), int(part), after)
                    grid = np.moveaxis(
                        grid.reshape(grid.shape[:axis] + split + grid.shape[axis + 1 :]),
                        (axis, axis + 2), (0, 1),
                    )[0, 0]  # fmt: skip
                break
            else:
                grid = grid.take([0], axis=axis)
        return grid.reshape(-1)
    tiles = re.search(r"replica_groups=(\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?)", attributes)
    if tiles:
        return _tiled(tiles.group(1))[0]
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", attributes)
    if listed and listed.group(1):
        return np.array([int(d) for d in listed.group(1).split(",")])
    return np.arange(devices)  # {} or absent: all


def _tiled(text: str) -> np.ndarray:
    """``[4,2]<=[2,4]T(1,0)``: 0, 1, ... as [2, 4], transposed, as [4, 2]."""
    match = re.search(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if match is None:
        return np.array([int(d) for d in re.findall(r"\d+", text)])
    shape, base, turned = (
        tuple(map(int, part.split(","))) if part else () for part in match.groups()
    )
    grid = np.arange(int(np.prod(base))).reshape(base)
    return (grid.transpose(turned) if turned else grid).reshape(shape)
