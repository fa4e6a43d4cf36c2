"""The tables and figures of all experiments, and the page that shows them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from experiments import rlhf_report
from experiments.factor_figure import factor_figure
from experiments.factor_table import (
    factor_table,
    known_table,
    labels_table,
    levels_of,
    overview,
    subset_table,
    training_table,
)
from experiments.results import all_runs, read_left_out, read_sets
from experiments.settings import FACTORS
from gram_jax.errors import UserError
from gram_jax.figures import save_svg

RLHF = "rlhf"
"""The folder of `experiments.rlhf`, among those of tasks."""
LABELS = ("docstrings", "docstrings-labels")
"""One task with few and with many labelled pairs; its held-out pairs are the same."""
Table = Callable[[], str]
_BLOCK = re.compile(r"(<!-- (?P<name>[\w/+-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def tables(folder: Path) -> dict[str, Table]:
    """What makes each table, as Markdown, by name; a page has few of all there could be."""
    found: dict[str, Table] = {}
    for task in _tasks(folder):
        sets = read_sets(folder / task)
        runs = list(all_runs(folder / task))
        left_out = read_left_out(folder / task)
        found[f"{task}/overview"] = partial(overview, runs, sets, left_out)
        found[f"{task}/training"] = partial(training_table, runs)
        for name, factor in FACTORS.items():
            levels = levels_of(folder / task, factor)
            if levels:
                found[f"{task}/{name}"] = partial(factor_table, factor, levels, sets)
                found[f"{task}/{name}/subsets"] = partial(subset_table, levels, sets)
                found[f"{task}/{name}/known"] = partial(known_table, levels, sets)
    few, many = (folder / name for name in LABELS)
    if few.is_dir() and many.is_dir():
        readout = FACTORS["readout"]
        both = levels_of(few, readout), levels_of(many, readout)
        for level in levels_of(few, FACTORS["pairs"]):
            if level.label == "0":
                found["labels"] = partial(labels_table, level, *both, read_sets(many))
    if (folder / RLHF).is_dir():
        policies = rlhf_report.tables(folder / RLHF)
        found |= {name: partial(str, table) for name, table in policies.items()}
    return found


def draw(folder: Path, images: Path, page: str) -> int:
    """Draws the figures of factors that the page shows, and those of policies; returns how many."""
    drawn = 0
    for task in _tasks(folder):
        sets = read_sets(folder / task)
        for name, factor in FACTORS.items():
            file = f"{task}_{name}.svg"
            if f"/{file})" in page:
                levels = levels_of(folder / task, factor)
                save_svg(factor_figure(factor, levels, sets), images / file)
                drawn += 1
    if (folder / RLHF).is_dir():
        drawn += rlhf_report.draw(folder / RLHF, images)
    return drawn


def filled(page: str, found: Mapping[str, Table]) -> tuple[str, int]:
    """The page with its tables, and how many they are.

    Raises:
      UserError: the page asks for a table that there is not.
    """

    def block(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in found:
            raise UserError(f"the page has <!-- {name} -->, of which there are no runs")
        return f"{match[1]}{found[name]()}{match[3]}"

    return _BLOCK.subn(block, page)


def _tasks(folder: Path) -> list[str]:
    return sorted(path.parent.name for path in folder.glob("*/sets.json"))
