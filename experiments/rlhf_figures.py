"""Figures of `experiments.rlhf`: reward and gold against the KL, and best of N."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.rlhf_curves import equal_gains, gold_gains, kl_of, proxy_gains
from experiments.rlhf_results import Best, Run
from gram_jax.evaluation import Floats
from gram_jax.figures import COLOURS, DASHES, INK, WIDTH, style


def gold_figure(runs: Mapping[str, Sequence[Run]], labels: Mapping[str, str]) -> Figure:
    """The reward that is trained on and two gold rules, each against the root of the KL.

    A faint line for each seed, a strong one for their mean as far as all of them go.
    """
    figure = Figure(figsize=(WIDTH, 3.0), layout="constrained")
    panels: list[tuple[str, Callable[[Run], Floats]]] = [
        ("gain of the reward, SD", proxy_gains),
        ("gain in chrF (gold)", gold_gains),
        ("gain in chrF at equal length", equal_gains),
    ]
    for axes, (ylabel, value) in zip(figure.subplots(1, 3), panels, strict=True):
        for number, (name, of_reward) in enumerate(runs.items()):
            colour, dashes = COLOURS[number], DASHES[number]
            # An estimate of KL may fall from one check to the next; lines go from left to right.
            lines = [(np.sqrt(np.maximum.accumulate(kl_of(run))), value(run)) for run in of_reward]
            for x, y in lines:
                axes.plot(x, y, color=colour, alpha=0.3, linewidth=0.9)
            x, y = _mean_line(lines)
            axes.plot(x, y, color=colour, linestyle=dashes, linewidth=2.0, label=labels[name])
        style(axes)
        axes.axhline(0.0, color=INK, linewidth=0.7)
        axes.set_xlabel("root of the KL")
        axes.set_ylabel(ylabel)
    return _finished(figure)


def best_figure(best: Sequence[Best], labels: Mapping[str, str]) -> Figure:
    """Expected gold of the best of N against N by two rules, mean over prompts and seeds."""
    figure = Figure(figsize=(WIDTH, 3.5), layout="constrained")
    rules = {"gold": "chrF of the pick (gold)", "equal": "chrF of the pick at equal length"}
    for axes, (rule, ylabel) in zip(figure.subplots(1, 2), rules.items(), strict=True):
        for number, (picker, label) in enumerate(labels.items()):
            curves = [np.array(getattr(one, rule)[picker]) for one in best]
            curve = np.concatenate(curves).mean(axis=0)
            axes.plot(
                best[0].sizes, curve, label=label, color=COLOURS[number],
                linestyle=DASHES[number % len(DASHES)], linewidth=1.7, marker="o", markersize=3,
            )  # fmt: skip
        style(axes)
        _log_axis(axes, best[0].sizes)
        axes.set_ylabel(ylabel)
    return _finished(figure)


def _mean_line(lines: Sequence[tuple[Floats, Floats]]) -> tuple[Floats, Floats]:
    """The mean of lines (x rising from 0) as far as all of them go."""
    x = np.linspace(0.0, min(float(each.max()) for each, _ in lines), 60)
    return x, np.mean([np.interp(x, *line) for line in lines], axis=0)


def _log_axis(axes: Axes, sizes: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()
    axes.set_xlabel("N")


def _finished(figure: Figure) -> Figure:
    """A white card, so that a file of its own reads on pages of any colour, and one legend."""
    figure.patch.set(facecolor="white", alpha=1.0)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside upper left", ncols=3, frameon=False, fontsize=8.5,
        labelcolor=INK,
    )  # fmt: skip
    return figure
