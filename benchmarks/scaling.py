"""How a step grows from 8 chips to the largest slice at fixed work per chip: compiled, not run.

  python -m benchmarks.scaling --output=docs/images/scaling.svg

For each slice the training step of configs/llama_1b_pretrain.py is planned with as many rows per
chip (python -m gram_jax.plan), and what one device computes, holds, sends and moves is drawn over
the number of chips, relative to the smallest slice. Flat is perfect. Plans are kept in --plans, and
those that are there are not made again.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from absl import app, flags
from matplotlib.figure import Figure

from gram_jax.chips import parse_topology
from gram_jax.figures import save_svg

_TOPOLOGIES = flags.DEFINE_list(
    "topologies", ["v5e:2x4", "v5e:4x8", "v5e:8x8", "v5e:16x16"], "Slices, the smallest first."
)
_ROWS = flags.DEFINE_integer("rows_per_chip", 8, "Rows of a step on one chip.", lower_bound=1)
_PLANS = flags.DEFINE_string("plans", "runs/scaling", "Folder of the plans.")
_OUTPUT = flags.DEFINE_string("output", "docs/images/scaling.svg", "Figure to write.")

QUANTITIES = {
    "products": lambda plan: plan["flops"],
    "memory held": lambda plan: plan["memory"]["total"],
    "memory traffic": lambda plan: plan["traffic"],
    "bytes sent": lambda plan: plan["sent"],
    "least time": lambda plan: plan["roofline"]["step"],
}
"""What is drawn, of one device and step."""


def make_plan(topology: str, rows_per_chip: int, folder: Path) -> dict[str, Any]:
    """The plan of a slice, made in a process of its own unless it is there."""
    file = folder / f"{topology.replace(':', '-')}-{rows_per_chip}.json"
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        rows = rows_per_chip * parse_topology(topology).chips
        command = [
            sys.executable, "-m", "gram_jax.plan", "--config=configs/llama_1b_pretrain.py",
            f"--topology={topology}", f"--config.train.batch_rows={rows}",
            "--config.train.accumulate=1", f"--json={file}",
        ]  # fmt: skip
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def relative(plans: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Each quantity of each plan over that of the first."""
    return {name: [of(p) / of(plans[0]) for p in plans] for name, of in QUANTITIES.items()}


def figure(plans: list[dict[str, Any]]) -> Figure:
    """Quantities over chips."""
    made = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = made.subplots()
    chips = [plan["chips"] for plan in plans]
    for (name, values), marker in zip(relative(plans).items(), "os^Dv", strict=True):
        axes.plot(chips, values, marker=marker, label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(chips, [str(n) for n in chips])
    axes.set_ylim(bottom=0)
    axes.set_xlabel(f"chips ({plans[0]['topology'].partition(':')[0]})")
    axes.set_ylabel(f"per device, relative to {chips[0]} chips")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    axes.set_title("Compiled, not measured; fixed work per chip", fontsize=10)
    return made


def main(_: list[str]) -> None:
    folder = Path(_PLANS.value)
    plans = [make_plan(topology, _ROWS.value, folder) for topology in _TOPOLOGIES.value]
    print("| slice | products, TFLOP | memory, GiB | traffic, GB | sent, GB | least time, ms |")
    print("| --- | --- | --- | --- | --- | --- |")
    for plan in plans:
        print(
            f"| {plan['topology']} | {plan['flops'] / 1e12:.1f} |"
            f" {plan['memory']['total'] / 2**30:.2f} | {plan['traffic'] / 1e9:.0f} |"
            f" {plan['sent'] / 1e9:.2f} | {plan['roofline']['step'] * 1e3:.0f} |"
        )
    save_svg(figure(plans), Path(_OUTPUT.value))


if __name__ == "__main__":
    app.run(main)
