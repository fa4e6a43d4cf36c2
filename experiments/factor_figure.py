"""The figure of a factor: accuracy at each level on every held-out set, with the seeds."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from experiments.factor_table import Level, cell, longer
from experiments.results import HeldOut
from experiments.settings import Factor
from gram_jax.figures import COLOURS, INK, SOFT, WIDTH, style


def factor_figure(factor: Factor, levels: Sequence[Level], sets: Mapping[str, HeldOut]) -> Figure:
    """A panel per set, side by side; the bar is the interval, a small dot is a seed."""
    figure = Figure(figsize=(WIDTH, 0.9 + 0.42 * len(levels)), layout="constrained")
    panels = figure.subplots(1, len(sets), sharey=True, squeeze=False)[0]
    y = np.arange(len(levels))
    for axes, (name, held_out) in zip(panels, sets.items(), strict=True):
        style(axes)
        cells = [cell(level, name, held_out) for level in levels]
        value = np.array([one.accuracy.value for one in cells])
        low = np.array([one.accuracy.low for one in cells])
        high = np.array([one.accuracy.high for one in cells])
        whiskers = np.maximum([value - low, high - value], 0.0)
        axes.errorbar(
            value, y, xerr=whiskers, fmt="o", color=COLOURS[0], ecolor=COLOURS[0], markersize=6,
            elinewidth=1.6, capsize=3, zorder=4, label="mean of seeds, 95 %",
        )  # fmt: skip
        for place, one in zip(y, cells, strict=True):
            axes.plot(
                one.seeds, [place + 0.24] * len(one.seeds), ".", color=SOFT, markersize=4, zorder=3
            )
        axes.axvline(
            longer(held_out).value, color=COLOURS[5], linewidth=1.6, zorder=2, label="longer wins"
        )
        axes.axvline(0.5, color=SOFT, linestyle=(0, (4, 3)), linewidth=1.1, zorder=1)
        axes.set_title(name, fontsize=9.5, color=INK)
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.grid(visible=False, axis="y")
    panels[0].set_yticks(y, [textwrap.fill(level.label, 22) for level in levels])
    panels[0].set_ylim(len(levels) - 0.4, -0.6)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside upper center", ncols=2, frameon=False, fontsize=9,
        labelcolor=INK,
    )  # fmt: skip
    return figure
