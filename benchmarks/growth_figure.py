"""The figure of `benchmarks.growth`: a row of panels for each thing that grows, time beside memory.

python -m benchmarks.growth_figure runs/benchmarks/growth.json docs/images/growth.svg
"""

from __future__ import annotations

import sys
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.results import Case, Result
from gram_jax import distributed
from gram_jax.errors import UserError
from gram_jax.figures import COLOURS, DASHES, INK, WIDTH, save_svg, style

_ROW_HEIGHT = 1.75  # inches
_MEBI = 2**20


def growth_figure(cases: list[Case]) -> Figure:
    """A figure with two panels a case: milliseconds a unit, and temporary MiB of a step."""
    figure = Figure(figsize=(WIDTH, _ROW_HEIGHT * len(cases) + 0.4), layout="constrained")
    grid = figure.subplots(len(cases), 2, squeeze=False)
    for case, (time_axes, memory_axes) in zip(cases, grid, strict=True):
        _panel(time_axes, case, f"ms a {case.points[0].unit}", memory=False)
        _panel(memory_axes, case, "memory, MiB", memory=True)
    # A file of its own is read on pages of any colour.
    figure.patch.set(facecolor="white", alpha=1.0)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside upper left", ncols=len(labels), frameon=False, fontsize=9,
        labelcolor=INK,
    )  # fmt: skip
    return figure


def _panel(axes: Axes, case: Case, ylabel: str, *, memory: bool) -> None:
    """A line for each side over the thing that grows, from 0 upwards."""
    sides = list(dict.fromkeys(point.side for point in case.points))
    for side, colour, dashes in zip(sides, COLOURS, DASHES, strict=False):
        points = [point for point in case.points if point.side == side]
        y = [p.temporary_bytes / _MEBI if memory else p.milliseconds for p in points]
        x = [point.at for point in points]
        axes.plot(
            x, y, label=side, color=colour, linestyle=dashes, linewidth=1.7, marker="o",
            markersize=3.5,
        )  # fmt: skip
    style(axes)
    at = sorted({point.at for point in case.points})
    if at[-1] > 8 * at[0]:
        axes.set_xscale("log", base=2)
    axes.set_xticks(at, [f"{x // 1000}k" if x >= 10_000 else f"{x}" for x in at])
    axes.minorticks_off()
    axes.set_ylim(0, 1.12 * axes.get_ylim()[1])
    axes.set_xlabel(case.name)
    axes.set_ylabel(ylabel)


def write_figure(result: Path, output: Path) -> None:
    """Draws the result of `benchmarks.growth` in a file; the folder is made.

    Raises:
      UserError: ``result`` is none.
    """
    cases = [case for case in Result.read(result).cases if case.points]
    if not cases:
        raise UserError(f"{result}: nothing grows here; give the result of benchmarks.growth")
    save_svg(growth_figure(cases), output)


def _main() -> None:
    """Draws the file that is named first in the one that is named second."""
    try:
        if len(sys.argv) != 3:
            raise UserError("name two files: python -m benchmarks.growth_figure GROWTH.json F.svg")
        write_figure(Path(sys.argv[1]), Path(sys.argv[2]))
    except UserError as error:
        distributed.fail(2, f"error: {error}")


if __name__ == "__main__":
    _main()
