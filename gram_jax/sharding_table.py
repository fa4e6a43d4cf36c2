"""Every array of a step and how it is split: weights, optimiser state, rows, activations."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from gram_jax.abstract_step import AbstractStep

_PACKAGE = str(Path(__file__).parent)


@dataclasses.dataclass(frozen=True, slots=True)
class ArrayRow:
    """One line of the table.

    Attributes:
      kind: "weight", "frozen weight", "optimiser", "row" or "activation".
      name: of an activation the place in the code that makes it.
      spec: the mesh axes that each dimension is split over, those of one device left out.
      bytes: per device.
    """

    kind: str
    name: str
    shape: tuple[int, ...]
    dtype: str
    spec: str
    bytes: int


def sharding_table(step: AbstractStep) -> list[ArrayRow]:
    """All arguments of a step, then the activations of one part of it; its mesh is entered."""
    batch = step.arguments[-1]
    if step.name == "train":
        state = step.arguments[0]
        groups = [
            ("weight", state.trainable),
            ("frozen weight", state.frozen),
            ("optimiser", state.opt_state),
            ("row", batch),
        ]
    else:
        groups = [("weight", step.arguments[0]), ("row", batch)]
    rows = [
        _row(kind, _name(path), leaf)
        for kind, tree in groups
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    ]
    return rows + activations(step)


def activations(step: AbstractStep) -> list[ArrayRow]:
    """What the traced step makes that is floating-point and has tokens, largest first.

    Arrays of one shape, dtype and sharding are one line. A leading dimension of layers is what is
    kept of each layer for the backward pass. Inside kernels nothing is listed.
    """
    length = step.config.data.row_length
    weights = {leaf.shape for leaf in jax.tree.leaves(step.arguments)}
    found: dict[tuple[Any, ...], ArrayRow] = {}
    for equation in _equations(step.trace().jaxpr.jaxpr):
        for variable in equation.outvars:
            aval = variable.aval
            if not jnp.issubdtype(aval.dtype, jnp.floating) or length not in aval.shape:
                continue
            if aval.ndim < 3 or aval.shape in weights:
                continue
            if any(kind != AxisType.Explicit for kind in aval.sharding.mesh.axis_types):
                continue  # left to the compiler, within one operation of JAX
            row = _row("activation", _place(equation), aval)
            found.setdefault((row.shape, row.dtype, row.spec), row)
    return sorted(found.values(), key=lambda row: -row.bytes)


def _row(kind: str, name: str, leaf: Any) -> ArrayRow:
    local = leaf.sharding.shard_shape(leaf.shape)
    sizes = leaf.sharding.mesh.shape

    def axes(entry: Any) -> str:
        names = entry if isinstance(entry, tuple) else (entry,)
        return "+".join(name for name in names if name and sizes[name] > 1) or "-"

    whole = (None,) * (len(leaf.shape) - len(leaf.sharding.spec))
    spec = ", ".join(map(axes, (*leaf.sharding.spec, *whole)))
    size = math.prod(local) * leaf.dtype.itemsize
    return ArrayRow(kind, name, tuple(leaf.shape), str(leaf.dtype), spec, size)


def _name(path: tuple[Any, ...]) -> str:
    """``stacks.0.q`` of a pytree path, the parts of wrappers left out, places in them too."""
    parts = [str(getattr(k, "name", getattr(k, "key", getattr(k, "idx", "")))) for k in path]
    named = [part for part in parts if part not in ("", "value", "inner_state")]
    return ".".join(itertools.dropwhile(str.isdecimal, named))


def _equations(jaxpr: Any) -> Iterator[Any]:
    """All equations on whole arrays, those of loops and calls included."""
    for equation in jaxpr.eqns:
        yield equation
        if equation.primitive.name in ("shard_map", "pallas_call"):
            continue
        for value in equation.params.values():
            for one in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(one, "jaxpr", one)
                if hasattr(inner, "eqns"):
                    yield from _equations(inner)


def _place(equation: Any) -> str:
    """``decoder.py:171 project``: the innermost line of this package that made an array, those of
    `mesh` left out, which only says how it is split."""
    traceback = equation.source_info.traceback
    for frame in traceback.frames if traceback else ():
        file = Path(frame.file_name).name
        if frame.file_name.startswith(_PACKAGE) and file != "mesh.py":
            return f"{file}:{frame.line_num} {frame.function_name.rpartition('.')[2]}"
    return str(equation.primitive.name)
