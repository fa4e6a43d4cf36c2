"""Makes the tables and figures of docs/results.md from the runs that are kept.

  python -m experiments.report           writes docs/results.md and docs/images/experiments
  python -m experiments.report --check   status 1 if the tables there are not what the runs give

A table stands in the page between <!-- NAME --> and <!-- end -->, where NAME is TASK/FACTOR, as in
docstrings/smoothing, or one of `experiments.rlhf_report`.

Accuracy is the mean over seeds of all pairs of a set. Its interval, and that of the difference to
the base on the same pairs with the same seeds, is a bootstrap over prompts (95 %), which holds the
seeds fixed; the seeds' own accuracies stand beside it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from absl import flags

from experiments import rlhf_report
from experiments.factor_figure import factor_figure
from experiments.factor_table import factor_table, levels_of, overview
from experiments.results import RESULTS, all_runs, read_sets
from experiments.settings import FACTORS
from gram_jax import entry
from gram_jax.errors import UserError

DOCS = Path(__file__).parents[1] / "docs"
IMAGES = "images/experiments"
RLHF = "rlhf"

_PAGE = flags.DEFINE_string("page", str(DOCS / "results.md"), "Page whose tables are filled in.")
_RESULTS = flags.DEFINE_string("results", str(RESULTS), "Folder of the runs.")
_CHECK = flags.DEFINE_bool(
    "check", False, "Write nothing; say whether the page is as it should be."
)

_BLOCK = re.compile(r"(<!-- (?P<name>[\w/+-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def main(_: list[str]) -> None:
    page = Path(_PAGE.value)
    before = page.read_text(encoding="utf-8")
    found = tables(Path(_RESULTS.value))
    after = filled(before, found)
    if _CHECK.value:
        if before != after:
            raise UserError(f"{page} is not what the runs give; run python -m experiments.report")
        print(f"{page}: {len(found)} tables are what the runs give")
        return
    page.write_text(after, encoding="utf-8")
    drawn = draw(Path(_RESULTS.value), page.parent / IMAGES)
    print(f"{page}: {len(found)} tables; {drawn} figures in {page.parent / IMAGES}")


def tables(folder: Path) -> dict[str, str]:
    """All tables as Markdown, by name."""
    found = {}
    for task in _tasks(folder):
        sets = read_sets(folder / task)
        found[f"{task}/overview"] = overview(list(all_runs(folder / task)), sets)
        for name, factor in FACTORS.items():
            levels = levels_of(folder / task, factor)
            if levels:
                found[f"{task}/{name}"] = factor_table(factor, levels, sets)
    if (folder / RLHF).is_dir():
        found |= rlhf_report.tables(folder / RLHF)
    return found


def draw(folder: Path, images: Path) -> int:
    """Draws a figure per task and factor, and those of policies; returns how many."""
    images.mkdir(parents=True, exist_ok=True)
    drawn = 0
    for task in _tasks(folder):
        sets = read_sets(folder / task)
        for name, factor in FACTORS.items():
            levels = levels_of(folder / task, factor)
            if levels:
                figure = factor_figure(factor, levels, sets)
                # Without a date, the same runs give the same file.
                figure.savefig(images / f"{task}_{name}.svg", metadata={"Date": None})
                drawn += 1
    if (folder / RLHF).is_dir():
        drawn += rlhf_report.draw(folder / RLHF, images)
    return drawn


def filled(page: str, found: Mapping[str, str]) -> str:
    """The page with its tables.

    Raises:
      UserError: the page asks for a table that there is not.
    """

    def block(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in found:
            raise UserError(f"the page has <!-- {name} -->, of which there are no runs")
        return f"{match[1]}{found[name]}{match[3]}"

    return _BLOCK.sub(block, page)


def _tasks(folder: Path) -> list[str]:
    return sorted(path.parent.name for path in folder.glob("*/sets.json"))


if __name__ == "__main__":
    entry.run(main, one_process=True)
