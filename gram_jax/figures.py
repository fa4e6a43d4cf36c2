"""Figures of a report, each a function from numbers to a Matplotlib figure.

Made with the object API: no pyplot, so no window, no backend to choose and nothing that one figure
leaves for the next. Drawn seven inches wide in nine-point type, which reads at 700 pixels; dark ink
on a transparent ground, so the page gives them a light card. Colours are Okabe and Ito's (2008),
which people with any common colour blindness tell apart; lines differ in dashes as well, and bars
stand in the order of the legend.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from matplotlib.patheffects import Normal, Stroke
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import ArrayLike

from gram_jax.evaluation import Accuracy, Floats, Reliability

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (5, 1.5, 1.5, 1.5)))
INK, SOFT, GRID = "#24292f", "#59636e", "#d8dde3"
WIDTH = 7.0
MOST_POINTS = 3000
_INTERVAL = ("value", "low", "high")

Series = Mapping[str, tuple[ArrayLike, ArrayLike]]


def loss_curves(
    series: Series, ylabel: str = "loss", floors: Mapping[str, float] | None = None
) -> Figure:
    """Values over steps, one line per label: {label: (steps [n], values [n])}.

    `floors` draws labelled dashed levels that a loss cannot get under, such as that of label
    smoothing. A value that is not finite leaves a gap.
    """
    figure, axes = _figure(height=3.4)
    _lines(axes, series, ylabel)
    floors = floors or {}
    for label, level in floors.items():
        axes.axhline(level, color=SOFT, linestyle=(0, (4, 3)), linewidth=1.1, zorder=1)
        # Under the line: the curve is above it.
        _note(axes, label, (1.0, level), offset=(-2, -3), ha="right", va="top")
    if floors:
        # Room for the label between a floor at the very bottom and the axis.
        bottom, top = axes.get_ylim()
        axes.set_ylim(min(bottom, min(floors.values()) - 0.12 * (top - bottom)), top)
    return figure


def training_accuracy(series: Series, ylabel: str = "accuracy") -> Figure:
    """Accuracy over steps, {label: (steps [n], values [n] in [0, 1])}, with the line of chance."""
    figure, axes = _figure(height=3.4)
    _lines(axes, series, ylabel)
    axes.set_ylim(max(0.0, min(0.45, axes.get_ylim()[0])), 1.02)
    _percent_with_chance(axes)
    return figure


def accuracy_bars(
    groups: Sequence[str],
    stages: Sequence[str],
    values: ArrayLike,
    low: ArrayLike,
    high: ArrayLike,
    baseline: Mapping[str, float] | None = None,
) -> Figure:
    """Accuracies with intervals, a cluster of bars per group and in it a bar per stage.

    Args:
      groups: names below the clusters, such as test sets; long ones are wrapped.
      stages: names in the legend, such as steps of training.
      values, low, high: [groups, stages] in [0, 1]; NaN draws no bar.
      baseline: accuracy of "the longer response wins" by group, drawn as a marker across the
        cluster.

    Raises ValueError where the arrays do not have that shape, or the baseline names an unknown
    group.
    """
    shape = (len(groups), len(stages))
    value_gs, low_gs, high_gs = (np.asarray(a, dtype=float) for a in (values, low, high))
    for name, array in (("values", value_gs), ("low", low_gs), ("high", high_gs)):
        if array.shape != shape:
            raise ValueError(f"{name} has shape {array.shape}: groups and stages need {shape}")
    unknown = sorted(set(baseline or {}) - set(groups))
    if unknown:
        raise ValueError(f"baseline for {unknown[0]!r}, which is none of the groups {list(groups)}")

    figure, axes = _figure(height=3.7)
    centre_g = np.arange(len(groups), dtype=float)
    width = 0.76 / len(stages)
    for stage, label in enumerate(stages):
        x = centre_g + (stage - (len(stages) - 1) / 2) * width
        value = value_gs[:, stage]
        colour = COLOURS[stage % len(COLOURS)]
        axes.bar(x, value, width * 0.94, label=label, color=colour, zorder=2)
        # Rounding may put an end of the interval a hair inside the value: a whisker has no
        # negative length.
        whiskers = np.maximum([value - low_gs[:, stage], high_gs[:, stage] - value], 0.0)
        axes.errorbar(
            x, value, yerr=whiskers, fmt="none", ecolor=INK, elinewidth=1.1, capsize=3, zorder=6
        )
        if value_gs.size <= 12:
            _write_values(axes, x, value, np.fmax(high_gs[:, stage], value))
    if baseline:
        _mark_baseline(axes, groups, baseline)
    wrap = max(8, 72 // max(1, len(groups)))
    axes.set_xticks(centre_g, [textwrap.fill(group, wrap) for group in groups])
    axes.set_xlim(-0.55, len(groups) - 0.45)
    axes.grid(visible=False, axis="x")
    axes.set_ylim(0.0, 1.1)
    axes.set_ylabel("accuracy")
    _percent_with_chance(axes)
    _legend_above(axes)
    return figure


def accuracy_rows(
    names: Sequence[str],
    accuracies: Sequence[Accuracy],
    baseline: Mapping[str, float] | None = None,
) -> Figure:
    """Accuracies with intervals, one bar below the other, for many names or long ones.

    Args:
      names: down the side, the first on top.
      accuracies: one each.
      baseline: accuracy of "the longer response wins" by name, drawn as a stroke across the bar.
    """
    figure, axes = _figure(height=0.9 + 0.3 * len(names))
    y = np.arange(len(names), dtype=float)
    value, low, high = (np.array([getattr(a, f) for a in accuracies]) for f in _INTERVAL)
    axes.barh(y, value, 0.68, color=COLOURS[0], zorder=2, label="accuracy")
    whiskers = np.maximum([value - low, high - value], 0.0)
    axes.errorbar(
        value, y, xerr=whiskers, fmt="none", ecolor=INK, elinewidth=1.1, capsize=2.5, zorder=6
    )
    marked = [place for place, name in enumerate(names) if name in (baseline or {})]
    if baseline and marked:
        level = [baseline[names[place]] for place in marked]
        ends = y[marked] - 0.4, y[marked] + 0.4
        axes.vlines(level, *ends, color="white", linewidth=4.0, zorder=4)
        axes.vlines(level, *ends, color=COLOURS[5], linewidth=2.0, zorder=5, label="longer wins")
    axes.axvline(0.5, color=SOFT, linestyle=(0, (4, 3)), linewidth=1.1, zorder=1, label="chance")
    axes.set_yticks(y, list(names))
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(0.0, 1.0)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("accuracy")
    _legend_above(axes)
    return figure


def reliability_diagram(reliability: Reliability, title: str = "") -> Figure:
    """Accuracy by bin of confidence, the diagonal of perfect calibration, and pairs by bin."""
    figure = Figure(figsize=(WIDTH, 4.6), layout="constrained")
    axes, counts = figure.subplots(2, 1, sharex=True, height_ratios=(3.2, 1.0))
    for each in (axes, counts):
        style(each)
    left, right = reliability.edges[:-1], reliability.edges[1:]
    width, filled = (right - left) * 0.9, reliability.count > 0
    x = (left + right) / 2
    axes.bar(
        x[filled],
        reliability.accuracy[filled],
        width[filled],
        color=COLOURS[0],
        zorder=2,
        label="accuracy in the bin",
    )
    axes.plot(
        [0.5, 1.0],
        [0.5, 1.0],
        color=COLOURS[5],
        linewidth=1.6,
        zorder=4,
        label="perfect calibration",
    )
    axes.plot(
        reliability.confidence[filled],
        reliability.accuracy[filled],
        "o",
        markersize=4.5,
        color="white",
        markeredgecolor=INK,
        zorder=5,
        label="at the bin's mean confidence",
    )
    axes.set_xlim(0.49, 1.01)
    axes.set_ylim(0.0, 1.05)
    axes.set_ylabel("accuracy")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    counts.bar(x, reliability.count, width, color=SOFT, zorder=2)
    counts.set_ylabel("pairs")
    counts.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    counts.set_xlabel("confidence, max(p, 1 - p)")
    counts.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    figure.align_ylabels([axes, counts])
    ece = f"ECE {100 * reliability.ece:.1f} points, {int(reliability.count.sum())} pairs"
    axes.set_title(f"{title}: {ece}" if title else ece, loc="left", pad=26, fontsize=9.5, color=INK)
    _legend_above(axes)
    return figure


def margin_histogram(margin: ArrayLike) -> Figure:
    """How many pairs have which margin, [n]; those at or below zero in another colour.

    Margins beyond the middle 99 % are counted in the outermost bins.
    """
    m = np.asarray(margin, dtype=float)
    figure, axes = _figure(height=3.0)
    reach = max(float(np.quantile(np.abs(m), 0.99)), 1e-12)
    # An even number of bins, so that zero is an edge.
    edges = np.linspace(-reach, reach, 41)
    count, _ = np.histogram(np.clip(m[m != 0], -reach, reach), edges)
    x, width = (edges[:-1] + edges[1:]) / 2, edges[1] - edges[0]
    right = x > 0
    axes.bar(x[~right], count[~right], width * 0.92, color=COLOURS[1], zorder=2, label="wrong")
    axes.bar(x[right], count[right], width * 0.92, color=COLOURS[0], zorder=2, label="right")
    axes.axvline(0.0, color=INK, linewidth=1.1, zorder=3)
    axes.axvline(
        float(m.mean()), color=SOFT, linestyle=(0, (4, 3)), linewidth=1.3, zorder=3, label="mean"
    )
    axes.set_xlabel("margin")
    axes.set_ylabel("pairs")
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    _legend_above(axes)
    return figure


def margin_over_length(margin: ArrayLike, length_difference: ArrayLike) -> Figure:
    """Margin [n] against how many tokens longer the better response is, [n], with a fitted line.

    At most `MOST_POINTS` pairs are drawn, evenly spaced in their order; the line is fitted to all.
    """
    m, d = np.asarray(margin, dtype=float), np.asarray(length_difference, dtype=float)
    figure, axes = _figure(height=3.4)
    some = np.unique(np.linspace(0, m.size - 1, min(m.size, MOST_POINTS)).astype(int))
    axes.plot(
        d[some], m[some], "o", markersize=3.2, color=COLOURS[0], alpha=0.35, markeredgewidth=0
    )
    axes.axhline(0.0, color=INK, linewidth=1.0, zorder=1)
    axes.axvline(0.0, color=INK, linewidth=1.0, zorder=1)
    if np.ptp(d) > 0:
        slope, level = np.polyfit(d, m, 1)
        ends = np.array([d.min(), d.max()])
        axes.plot(
            ends, level + slope * ends, color=COLOURS[5], linewidth=1.8, label="least squares"
        )
        _legend_above(axes)
    axes.set_xlabel("tokens of the better response less those of the worse one")
    axes.set_ylabel("margin")
    return figure


def _figure(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots()
    style(axes)
    return figure, axes


def save_svg(figure: Figure, path: Path) -> None:
    """Writes a figure as SVG; the same figure gives the same bytes, whatever day it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Ids are hashed with this salt, by default a random one.
    with matplotlib.rc_context({"svg.hashsalt": "gram_jax", "svg.fonttype": "path"}):
        figure.savefig(path, format="svg", metadata={"Date": None})


def style(axes: Axes) -> None:
    axes.patch.set_alpha(0.0)
    axes.figure.patch.set_alpha(0.0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(SOFT)
    axes.tick_params(colors=SOFT, labelcolor=INK, labelsize=9)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(fontsize=9.5, color=INK)
    axes.grid(visible=True, color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)


def _lines(axes: Axes, series: Series, ylabel: str) -> None:
    """A line per label with gaps where values are not finite; a legend if there are several."""
    for number, (label, (steps, values)) in enumerate(series.items()):
        y = np.asarray(values, dtype=float)
        axes.plot(
            np.asarray(steps),
            np.where(np.isfinite(y), y, np.nan),
            label=label,
            linewidth=1.7,
            color=COLOURS[number % len(COLOURS)],
            linestyle=DASHES[number % len(DASHES)],
            # A lone point has no line to be seen by.
            marker="o" if y.size == 1 else None,
        )
    axes.set_xlabel("step")
    axes.set_ylabel(ylabel)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(series) > 1:
        _legend_above(axes)


def _percent_with_chance(axes: Axes) -> None:
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.axhline(0.5, color=SOFT, linestyle=(0, (4, 3)), linewidth=1.1, zorder=1)
    _note(axes, "chance", (1.0, 0.5), offset=(3, 0), ha="left", va="center")


def _note(
    axes: Axes,
    text: str,
    place: tuple[float, float],
    *,
    offset: tuple[float, float],
    ha: Literal["left", "right"],
    va: Literal["top", "center"],
) -> None:
    """Soft text at (share of the width, value), moved by `offset` points."""
    axes.annotate(
        text,
        place,
        xycoords=("axes fraction", "data"),
        xytext=offset,
        textcoords="offset points",
        ha=ha,
        va=va,
        fontsize=8,
        color=SOFT,
    )


def _write_values(axes: Axes, x: Floats, value: Floats, top: Floats) -> None:
    """Each value [n] in whole per cent over its whisker, which ends at `top` [n]."""
    for bar in np.flatnonzero(np.isfinite(value)):
        text = axes.annotate(
            f"{100 * value[bar]:.0f}",
            (x[bar], top[bar]),
            xytext=(0, 2),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=8,
            color=INK,
            zorder=7,
        )
        # A halo keeps the number readable where a line runs through it.
        text.set_path_effects([Stroke(linewidth=2.5, foreground="white"), Normal()])


def _mark_baseline(axes: Axes, groups: Sequence[str], baseline: Mapping[str, float]) -> None:
    """A stroke across the cluster of each group that has a baseline."""
    x = np.array([place for place, group in enumerate(groups) if group in baseline], dtype=float)
    level = np.array([baseline[group] for group in groups if group in baseline])
    # White below, so that the stroke shows on a bar of any colour.
    axes.hlines(level, x - 0.42, x + 0.42, color="white", linewidth=4.0, zorder=4)
    axes.hlines(
        level, x - 0.42, x + 0.42, color=COLOURS[5], linewidth=2.0, zorder=5, label="longer wins"
    )


def _legend_above(axes: Axes) -> None:
    """A legend over the axes, where it hides nothing; bars first, in their own order."""
    handles, labels = axes.get_legend_handles_labels()
    order = sorted(range(len(handles)), key=lambda i: not isinstance(handles[i], BarContainer))
    axes.legend(
        [handles[i] for i in order],
        [labels[i] for i in order],
        loc="lower left",
        bbox_to_anchor=(0.0, 1.0),
        ncols=min(len(handles), 4),
        frameon=False,
        fontsize=8.5,
        labelcolor=INK,
        borderaxespad=0.2,
        handlelength=2.2,
        columnspacing=1.4,
    )
