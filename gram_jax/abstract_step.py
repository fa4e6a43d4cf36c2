"""The step of a config without its arrays: the jitted function, and descriptions of its arguments.

Built by the functions that build the real one, for devices that need not be here, or for a mesh
of none (``AbstractMesh``).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gram_jax.checkpoints import find_step_folder, read_run_info
from gram_jax.config import Config, ModelConfig
from gram_jax.data.examples import row_shape
from gram_jax.data.shapes import kind_of
from gram_jax.data.stage import stage_layout
from gram_jax.errors import UserError
from gram_jax.hf import is_hf_folder, read_config
from gram_jax.mesh import activation_spec, check_divides
from gram_jax.models.adapters import adapters_of, attach
from gram_jax.models.decoder import abstract_decoder
from gram_jax.readouts import Readout
from gram_jax.rows import Batch, RowShape, empty_row
from gram_jax.scorer import default_batch_rows
from gram_jax.scoring import score_rows, scoring_shape
from gram_jax.training import (
    TrainState,
    flops_per_token,
    make_optimizer,
    make_train_step,
    split_model,
)

STEPS = ("train", "score")
_LABELS = (0, 1)
"""A judge's labels are columns of the unembedding; which two changes nothing here."""


@dataclasses.dataclass(frozen=True)
class AbstractStep:
    """A step that can be compiled, but not run.

    Attributes:
      name: one of `STEPS`.
      config: with the model's own shape.
      function: the jitted step.
      arguments: what it is called with, as descriptions.
      static: its static arguments.
      rows: rows of a step, over all devices, and ``parts`` that they are computed in.
      flops: FLOPs that the model needs for a step, over all devices; nothing computed twice.
    """

    name: str
    config: Config
    function: Any
    arguments: tuple[Any, ...]
    static: dict[str, Any]
    rows: int
    parts: int
    flops: float

    @property
    def tokens(self) -> int:
        """Token places of a step."""
        return self.rows * self.config.data.row_length

    def trace(self) -> Any:
        """The traced function: ``.jaxpr``, and ``.lower()``; its mesh must be entered."""
        return self.function.trace(*self.arguments, **self.static)


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    Attributes:
      weights, optimizer: of the state, and ``batch`` of the rows; together the arguments.
      output: what a step returns, less what it returns in the place of an argument.
      temporary: activations, gradients and gathered weights at the fullest moment.
      total: what has to be there at once; of a program that does not fit, what the compiler says.
      limit: what the compiler may use.
    """

    weights: int
    optimizer: int
    batch: int
    output: int
    temporary: int
    total: int
    limit: int

    @property
    def fits(self) -> bool:
        return self.total <= self.limit

    @property
    def missing(self) -> int:
        """Bytes by which it does not fit."""
        return max(self.total - self.limit, 0)


def with_model(config: Config) -> Config:
    """The config with the shape of the model that it starts from, if that folder is here.

    Raises:
      UserError: it is not, and the config does not say the shape either.
    """
    if not config.init_from:
        return config
    folder = Path(config.init_from)
    if is_hf_folder(folder):
        return dataclasses.replace(config, model=read_config(folder)[0])
    if folder.exists():
        model = read_run_info(find_step_folder(folder)).config.model
        return dataclasses.replace(config, model=model)
    if config.model == ModelConfig():
        raise UserError(
            f"config.init_from={config.init_from!r} is not here, and config.model does not say the"
            " model's shape; name a folder that is here, or a config with a shape"
        )
    return config


def abstract_step(config: Config, mesh: Mesh | AbstractMesh, name: str = "train") -> AbstractStep:
    """The training or scoring step of a config on a mesh; the mesh must be entered.

    Raises:
      UserError: a dimension does not divide by its axis.
    """
    return _train(config, mesh) if name == "train" else _score(config, mesh)


def _train(config: Config, mesh: Mesh | AbstractMesh) -> AbstractStep:
    c, layout = config, stage_layout(config)
    parts = c.train.accumulate
    check_divides(cast(Mesh, mesh), c.model, c.train.batch_rows // parts)
    model = abstract_decoder(c.model, c.compute, cast(Mesh, mesh))
    model = attach(model, adapters_of(c), c.seed)
    graph, trainable, frozen = split_model(model, c.train)
    # The length of a schedule is a number in the program, not a shape.
    tx = make_optimizer(c.optimizer, steps=1000)
    state = TrainState(
        jax.ShapeDtypeStruct((), np.int32), trainable, frozen, jax.eval_shape(tx.init, trainable)
    )
    state = jax.tree.map(lambda x: _placed(x, mesh), state)
    shape = row_shape(c.data, layout)
    readout = None
    if layout.pairs:
        labels = _LABELS if layout.reading == "judge" else None
        readout = Readout(layout.reading, shape.sequences, labels)
    batch = abstract_batch(
        shape,
        (parts, c.train.batch_rows // parts),
        mesh,
        branches=layout.pairs or (c.data.format != "auto" and kind_of(c.data.format) != "text"),
        reference=bool(c.data.reference_field),
    )
    function = make_train_step(graph, tx, c.objective, readout)
    places = c.train.batch_rows * c.data.row_length
    targets = shape.targets / shape.tokens
    flops = places * flops_per_token(c.model, c.train, c.data.row_length, targets)
    return AbstractStep(
        "train", c, function, (state, batch), {}, c.train.batch_rows, parts, flops
    )  # fmt: skip


def _score(config: Config, mesh: Mesh | AbstractMesh) -> AbstractStep:
    """As ``python -m gram_jax.score`` computes by default: all target slots, rows per device."""
    c, reading = config, stage_layout(config).reading
    reading = "likelihood" if reading == "text" else reading
    length = c.data.row_length
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = default_batch_rows(length, shards, "tpu")
    check_divides(cast(Mesh, mesh), c.model, rows)
    model = abstract_decoder(c.model, c.compute, cast(Mesh, mesh))
    adapters = dataclasses.replace(adapters_of(c), lora=None)  # merged when it was loaded
    model = attach(model, adapters, c.seed)
    shape = scoring_shape(length, reading)
    readout = Readout(reading, shape.sequences, _LABELS if reading == "judge" else None)
    batch = abstract_batch(shape, (rows,), mesh, branches=True)
    targets = shape.targets / shape.tokens
    flops = rows * length * c.model.flops_per_token(length, targets_per_token=targets)
    static = {"readout": readout, "per_token": False}
    return AbstractStep("score", c, score_rows, (model, batch), static, rows, 1, flops)


def abstract_batch(
    shape: RowShape,
    leading: tuple[int, ...],
    mesh: Mesh | AbstractMesh,
    *,
    branches: bool,
    reference: bool = False,
) -> Batch:
    """Descriptions of [*leading, ...] rows, split over the mesh as those that are read are."""
    row = empty_row(shape, reference=reference)
    if not branches:
        row.branch_ids = None
    spec = P(*(None,) * (len(leading) - 1), *activation_spec("B"))
    place: Callable[[Any], Any] = lambda leaf: jax.ShapeDtypeStruct(  # noqa: E731
        (*leading, *leaf.shape), leaf.dtype, sharding=NamedSharding(mesh, spec)
    )
    return cast(Batch, jax.tree.map(place, row))


def _placed(leaf: Any, mesh: Mesh | AbstractMesh) -> jax.ShapeDtypeStruct:
    """The same description, on the mesh's devices; whole where it does not say how it is split."""
    spec = leaf.sharding.spec if isinstance(leaf.sharding, NamedSharding) else P()
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))


def argument_bytes(step: AbstractStep) -> tuple[int, int, int]:
    """Bytes per device of a step's weights, its optimiser's state and its rows."""
    if step.name == "score":
        model, batch = step.arguments
        return bytes_per_device(model), 0, bytes_per_device(batch)
    state, batch = step.arguments
    weights = bytes_per_device((state.trainable, state.frozen))
    return weights, bytes_per_device((state.step, state.opt_state)), bytes_per_device(batch)


def bytes_per_device(tree: Any) -> int:
    """Bytes that one device holds of described arrays."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )
