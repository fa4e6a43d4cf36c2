"""Published figures of accelerators, and the slices that a topology names.

Figures are the makers' peaks, per chip, bytes and bits in powers of ten unless the source says
otherwise. Network figures are what leaves one chip in one direction: half of what is published as
bidirectional.
"""

from __future__ import annotations

import dataclasses
import math
import re

from gram_jax.errors import UserError


@dataclasses.dataclass(frozen=True, slots=True)
class Chip:
    """One accelerator chip.

    Attributes:
      name: as in a topology.
      platform: ``tpu`` or ``gpu``.
      flops: dense bfloat16 FLOP/s.
      memory: bytes of HBM.
      memory_bandwidth: bytes/s of HBM.
      links: bytes/s to the other chips of a slice (ICI), or of a node (NVLink), in one direction,
        over all links together.
      axes: dimensions of the torus of a slice; 0 = every chip of a node reaches every other.
      network: bytes/s between slices or nodes (DCN, InfiniBand), in one direction.
      devices: what JAX calls a device, per chip.
      node: chips that the fast links join; 0 = the whole slice.
      accelerator: what the compiler wants to be told that it is on.
      sources: where the figures are published.
    """

    name: str
    platform: str
    flops: float
    memory: float
    memory_bandwidth: float
    links: float
    axes: int
    network: float
    devices: int = 1
    node: int = 0
    accelerator: str = ""
    sources: tuple[str, ...] = ()


_CLOUD = "https://docs.cloud.google.com/tpu/docs/"
_NVIDIA = "https://www.nvidia.com/en-us/data-center/"
_DGX = "https://docs.nvidia.com/dgx/"

CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            "v5e", "tpu", 197e12, 16 * 2**30, 819e9, 200e9, 2, 6.4e12 / 256 / 8,
            accelerator="v5litepod-16", sources=(_CLOUD + "v5e",),
        ),
        Chip(
            "v5p", "tpu", 459e12, 95 * 2**30, 2765e9, 600e9, 3, 50e9 / 8,
            accelerator="v5p-128", sources=(_CLOUD + "v5p",),
        ),
        Chip(
            "v6e", "tpu", 918e12, 32 * 2**30, 1638e9, 400e9, 2, 25.6e12 / 256 / 8,
            accelerator="v6e-16", sources=(_CLOUD + "v6e",),
        ),
        Chip(
            "tpu7x", "tpu", 2307e12, 192 * 2**30, 7380e9, 600e9, 3, 100e9 / 8, devices=2,
            accelerator="tpu7x-128", sources=(_CLOUD + "tpu7x",),
        ),
        Chip(
            "a100", "gpu", 312e12, 80e9, 2039e9, 300e9, 0, 200e9 / 8, node=8,
            sources=(_NVIDIA + "a100/", _DGX + "dgxa100-user-guide/"),
        ),
        Chip(
            "h100", "gpu", 989e12, 80e9, 3350e9, 450e9, 0, 400e9 / 8, node=8,
            sources=(_NVIDIA + "h100/", _DGX + "dgxh100-user-guide/"),
        ),
        Chip(
            "h200", "gpu", 989e12, 141e9, 4800e9, 450e9, 0, 400e9 / 8, node=8,
            sources=(_NVIDIA + "h200/", _DGX + "dgxh100-user-guide/"),
        ),
    )
}  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True)
class Slice:
    """Chips that are used together.

    Attributes:
      chip: their kind.
      shape: chips along each axis of the torus; one number for GPUs.
      slices: how many such slices, joined by the slower network.
    """

    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chips(self) -> int:
        return math.prod(self.shape) * self.slices

    @property
    def devices(self) -> int:
        return self.chips * self.chip.devices

    @property
    def device_memory(self) -> float:
        """Bytes of HBM per device."""
        return self.chip.memory / self.chip.devices

    @property
    def device_flops(self) -> float:
        return self.chip.flops / self.chip.devices

    @property
    def device_memory_bandwidth(self) -> float:
        return self.chip.memory_bandwidth / self.chip.devices

    @property
    def name(self) -> str:
        """As `parse_topology` reads it."""
        text = f"{self.chip.name}:{'x'.join(map(str, self.shape))}"
        return text if self.slices == 1 else f"{self.slices}*{text}"


def parse_topology(text: str) -> Slice:
    """``v5p:4x4x4``, ``2*v5e:16x16`` (two slices) or ``h100:64``.

    Raises:
      UserError: it is none of these.
    """
    match = re.fullmatch(r"(?:(\d+)\*)?(\w+):(\d+(?:x\d+)*)", text)
    chip = CHIPS.get(match.group(2)) if match else None
    if match is None or chip is None:
        raise UserError(
            f"--topology={text}: it must read KIND:SHAPE, as in v5p:4x4x4, 2*v5e:16x16 or h100:64;"
            f" kinds are {', '.join(CHIPS)}"
        )
    shape = tuple(map(int, match.group(3).split("x")))
    if len(shape) != max(chip.axes, 1) or 0 in shape:
        example = "x".join("4" * chip.axes) or "64"
        raise UserError(
            f"--topology={text}: {chip.name} has {max(chip.axes, 1)} axes, as in"
            f" {chip.name}:{example}"
        )
    return Slice(chip, shape, int(match.group(1) or 1))
