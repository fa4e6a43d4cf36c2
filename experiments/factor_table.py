"""The table of a factor: accuracy at each level, and its difference to the base."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.results import HeldOut, outcomes, read_runs, stacked
from experiments.settings import Factor, Setting
from gram_jax.bootstrap import Interval, clustered_mean

Run = dict[str, Any]
_WIDE = 2
"""Sets for which a table has columns of everything."""


class Level(NamedTuple):
    """A level of a factor, and what was run of it and of the factor's base, by seed."""

    label: str
    is_base: bool
    runs: dict[int, Run]
    base: dict[int, Run]


class Cell(NamedTuple):
    """What a level gave on a set.

    Attributes:
      accuracy: mean over seeds, interval over prompts.
      seeds: the accuracy of each seed.
      gain: over the base on the same pairs and seeds; None of the base itself.
    """

    accuracy: Interval
    seeds: list[float]
    gain: Interval | None


def levels_of(folder: Path, factor: Factor) -> list[Level]:
    """The levels that were run; none where only the base was."""
    base = read_runs(folder, factor.base)
    found = [
        Level(label, setting == factor.base, runs, _of_every_seed(base, runs))
        for label, setting in factor.levels.items()
        if (runs := read_runs(folder, setting))
    ]
    return found if any(not level.is_base for level in found) else []


def _of_every_seed(base: dict[int, Run], seeds: Iterable[int]) -> dict[int, Run]:
    """The base, for these seeds as well if it is a published model that was not trained."""
    run = next(iter(base.values()), None)
    if run is None or run["training"] or not run["scale"].get("pretrained"):
        return base
    return dict.fromkeys(seeds, run)


def cell(level: Level, name: str, held_out: HeldOut) -> Cell:
    """What a level gave on the set ``name``."""
    runs = [level.runs[seed] for seed in sorted(level.runs)]
    found = stacked(runs, name)
    accuracy = clustered_mean(found.mean(axis=0), held_out.prompts, seed=0)
    gain = None
    if not level.is_base and set(level.runs) & set(level.base):
        gain = _gain(level.runs, level.base, name, held_out)
    return Cell(accuracy, found.mean(axis=1).tolist(), gain)


def _gain(
    ours: Mapping[int, Run], theirs: Mapping[int, Run], name: str, held_out: HeldOut
) -> Interval:
    """The difference of accuracy on the pairs of a set, over the seeds that both have."""
    both = sorted(set(ours) & set(theirs))
    found = [stacked([runs[seed] for seed in both], name) for runs in (ours, theirs)]
    return clustered_mean((found[0] - found[1]).mean(axis=0), held_out.prompts, seed=0)


def longer(held_out: HeldOut) -> Interval:
    """The accuracy of preferring the response of more tokens."""
    return clustered_mean(outcomes(held_out.longer), held_out.prompts, seed=0)


def factor_table(factor: Factor, levels: Sequence[Level], sets: Mapping[str, HeldOut]) -> str:
    """Markdown: a row per level, with accuracy and gain on each set; what the paper says.

    Two sets have a column for the gain and one for the accuracy of each seed. Of more, the gain
    stands below the accuracy, and the seeds are in the figure only.
    """
    wide = len(sets) <= _WIDE
    head = [factor.title]
    for name in sets:
        head += [f"{name} [95 %]", "seeds", "over the base"] if wide else [f"{name} [95 %]"]
    lines = [_row(head), _row(["---"] * len(head))]
    for level in levels:
        row = [f"**{level.label}**" if level.is_base else level.label]
        for name, held_out in sets.items():
            one = cell(level, name, held_out)
            accuracy = _interval(one.accuracy)
            gain = "–" if one.gain is None else _interval(one.gain, sign="+")
            seeds = ", ".join(f"{a:.3f}" for a in one.seeds)
            row += [accuracy, seeds, gain] if wide else [f"{accuracy}<br>{gain}"]
        lines.append(_row(row))
    row = ["longer wins (tokens)"]
    for held_out in sets.values():
        row += [_interval(longer(held_out)), *(["", ""] if wide else [])]
    lines.append(_row(row))
    lines += ["", f"What GRAM reports: {factor.paper[0].lower()}{factor.paper[1:]}"]
    if factor.note:
        lines += ["", factor.note]
    return "\n".join(lines) + "\n"


def labels_table(
    none: Level, few: Sequence[Level], many: Sequence[Level], sets: Mapping[str, HeldOut]
) -> str:
    """Markdown: levels with few and with many labelled pairs, on the same held-out pairs.

    Args:
      none: the base without labels, beside the level that is the base.
      few, many: levels of one factor at two scales; compared where both have one.
    """
    head = ["readout", "labels", "set", "none [95 %]", "few [95 %]", "many [95 %]"]
    head += ["many less few", "many less none"]
    lines = [_row(head), _row(["---"] * len(head))]
    before = {level.label: level for level in few}
    for level in many:
        if level.label not in before:
            continue
        small = before[level.label]
        counts = " and ".join(f"{_labels(one):,}" for one in (small, level))
        for name, held_out in sets.items():
            levels = [none, small, level] if level.is_base else [small, level]
            cells = [_interval(cell(one, name, held_out).accuracy) for one in levels]
            gains = [
                _interval(_gain(level.runs, one.runs, name, held_out), sign="+")
                for one in reversed(levels[:-1])
            ]
            missing = [] if level.is_base else ["–"]
            lines.append(_row([level.label, counts, name, *missing, *cells, *gains, *missing]))
    return "\n".join(lines) + "\n"


def _labels(level: Level) -> int:
    """Labelled pairs that stage 2 read."""
    run = next(iter(level.runs.values()))
    return int(run["configs"]["stage 2"]["train"]["length"])


def subset_table(levels: Sequence[Level], sets: Mapping[str, HeldOut]) -> str:
    """Markdown: a row per subset of each set, with the accuracy at each level."""
    labels = [f"**{one.label}**" if one.is_base else one.label for one in levels]
    head = ["set", "subset", "pairs", *labels, "longer wins"]
    lines = [_row(head), _row(["---"] * len(head))]
    for name, held_out in sets.items():
        for subset in sorted(set(held_out.subsets)):
            chosen = np.array([one == subset for one in held_out.subsets])
            prompts = np.array(held_out.prompts)[chosen]
            found = [
                stacked([level.runs[seed] for seed in sorted(level.runs)], name)[:, chosen]
                for level in levels
            ]
            found.append(outcomes(held_out.longer)[None, chosen])
            means = [_interval(clustered_mean(one.mean(axis=0), prompts, seed=0)) for one in found]
            lines.append(_row([name, subset, str(chosen.sum()), *means]))
    return "\n".join(lines) + "\n"


def known_table(levels: Sequence[Level], sets: Mapping[str, HeldOut]) -> str:
    """Markdown: a row for the pairs of each set that share words with the text, and for the rest.

    Of the sets of which it is known (`HeldOut.known`).
    """
    names = ("shares no 8 words with the text", "shares 8 words or more")
    split = {
        name: dataclasses.replace(one, subsets=[names[int(digit)] for digit in one.known])
        for name, one in sets.items()
        if one.known
    }
    return subset_table(levels, split)


def overview(runs: Sequence[Run], sets: Mapping[str, HeldOut], left_out: Mapping[str, int]) -> str:
    """Markdown: what was run, on what, what was too long for it, and what it cost."""
    dates = sorted({run["time"][:10] for run in runs})
    seeds = sorted({run["seed"] for run in runs})
    parameters = sorted({run["parameters"] for run in runs})
    pairs = [
        f"{name} {len(one.prompts):,} of {len(set(one.prompts)):,} prompts"
        for name, one in sets.items()
    ]
    rows = [
        ("runs", f"{len(runs)}, of seeds {', '.join(map(str, seeds))}"),
        ("parameters", ", ".join(f"{n:,}" for n in parameters)),
        ("held-out pairs", "; ".join(pairs)),
        *([("left out as too long", _counts(left_out))] if left_out else []),
        ("cost", f"{_seconds(runs) / 60:.0f} core-minutes"),
        ("dates", " to ".join(dict.fromkeys((dates[0], dates[-1])))),
        ("versions", ", ".join(f"{k} {v}" for k, v in runs[0]["versions"].items())),
    ]
    return "\n".join([_row(["", ""]), _row(["---"] * 2), *map(_row, rows)]) + "\n"


def training_table(runs: Sequence[Run]) -> str:
    """Markdown: what stage 2 ended with on its own last batch, a row per setting, by seed."""
    names = ("ranking_loss", "accuracy", "margin")
    found: dict[str, list[Run]] = {}
    for run in runs:
        if "stage 2" in run["training"]:
            found.setdefault(Setting(**run["setting"]).name, []).append(run["training"]["stage 2"])
    head = ["setting", "steps", "ranking loss", "accuracy", "mean D"]
    lines = [_row(head), _row(["---"] * len(head))]
    for setting, stages in found.items():
        cells = [", ".join(f"{one['metrics'][name]:.3f}" for one in stages) for name in names]
        lines.append(_row([setting, ", ".join(str(one["steps"]) for one in stages), *cells]))
    return "\n".join(lines) + "\n"


def _seconds(runs: Sequence[Run]) -> float:
    """Of all stages and evaluations; a stage 1 that runs share counts once."""
    shared = {_key(run): run["training"] for run in runs}
    first = [
        stage["wall_seconds"]
        for training in shared.values()
        for name, stage in training.items()
        if name != "stage 2"
    ]
    second = [run["training"].get("stage 2", {}).get("wall_seconds", 0.0) for run in runs]
    return sum(first) + sum(second) + sum(run["evaluation_seconds"] for run in runs)


def _key(run: Run) -> tuple[Any, ...]:
    """Runs of one key share their stage 1."""
    setting = run["setting"]
    return (run["seed"], setting["stage_1"], setting["tokens"], setting["width"])


def _counts(rows: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in rows.items())


def _interval(found: Interval, sign: str = "") -> str:
    return f"{found.value:{sign}.3f} [{found.low:{sign}.3f}, {found.high:{sign}.3f}]"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
