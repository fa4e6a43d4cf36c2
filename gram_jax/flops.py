"""FLOPs that a traced function computes on one device: matrix products, loops and kernels included.

Counted before the compiler sees it, from the program that JAX traced: its products with their
shapes and shardings, so what is computed twice (remat) counts twice. The rest, element by element,
is left out, as it is in ``ModelConfig.flops_per_token``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def device_flops(jaxpr: Any, mesh: Mapping[str, int]) -> float:
    """FLOPs of a jaxpr on one device of a mesh with these axis sizes."""
    return sum(_equation_flops(equation, mesh) for equation in jaxpr.eqns)


def _equation_flops(equation: Any, mesh: Mapping[str, int]) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        return _product_flops(equation, mesh)
    if name == "pallas_call":
        return _kernel_flops(params, mesh)
    inner = [device_flops(jaxpr, mesh) for jaxpr in _inner(params)]
    if name == "scan":
        return float(params["length"]) * sum(inner)
    return max(inner, default=0.0) if name == "cond" else sum(inner)


def _inner(params: Mapping[str, Any]) -> list[Any]:
    """The jaxprs among an equation's parameters."""
    found = []
    for value in params.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            jaxpr = getattr(one, "jaxpr", one)
            if hasattr(jaxpr, "eqns"):
                found.append(jaxpr)
    return found


def _product_flops(equation: Any, mesh: Mapping[str, int]) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval
    depth = math.prod(left.shape[d] for d in contracted)
    split: set[str] = set()
    for variable in (*equation.invars, *equation.outvars):
        for entry in variable.aval.sharding.spec:
            split.update(entry if isinstance(entry, tuple) else (entry,) if entry else ())
    share = math.prod(mesh[axis] for axis in split)
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * depth / share


def _kernel_flops(params: Mapping[str, Any], mesh: Mapping[str, int]) -> float:
    """Of an attention kernel over a grid of query blocks, key blocks and heads, in any order.

    It visits the blocks on and below the diagonal. Those that a row's documents rule out are
    skipped as well, which depends on the data and is not counted.
    """
    grid = params["grid_mapping"].grid
    visited = 1.0
    if grid[-1] in grid[-3:-1]:
        visited = (grid[-1] + 1) / (2 * grid[-1])
    return math.prod(grid) * visited * device_flops(params["jaxpr"], mesh)
