"""What people and programs read of a plan: tables on a console, and JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from jax.sharding import AbstractMesh
from rich.console import Console
from rich.table import Table

from gram_jax.abstract_step import AbstractStep, Memory
from gram_jax.arithmetic import Estimate
from gram_jax.chips import Slice
from gram_jax.collectives import grouped
from gram_jax.planning import Compiled
from gram_jax.reporting import duration
from gram_jax.roofline import DAY, Roofline
from gram_jax.sharding_table import ArrayRow

COMPILED = "Compiled, not measured: nothing here has run on these chips."
ARITHMETIC = "By arithmetic alone: neither compiled nor measured."

Plan = Compiled | Estimate


def console() -> Console:
    """Where tables go; wide where it is a file."""
    found = Console()
    return found if found.is_terminal else Console(width=140)


def gib(size: float) -> str:
    return f"{size / 2**30:,.2f} GiB"


def print_plan(plan: Plan, where: Slice, tokens: float, out: Console) -> None:
    """All tables of one step on one slice."""
    step, c = plan.step, plan.step.config
    compiled = isinstance(plan, Compiled)
    axes = ", ".join(f"{axis}={size}" for axis, size in plan.mesh.shape.items())
    out.print(
        f"{step.name} step of {c.objective.name}: {c.model.family},"
        f" {c.model.num_parameters():,} parameters, on {where.name}: {where.chips} chips, mesh"
        f" {axes}; {step.rows} rows of {c.data.row_length:,} tokens a step, in"
        f" {step.parts} {'parts' if step.parts > 1 else 'part'}, remat {c.compute.remat}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    out.print(COMPILED if compiled else ARITHMETIC, highlight=False)
    out.print(memory_table(plan.memory, where))
    if plan.roofline is None:
        return
    if isinstance(plan, Compiled):
        out.print(collective_table(plan))
    out.print(roofline_table(plan, where, tokens))


def memory_table(memory: Memory, where: Slice) -> Table:
    table = Table(title=f"Memory per device, {where.chip.name}", title_justify="left")
    table.add_column("what")
    table.add_column("bytes", justify="right")
    for name, size in (
        ("weights", memory.weights),
        ("optimiser", memory.optimizer),
        ("rows", memory.batch),
        ("output, beyond arguments", memory.output),
        ("activations, gradients, gathered weights", memory.temporary),
        ("total", memory.total),
        ("there is", memory.limit),
    ):
        table.add_row(name, gib(size))
    verdict = "fits" if memory.fits else f"does NOT fit: {gib(memory.missing)} too much"
    table.add_row(verdict, f"{memory.total / memory.limit:.0%}")
    return table


def collective_table(plan: Compiled) -> Table:
    table = Table(title="Exchanges per device and step", title_justify="left")
    for name in ("kind", "axes", "dtype"):
        table.add_column(name)
    table.add_column("of bytes", justify="right")
    table.add_column("sent", justify="right")
    for c in grouped(plan.collectives or []):
        table.add_row(c.kind, " x ".join(c.axes), c.dtype, gib(c.whole), gib(c.sent))
    return table


def roofline_table(plan: Plan, where: Slice, tokens: float) -> Table:
    r = plan.roofline
    assert r is not None and plan.traffic is not None
    chip = where.chip
    table = Table(title=f"Roofline of a step: bound by {r.bound_by}", title_justify="left")
    table.add_column("what")
    table.add_column("per device", justify="right")
    table.add_column("time", justify="right")
    peak = f"{where.device_flops / 1e12:,.0f} TFLOP/s"
    table.add_row("products", f"{plan.flops / 1e12:,.1f} TFLOP at {peak}", seconds(r.compute))
    bandwidth = f"{where.device_memory_bandwidth / 1e9:,.0f} GB/s"
    table.add_row("memory", f"{plan.traffic / 1e9:,.0f} GB at {bandwidth}", seconds(r.memory))
    links = f"up to {chip.links / chip.devices / 1e9:,.0f} GB/s"
    table.add_row("network", f"{sent_bytes(plan) / 1e9:,.1f} GB at {links}", seconds(r.network))
    table.add_row("step, at least", "the longest", seconds(r.step))
    table.add_row("MFU, at most", f"{r.model_flops / 1e12:,.1f} TFLOP needed", f"{r.mfu:.1%}")
    table.add_row("MFU if nothing overlaps", "all three added", f"{r.serial_mfu:.1%}")
    table.add_row("tokens a day, at most", "", f"{r.tokens_per_day:.3g}")
    table.add_row(f"time for {tokens:.3g} tokens, at least", "", duration(r.days(tokens) * DAY))
    return table


def seconds(value: float) -> str:
    return f"{value * 1e3:,.1f} ms" if value < 10 else f"{value:,.1f} s"


def sent_bytes(plan: Plan) -> float:
    """Bytes that a device sends in a step."""
    if isinstance(plan, Estimate):
        return plan.network_bytes
    return sum(c.sent for c in plan.collectives or [])


def print_shardings(
    rows: Sequence[ArrayRow], step: AbstractStep, mesh: AbstractMesh, out: Console
) -> None:
    sizes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    table = Table(
        title=f"Arrays of the {step.name} step on {sizes}; bytes per device", title_justify="left"
    )
    for name in ("kind", "name", "shape", "dtype", "split over"):
        table.add_column(name, overflow="fold")
    table.add_column("bytes", justify="right")
    for row in rows:
        shape = " x ".join(map(str, row.shape)) or "scalar"
        table.add_row(row.kind, row.name, shape, row.dtype, row.spec or "-", f"{row.bytes:,}")
    out.print(table)
    kinds = dict.fromkeys(row.kind for row in rows if row.kind != "activation")
    sums = [f"{k} {gib(sum(row.bytes for row in rows if row.kind == k))}" for k in kinds]
    out.print(f"In all: {', '.join(sums)}. Activations do not live all at once.")


def to_json(plan: Plan, where: Slice, tokens: float) -> dict[str, Any]:
    """The numbers of the tables, in bytes, FLOPs and seconds."""
    step, r = plan.step, plan.roofline
    values: dict[str, Any] = {
        "how": COMPILED if isinstance(plan, Compiled) else ARITHMETIC,
        "step": step.name,
        "topology": where.name,
        "chips": where.chips,
        "devices": where.devices,
        "mesh": dict(plan.mesh.shape),
        "rows": step.rows,
        "row_length": step.config.data.row_length,
        "parts": step.parts,
        "remat": step.config.compute.remat,
        "fits": plan.memory.fits,
        "memory": {**dataclasses.asdict(plan.memory), "missing": plan.memory.missing},
        "flops": plan.flops,
        "model_flops": step.flops / where.devices,
    }
    if isinstance(plan, Compiled):
        values["compile_seconds"] = plan.seconds
        values["collectives"] = [
            {**dataclasses.asdict(c), "sent": c.sent} for c in grouped(plan.collectives or [])
        ]
    if r is not None:
        values["traffic"] = plan.traffic
        values["sent"] = sent_bytes(plan)
        values["roofline"] = {**dataclasses.asdict(r), **_derived(r, tokens)}
    return values


def _derived(r: Roofline, tokens: float) -> dict[str, Any]:
    return {
        "step": r.step,
        "bound_by": r.bound_by,
        "mfu": r.mfu,
        "serial_mfu": r.serial_mfu,
        "tokens_per_day": r.tokens_per_day,
        "token_budget": tokens,
        "days": r.days(tokens),
    }
