"""The quickstart's result: a table on the console, results.json, and report.html."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gram_jax.data.docstrings import KINDS
from gram_jax.evaluation import (
    Accuracy,
    PairSummary,
    accuracy,
    gain,
    longer_wins,
    reliability,
    summarise_pairs,
    win_probability,
)
from gram_jax.figures import accuracy_bars, loss_curves, reliability_diagram, training_accuracy
from gram_jax.objectives import smoothing_floor
from gram_jax.report import Report, Table
from gram_jax.reporting import duration, read_metrics

SETS = {"in": "packages trained on", "out": "packages never seen"}


@dataclasses.dataclass(frozen=True)
class Scores:
    """Of one set of pairs under one model, in the order of the file."""

    margin: npt.NDArray[np.float64]  # [n] reward(chosen) - reward(rejected), nats
    chosen_length: npt.NDArray[np.int64]  # [n] tokens
    rejected_length: npt.NDArray[np.int64]
    kinds: Sequence[str]

    def of_kind(self, kind: str) -> npt.NDArray[np.bool_]:
        return np.array([k == kind for k in self.kinds])


def print_and_save(work: Path, scores: dict[str, dict[str, Scores]], facts: dict[str, Any]) -> None:
    """Prints the tables and writes results.json and report.html into ``work``."""
    stages = list(scores)
    main_table, kinds_table = _main_table(scores), _kinds_table(scores)
    before, after = (scores[stage]["out"].margin for stage in stages[1:])
    gained = gain(before, after)
    gain_text = (
        f"Out of distribution, stage 2 gains {gained.value:+.3f} over zero-shot"
        f" (95 % interval {gained.low:+.3f} to {gained.high:+.3f}, {gained.n} pairs)."
    )
    print()
    print(main_table)
    print()
    print(kinds_table)
    print()
    print(gain_text)
    print(
        f"export {facts['export']}: reloaded, its log-probs differ by at most"
        f" {facts['export_difference']:.1e} (relative)"
    )
    print(f"report {work / 'report.html'}")
    print(f"total  {duration(facts['total_seconds'])}")
    results = {
        "facts": facts,
        "gain_out": dataclasses.asdict(gained),
        "stages": {
            stage: {name: dataclasses.asdict(_summary(s)) for name, s in found.items()}
            for stage, found in scores.items()
        },
        "kinds": {
            stage: {
                name: {
                    kind: dataclasses.asdict(accuracy(s.margin[s.of_kind(kind)])) for kind in KINDS
                }
                for name, s in found.items()
            }
            for stage, found in scores.items()
        },
    }
    (work / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    _report(work, scores, facts, (main_table, kinds_table), gain_text).save(work / "report.html")


def _summary(scores: Scores) -> PairSummary:
    return summarise_pairs(scores.margin, scores.chosen_length, scores.rejected_length)


def _interval(found: Accuracy | None) -> str | None:
    return f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}]" if found else None


def _main_table(scores: dict[str, dict[str, Scores]]) -> Table:
    """One line per set and stage, and what preferring the longer response gets."""
    rows: list[list[Any]] = []
    for name, title in SETS.items():
        for stage, found in scores.items():
            summary = _summary(found[name])
            margin = f"{summary.margin_mean:.2f}"
            rows.append([title, stage, summary.n, _interval(summary.accuracy), margin])
        some = next(iter(scores.values()))[name]
        longer = longer_wins(some.chosen_length, some.rejected_length)
        count = longer.n if longer else 0
        rows.append([title, "longer wins (tokens)", count, _interval(longer), None])
    return Table(["pairs from", "model", "pairs", "accuracy [95 %]", "mean margin"], rows)


def _kinds_table(scores: dict[str, dict[str, Scores]]) -> Table:
    """Accuracy by kind of damage: one line per kind, a column per set and stage."""
    headers = ["damage"]
    headers += [f"{name}, {stage.removeprefix('after ')}" for name in SETS for stage in scores]
    rows: list[list[Any]] = []
    for kind in KINDS:
        row: list[Any] = [kind]
        for name in SETS:
            for found in scores.values():
                margin = found[name].margin[found[name].of_kind(kind)]
                row.append(accuracy(margin).value if len(margin) else None)
        rows.append(row)
    return Table(headers, rows)


def _report(
    work: Path,
    scores: dict[str, dict[str, Scores]],
    facts: dict[str, Any],
    tables: tuple[Table, Table],
    gain_text: str,
) -> Report:
    stages = list(scores)
    beta = facts["objective"]["beta"]
    floor = smoothing_floor(facts["objective"]["label_smoothing"])
    report = Report(
        "gram_jax quickstart",
        f"{facts['parameters']:,} parameters, seed {facts['seed']}, scale {facts['scale']:g},"
        f" {duration(facts['total_seconds'])} on {facts['device']}",
    )
    report.section(
        "Result",
        "A reward model that prefers a Python object's own docstring to one that was damaged. "
        f"{facts['data']}. {gain_text}\n\nChosen and rejected have the same number of characters,"
        " so that length tells nothing; what a scorer gets that prefers the response of more"
        " tokens stands in the table.",
    )
    report.table(tables[0], "Accuracy (ties count one half) and mean margin in nats.")
    found = [[scores[stage]["out"] for stage in stages] for _ in KINDS]
    bars = [
        [accuracy(s.margin[s.of_kind(kind)]) for s in row]
        for kind, row in zip(KINDS, found, strict=True)
    ]
    some = scores[stages[0]]["out"]
    baseline = {}
    for kind in KINDS:
        where = some.of_kind(kind)
        longer = longer_wins(some.chosen_length[where], some.rejected_length[where])
        if longer is not None:
            baseline[kind] = longer.value
    report.figure(
        accuracy_bars(
            list(KINDS),
            stages,
            [[a.value for a in row] for row in bars],
            [[a.low for a in row] for row in bars],
            [[a.high for a in row] for row in bars],
            baseline,
        ),
        "Packages never seen: accuracy by kind of damage, with 95 % intervals.",
        "Bars of accuracy by kind of damage at initialisation and after each stage",
    )
    report.table(tables[1], "Accuracy by kind of damage, packages trained on and never seen.")
    report.section(
        "Training",
        "Loss in nats: the next-token loss per token in stage 1, the ranking loss per pair in stage"
        " 2 (its objective adds the chosen response's cross-entropy).",
    )
    for folder, title, loss in (
        ("pretrain", "stage 1", "loss"),
        ("finetune", "stage 2", "ranking_loss"),
    ):
        train = read_metrics(work / folder, split="train")
        held = read_metrics(work / folder, split="validation")
        series = {
            "train": ([r["step"] for r in train], [r[loss] for r in train]),
            "validation": ([r["step"] for r in held], [r[loss] for r in held]),
        }
        floors = {"smoothing's floor": floor} if folder == "finetune" else None
        report.figure(
            loss_curves(series, "nats per token" if floors is None else "nats per pair", floors),
            f"Loss of {title}.",
            f"Curve of the loss of {title} by step",
        )
    pairs = read_metrics(work / "finetune", split="train")
    report.figure(
        training_accuracy({"train": ([r["step"] for r in pairs], [r["accuracy"] for r in pairs])}),
        "Accuracy on the pairs of each step of stage 2.",
        "Curve of training accuracy by step",
    )
    report.section(
        "Calibration",
        f"p(chosen is better) = sigmoid({beta:g} x margin), on packages never seen, after stage 2.",
    )
    p = win_probability(scores[stages[-1]]["out"].margin, beta)
    report.figure(
        reliability_diagram(reliability(p), "packages never seen, after stage 2"),
        f"Reliability diagram; expected calibration error {reliability(p).ece:.3f}.",
        "Reliability diagram: accuracy against confidence",
    )
    report.section("Where things are")
    report.code(
        f"{work / 'export'}  Hugging Face folder\n{work / 'scores'}  every pair with its scores\n"
        f"{work / 'results.json'}  the numbers of this page"
    )
    return report
