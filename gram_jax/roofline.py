"""The least time that a step can take on given chips: of its products, its memory, its network.

Each of the three is a bound; they can overlap at best, so the step takes at least the longest.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from gram_jax.chips import Slice
from gram_jax.collectives import Collective

DAY = 86400.0


@dataclasses.dataclass(frozen=True, slots=True)
class Roofline:
    """Seconds of one step, and what follows.

    Attributes:
      compute: at the chip's peak; ``memory`` at the full bandwidth of HBM; ``network`` of all
        exchanges, one after the other, at that of the links that they can use.
      model_flops: FLOPs per device that the model needs, nothing computed twice.
      peak: FLOP/s of a device.
      tokens: of a step, over all devices.
    """

    compute: float
    memory: float
    network: float
    model_flops: float
    peak: float
    tokens: int

    @property
    def step(self) -> float:
        return max(self.compute, self.memory, self.network)

    @property
    def bound_by(self) -> str:
        return max(("compute", "memory", "network"), key=lambda name: getattr(self, name))

    @property
    def mfu(self) -> float:
        """The highest model FLOPs utilisation that these bounds allow."""
        return self.model_flops / (self.peak * self.step)

    @property
    def serial_mfu(self) -> float:
        """The same if nothing overlaps: all three times added up."""
        return self.model_flops / (self.peak * (self.compute + self.memory + self.network))

    @property
    def tokens_per_day(self) -> float:
        return self.tokens / self.step * DAY

    @property
    def seconds_per_token(self) -> float:
        return self.step / self.tokens

    def days(self, tokens: float) -> float:
        """Days for so many tokens."""
        return tokens / self.tokens_per_day


def network_seconds(
    found: Sequence[Collective], where: Slice, mesh: Mapping[str, int], devices: np.ndarray
) -> float:
    """Time of exchanges, one after the other.

    Args:
      devices: those of the mesh, in its shape; with ``coords`` in the torus and, where there are
        several slices, ``slice_index``.
    """
    return sum(_exchange_seconds(c, where, mesh, devices) for c in found)


def _exchange_seconds(
    c: Collective, where: Slice, mesh: Mapping[str, int], devices: np.ndarray
) -> float:
    index = tuple(slice(None) if axis in c.axes else 0 for axis in mesh)
    group = np.asarray(devices[index]).reshape(-1)
    slices = len({getattr(d, "slice_index", 0) for d in group})
    seconds = c.sent / link_bandwidth(where, [tuple(d.coords) for d in group])
    if slices > 1:
        # First within each slice, then each device its share with its twins in the others.
        share = c.whole * slices / c.size * c.times
        factor = 2 if c.kind == "all-reduce" else 1
        outside = where.chip.network / where.chip.devices
        seconds += factor * share * (slices - 1) / slices / outside
    return seconds


def link_bandwidth(where: Slice, coords: Sequence[tuple[int, ...]]) -> float:
    """Bytes/s that one device can send to others of a group at these places of the torus.

    A chip has two links along each axis of the torus. A group that fills an axis which closes to a
    ring uses both; one on an open stretch has to come back the way it went, which halves it.
    """
    chip = where.chip
    if chip.axes == 0:
        return chip.links
    used = 0
    for axis, size in enumerate(where.shape):
        spread = len({c[axis] for c in coords})
        if spread > 1:
            used += 2 if spread == size and closes(where, axis) else 1
    if used == 0:  # two devices of one chip
        return chip.memory_bandwidth / chip.devices
    return chip.links * used / (2 * chip.axes) / chip.devices


def closes(where: Slice, axis: int) -> bool:
    """Whether an axis of a slice is a ring: whole cubes of 4 in 3D, 16 chips in 2D."""
    if where.chip.axes == 3:
        return all(size % 4 == 0 for size in where.shape)
    return where.shape[axis] == 16


def node_bandwidth(where: Slice, size: int, stride: int) -> float:
    """Bytes/s of a GPU in a group of ``size`` whose members are ``stride`` apart in the order."""
    chip = where.chip
    inside = math.ceil(size * stride / chip.node) <= 1
    return chip.links if inside else chip.network
