"""Which mesh, batch and remat policy are best on a slice: many by arithmetic, the best compiled."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import jax
from rich.console import Console
from rich.progress import track
from rich.table import Table

from gram_jax.abstract_step import AbstractStep, abstract_step
from gram_jax.arithmetic import (
    Estimate,
    abstract_mesh,
    estimate_step,
    node_bandwidths,
)
from gram_jax.chips import Slice
from gram_jax.config import Config
from gram_jax.errors import UserError
from gram_jax.mesh import AXES
from gram_jax.plan_report import Plan, gib, seconds
from gram_jax.planning import axis_bandwidths, compile_step
from gram_jax.reporting import human

REMATS = ("none", "matmuls", "full")
_BATCHES = (1, 2)
"""Batches tried, as multiples of the config's."""
_MOST_TENSOR = 16
# Arithmetic of memory errs by some tens of percent, so what lacks little is tried.
_TOLERANCE = 1.15
_EXTRA_PRODUCTS = {"none": 1.0, "matmuls": 1.0, "full": 4 / 3}


def sweep(config: Config, where: Slice, name: str, compiles: int, out: Console) -> list[Plan]:
    """Plans that fit, best first, the winner printed as overrides of the config.

    Raises:
      UserError: nothing fits.
    """
    estimates = list(candidates(config, where, name, out))
    chosen = best(estimates)[:compiles]
    out.print(
        f"{len(estimates)} settings by arithmetic, {len(chosen)} of them to be compiled"
        if where.chip.platform == "tpu"
        else f"{len(estimates)} settings, by arithmetic alone",
        highlight=False,
    )
    plans: list[Plan] = list(chosen)
    if where.chip.platform == "tpu":
        progress = track(chosen, "compiling", console=out)
        plans = [compile_step(e.step.config, where, name) for e in progress]
    ranked = rank(plans)
    out.print(ranking_table(ranked, plans))
    if not ranked:
        raise UserError(
            f"--sweep: none of the {len(plans)} best settings fits {where.name}; take a larger"
            " slice, or --sweep_compiles for more of them"
        )
    out.print(f"best: {' '.join(overrides(config, ranked[0].step.config))}", soft_wrap=True)
    return ranked


def candidates(config: Config, where: Slice, name: str, out: Console) -> Iterator[Estimate]:
    """Estimates of all settings that divide as they must."""
    for mesh in track(list(meshes(config, where.devices)), "estimating", console=out):
        base = copy.deepcopy(config)
        for axis, size in mesh.items():
            setattr(base.mesh, axis, size)
        base.train.accumulate = 1
        base.train.batch_rows = max(base.train.batch_rows, mesh["data"] * mesh["fsdp"])
        abstract = abstract_mesh(base, where)
        try:
            with jax.sharding.use_abstract_mesh(abstract):
                step = abstract_step(base, abstract, name)
        except UserError:  # a dimension does not divide by its axis
            continue
        bandwidth = (
            axis_bandwidths(base, where)
            if where.chip.platform == "tpu"
            else node_bandwidths(abstract, where)
        )
        for variant in variants(step, config.train.batch_rows):
            flops = variant.flops / where.devices
            if name == "train":
                flops *= _EXTRA_PRODUCTS[variant.config.compute.remat]
            yield estimate_step(variant, abstract, where, flops, bandwidth)


def meshes(config: Config, devices: int) -> Iterator[dict[str, int]]:
    """Sizes of data, fsdp and tensor, powers of two; a further axis stays as the config has it."""
    fixed = {a: getattr(config.mesh, a) for a in AXES if a not in ("data", "fsdp", "tensor")}
    rest = devices
    for size in fixed.values():
        rest //= max(size, 1)
    powers = [2**i for i in range(rest.bit_length())]
    for data, tensor in itertools.product(powers, powers):
        if rest % (data * tensor) == 0 and tensor <= _MOST_TENSOR:
            yield {"data": data, "fsdp": rest // (data * tensor), "tensor": tensor, **fixed}


def variants(step: AbstractStep, batch_rows: int) -> Iterator[AbstractStep]:
    """The step with other batches, parts and remat policies; a scoring step as it is."""
    if step.name == "score":
        yield step
        return
    shards = step.config.mesh.data * step.config.mesh.fsdp
    for factor, remat in itertools.product(_BATCHES, REMATS):
        rows = factor * batch_rows
        if rows % shards:
            continue
        parts = 1
        while rows % (parts * shards) == 0:
            config = copy.deepcopy(step.config)
            config.compute = dataclasses.replace(config.compute, remat=remat)
            config.train.batch_rows, config.train.accumulate = rows, parts
            flops = step.flops * rows / step.rows
            yield dataclasses.replace(step, config=config, rows=rows, parts=parts, flops=flops)
            parts *= 2


def best(estimates: Sequence[Estimate]) -> list[Estimate]:
    """Those that may fit, by time per token; of equal bounds the one with less in all."""
    fitting = [e for e in estimates if e.memory.total <= _TOLERANCE * e.memory.limit]
    return sorted(fitting, key=_time)


def rank(plans: Sequence[Plan]) -> list[Plan]:
    """Those that fit, by roofline time per token."""
    return sorted((p for p in plans if p.memory.fits and p.roofline), key=_time)


def _time(plan: Plan) -> tuple[float, float]:
    r = plan.roofline
    assert r is not None
    return r.seconds_per_token, (r.compute + r.memory + r.network) / r.tokens


def overrides(old: Config, new: Config) -> list[str]:
    """Flags that make the settings of a sweep of a config."""
    flags = [f"--config.mesh.{axis}={getattr(new.mesh, axis)}" for axis in AXES]
    for holder, field in (("train", "batch_rows"), ("train", "accumulate"), ("compute", "remat")):
        before, after = (getattr(getattr(c, holder), field) for c in (old, new))
        if before != after:
            flags.append(f"--config.{holder}.{field}={after}")
    return flags


def ranking_table(ranked: Sequence[Plan], plans: Sequence[Plan]) -> Table:
    table = Table(title="Best first; those that do not fit last", title_justify="left")
    for name in ("mesh", "rows", "parts", "remat"):
        table.add_column(name)
    for name in ("memory", "step", "bound by", "MFU at most", "tokens a day"):
        table.add_column(name, justify="right")
    for plan in [*ranked, *(p for p in plans if p not in ranked)]:
        mesh = " ".join(f"{axis}={size}" for axis, size in plan.mesh.shape.items() if size > 1)
        setting = (mesh, str(plan.step.rows), str(plan.step.parts), plan.step.config.compute.remat)
        r = plan.roofline
        if r is None or not plan.memory.fits:
            table.add_row(*setting, f"{gib(plan.memory.missing)} too much", "", "", "", "")
            continue
        table.add_row(
            *setting, gib(plan.memory.total), seconds(r.step), r.bound_by, f"{r.mfu:.1%}",
            human(r.tokens_per_day),
        )  # fmt: skip
    return table
