"""Makes the tables and figures of docs/results.md from the runs that are kept.

  python -m experiments.report           writes docs/results.md and docs/images/experiments
  python -m experiments.report --check   status 2 if the tables there are not what the runs give

A table stands in the page between <!-- NAME --> and <!-- end -->, where NAME is TASK/FACTOR, as in
docstrings/smoothing, or one of `experiments.rlhf_report`.

Accuracy is the mean over seeds of all pairs of a set. Its interval, and that of the difference to
the base on the same pairs with the same seeds, is a bootstrap over prompts (95 %), which holds the
seeds fixed; the seeds' own accuracies stand beside it.
"""

from __future__ import annotations

from pathlib import Path

from absl import flags

from experiments.page import draw, filled, tables
from experiments.results import RESULTS
from gram_jax import entry
from gram_jax.errors import UserError

DOCS = Path(__file__).parents[1] / "docs"
IMAGES = "images/experiments"

_PAGE = flags.DEFINE_string("page", str(DOCS / "results.md"), "Page whose tables are filled in.")
_RESULTS = flags.DEFINE_string("results", str(RESULTS), "Folder of the runs.")
_CHECK = flags.DEFINE_bool(
    "check", False, "Write nothing; say whether the page is as it should be."
)


def main(_: list[str]) -> None:
    page = Path(_PAGE.value)
    before = page.read_text(encoding="utf-8")
    after, count = filled(before, tables(Path(_RESULTS.value)))
    if _CHECK.value:
        if before != after:
            raise UserError(f"{page} is not what the runs give; run python -m experiments.report")
        print(f"{page}: {count} tables are what the runs give")
        return
    page.write_text(after, encoding="utf-8")
    drawn = draw(Path(_RESULTS.value), page.parent / IMAGES, after)
    print(f"{page}: {count} tables; {drawn} figures in {page.parent / IMAGES}")


if __name__ == "__main__":
    entry.run(main, one_process=True)
