"""A step's memory and time by arithmetic alone: for GPUs, and to choose what is worth compiling.

Weights, optimiser state and FLOPs are those of the real step, traced for a mesh without devices.
Activations, exchanges and memory traffic are formulas of its shapes; they are within some tens of
percent of what the compiler says, and no more than that.

Letters as in gram_jax/models/decoder.py; r rows and T tokens at once on one device.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from gram_jax.abstract_step import AbstractStep, Memory, abstract_step, argument_bytes
from gram_jax.chips import Slice
from gram_jax.config import Config
from gram_jax.flops import device_flops
from gram_jax.mesh import AXES, ROWS, mesh_sizes
from gram_jax.models.adapters import adapters_of
from gram_jax.models.decoder import BLOCK_DIMS, block_weights, shape_of
from gram_jax.roofline import Roofline, node_bandwidth

Bandwidth = Callable[[tuple[str, ...]], float]
"""Bytes/s that a device can send along mesh axes."""

_HEAD_LOGITS = 64 * 2**20  # float32 logits alive at once (gram_jax/logprobs.py)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What arithmetic says of a step."""

    step: AbstractStep
    mesh: AbstractMesh
    memory: Memory
    roofline: Roofline
    network_bytes: float
    traffic: float
    flops: float


def abstract_mesh(config: Config, where: Slice) -> AbstractMesh:
    """The config's mesh over a slice's devices, none of which need be known to JAX.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    device = AbstractDevice(device_kind=where.chip.name, num_cores=1, platform=where.chip.platform)
    sizes = mesh_sizes(config.mesh, where.devices)
    return AbstractMesh(
        sizes, AXES, axis_types=(AxisType.Explicit,) * len(AXES), abstract_device=device
    )


def estimate(config: Config, where: Slice, name: str = "train") -> Estimate:
    """Memory and roofline of a step on GPUs, nodes of which are filled in the mesh's order.

    Raises:
      UserError: a dimension does not divide by its axis.
    """
    mesh = abstract_mesh(config, where)
    with jax.sharding.use_abstract_mesh(mesh):
        step = abstract_step(config, mesh, name)
        flops = device_flops(step.trace().jaxpr.jaxpr, dict(mesh.shape))
    return estimate_step(step, mesh, where, flops, node_bandwidths(mesh, where))


def node_bandwidths(mesh: AbstractMesh, where: Slice) -> Bandwidth:
    """Bytes/s along mesh axes of GPUs whose nodes are filled in the mesh's order."""

    def bandwidth(axes: tuple[str, ...]) -> float:
        last = max(AXES.index(axis) for axis in axes)
        stride = math.prod(mesh.shape[axis] for axis in AXES[last + 1 :])
        return node_bandwidth(where, math.prod(mesh.shape[axis] for axis in axes), stride)

    return bandwidth


def estimate_step(
    step: AbstractStep, mesh: AbstractMesh, where: Slice, flops: float, bandwidth: Bandwidth
) -> Estimate:
    """The same of a step that is there already, which computes so many FLOPs on a device."""
    parts = _Parts(step, dict(mesh.shape), where)
    memory = parts.memory(where)
    sent = parts.sent()
    traffic = parts.traffic(memory)
    roofline = Roofline(
        compute=flops / where.device_flops,
        memory=traffic / where.device_memory_bandwidth,
        network=sum(count / bandwidth(axes) for axes, count in sent if count),
        model_flops=step.flops / where.devices,
        peak=where.device_flops,
        tokens=step.tokens,
    )
    total = sum(count for _, count in sent)
    return Estimate(step, mesh, memory, roofline, total, traffic, flops)


class _Parts:
    """The formulas; all numbers are of one device."""

    def __init__(self, step: AbstractStep, mesh: dict[str, int], where: Slice):
        c = step.config
        m, self.step, self.mesh, self.remat = c.model, step, mesh, c.compute.remat
        self.training = step.name == "train"
        t = mesh["tensor"]
        rows = math.prod(mesh[axis] for axis in ROWS)
        others = math.prod(mesh.values()) // (rows * t)  # a row may be split further
        self.tokens = step.rows // step.parts // rows * c.data.row_length // others
        self.width = m.hidden_size
        self.heads = (m.num_heads * m.head_dim) // t
        self.keys = (m.num_kv_heads * m.head_dim) // t
        self.features = m.intermediate_size // t
        # Plain XLA attention, what GPUs take by default, has an array of all of a layer's scores.
        plain = where.chip.platform == "gpu" and c.compute.attention in ("auto", "xla")
        self.scores = self.tokens * c.data.row_length * self.heads // m.head_dim * plain
        self.layers = m.num_layers
        self.layer = sum(math.prod(shape_of(BLOCK_DIMS[n], m)) for n in block_weights(m)) // t
        batch = step.arguments[-1]
        slots = 0 if batch.targets is None else batch.targets.shape[-1]
        self.targets = self.tokens * slots // c.data.row_length
        self.vocabulary = m.vocab_size * m.hidden_size // t if self.targets else 0
        trained = self.training and not (c.train.head_only or adapters_of(c).lora)
        depth = c.train.last_blocks or m.num_layers
        self.trained_layers = depth if trained else 0
        self.trained_vocabulary = self.vocabulary if trained and not c.train.last_blocks else 0

    def memory(self, where: Slice) -> Memory:
        weights, optimizer, batch = argument_bytes(self.step)
        d, products = self.width, self.heads + 2 * self.keys + 2 * self.features + 2 * self.width
        everything = products + 4 * d + 2 * self.heads + self.keys + 2 * self.features
        saved = {"full": d, "matmuls": d + products, "none": everything}[self.remat]
        temporary = 2 * 2 * self.layer  # two layers' weights, gathered
        # The whole of one layer, twice: its values, and what is computed of them.
        temporary += 2 * 2 * self.tokens * everything
        # Scores and their exponentials, or these and their gradient.
        temporary += 2 * 4 * self.scores
        temporary += self.vocabulary * 2 + 3 * _HEAD_LOGITS * (self.targets > 0)
        if self.training:
            temporary += self.layers * 2 * self.tokens * saved
            # Products of a batch are never saved by remat="matmuls".
            temporary += self.layers * (4 + 2) * self.scores * (self.remat == "none")
            gradients = optimizer // 2
            temporary += gradients * (1 if self.step.parts == 1 else 2)
            temporary += 4 * self.trained_vocabulary
        total = weights + optimizer + batch + temporary
        return Memory(
            weights, optimizer, batch, 0, temporary, total, int(where.device_memory)
        )  # fmt: skip

    def sent(self) -> list[tuple[tuple[str, ...], float]]:
        """(mesh axes, bytes sent) of a step."""
        parts, f, t = self.step.parts, self.mesh["fsdp"], self.mesh["tensor"]
        n = math.prod(self.mesh[axis] for axis in ROWS)
        gathers = 2 if self.training else 1
        whole = gathers * self.layers * self.layer + 2 * self.vocabulary
        gathered = parts * 2 * whole * (f - 1) / f
        reduced = 2 * (n - 1) / n * parts
        reduced *= 2 * self.trained_layers * self.layer + 4 * self.trained_vocabulary
        sums = {"full": 6, "matmuls": 4, "none": 4}[self.remat] if self.training else 2
        summed = parts * sums * self.layers * 2 * self.tokens * self.width * 2 * (t - 1) / t
        rows = tuple(axis for axis in ROWS if self.mesh[axis] > 1) or ROWS
        return [(("fsdp",), gathered), (rows, reduced), (("tensor",), summed)]

    def traffic(self, memory: Memory) -> float:
        """Bytes read and written in a step."""
        parts, passes = self.step.parts, 1
        if self.training:
            passes = {"full": 4, "matmuls": 3, "none": 3}[self.remat]
        a_token = 2 * (12 * self.width + 3 * (self.heads + 2 * self.keys + 3 * self.features))
        layers = self.tokens * a_token + 3 * 2 * self.layer + 3 * 4 * self.scores
        layers *= passes * self.layers
        chunks = 0.0
        if self.targets:
            at_once = self.step.config.compute.logprob_chunk or max(
                256, _HEAD_LOGITS // (4 * self.vocabulary // self.width)
            )
            chunks = self.targets / at_once
        head = chunks * self.vocabulary * (2 + (2 * 2 + 2 * 4) * self.training)
        update = 4 * memory.weights + 2 * memory.optimizer if self.training else 0
        return parts * (layers + head) + update
