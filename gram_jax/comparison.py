"""Two evaluations of the same pairs: how much better the second is, and how sure that is.

The difference of the outcomes (right 1, tie one half, wrong 0) is taken pair by pair, which leaves
out what is hard or easy for both, and resampled by prompt.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from gram_jax.bootstrap import DRAWS, Interval, clustered_mean, macro_mean
from gram_jax.data.sources import read_jsonl
from gram_jax.errors import DataError, UserError
from gram_jax.evaluation import Floats
from gram_jax.evaluation_results import ALL, OUTCOMES
from gram_jax.report import Cell, Table

_VALUES = {word: value for value, word in OUTCOMES.items()}


@dataclasses.dataclass(frozen=True, slots=True)
class Difference:
    """Accuracy of the second run less that of the first, over n pairs.

    Attributes:
      first, second: the accuracies.
      difference: with its interval.
      improved, worsened: pairs whose outcome went up or down.
    """

    n: int
    first: float
    second: float
    difference: Interval
    improved: int
    worsened: int


@dataclasses.dataclass(frozen=True, slots=True)
class Comparison:
    """Differences by subset, `ALL` last, and of the mean of the subsets (None of a single one)."""

    names: tuple[str, str]
    subsets: dict[str, Difference]
    macro: Interval | None

    def text(self) -> str:
        """For a console."""
        rows: list[list[Cell]] = []
        for name, one in self.subsets.items():
            if name == ALL and len(self.subsets) == 2:
                continue
            changed = f"+{one.improved} -{one.worsened}"
            difference = _signed(one.difference)
            rows.append([name, one.n, one.first, one.second, difference, changed])
        if self.macro:
            n = self.subsets[ALL].n
            rows.append(["macro", n, None, None, _signed(self.macro), None])
        headers = ["subset", "pairs", "first", "second", "difference [95 %]", "changed"]
        return "\n".join(
            [
                f"first:  {self.names[0]}",
                f"second: {self.names[1]}",
                "",
                str(Table(headers, rows)),
                "",
                f"Differences of accuracy, second less first; 95 % intervals by a paired bootstrap,"
                f" {DRAWS:,} draws of prompts.",
            ]
        )


def compare_runs(first: str, second: str, *, seed: int = 0) -> Comparison:
    """Compares the results.jsonl of two folders.

    Raises:
      UserError: a folder has no complete results, or the pairs differ.
    """
    rows_a, rows_b = _rows(first), _rows(second)
    _check_same_pairs(first, rows_a, second, rows_b)
    a, b = (np.array([_VALUES[row["outcome"]] for row in rows]) for rows in (rows_a, rows_b))
    subset = [row["subset"] for row in rows_a]
    prompt = [row["prompt"] for row in rows_a]
    subsets = {}
    for name in dict.fromkeys(subset):
        where = [i for i, label in enumerate(subset) if label == name]
        subsets[name] = _difference(a[where], b[where], [prompt[i] for i in where], seed)
    macro = macro_mean(b - a, subset, prompt, seed=seed) if len(subsets) > 1 else None
    subsets[ALL] = _difference(a, b, prompt, seed)
    return Comparison((first, second), subsets, macro)


def _difference(a: Floats, b: Floats, prompt: list[str], seed: int) -> Difference:
    return Difference(
        n=a.size,
        first=float(a.mean()),
        second=float(b.mean()),
        difference=clustered_mean(b - a, prompt, seed=seed),
        improved=int((b > a).sum()),
        worsened=int((b < a).sum()),
    )


def _rows(folder: str) -> list[dict[str, Any]]:
    """The rows of an evaluation that was completed."""
    path = Path(folder)
    for name in ("results.json", "results.jsonl"):
        if not (path / name).is_file():
            raise UserError(f"{folder}: has no {name}; it must be the --output of an evaluation")
    rows = []
    for line, row in read_jsonl(path / "results.jsonl"):
        for field in ("pair", "prompt", "subset", "outcome"):
            if not isinstance(row.get(field), str):
                raise DataError(
                    "must be text, as an evaluation writes it",
                    file=path / "results.jsonl",
                    line=line,
                    field=field,
                )
        if row["outcome"] not in _VALUES:
            raise DataError(
                f"{row['outcome']!r} is none of {', '.join(_VALUES)}",
                file=path / "results.jsonl",
                line=line,
                field="outcome",
            )
        rows.append(row)
    return rows


def _check_same_pairs(
    first: str, rows_a: list[dict[str, Any]], second: str, rows_b: list[dict[str, Any]]
) -> None:
    if len(rows_a) != len(rows_b):
        raise UserError(
            f"{first} has {len(rows_a):,} pairs and {second} has {len(rows_b):,}: only evaluations"
            " of the same data can be compared"
        )
    for line, (a, b) in enumerate(zip(rows_a, rows_b, strict=True), start=1):
        if (a["pair"], a["subset"]) != (b["pair"], b["subset"]):
            raise UserError(
                f"line {line} of results.jsonl is another pair in {first} than in {second}: only"
                " evaluations of the same data, in the same order, can be compared"
            )


def _signed(found: Interval) -> str:
    return f"{found.value:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"
