"""Tables and figures of `experiments.rlhf`, from the JSON files of its runs.

`experiments.report` puts them into docs/results.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.rlhf_best_of_n import best_of_n_kl, partial_correlation
from experiments.rlhf_curves import Place, common_kl, kl_of, place_at, proxy_gains, wins
from experiments.rlhf_figures import best_figure, gold_figure
from experiments.rlhf_results import BEST, Best, Check, Run, read_best, read_run, run_path
from experiments.rlhf_settings import REWARDS
from gram_jax.bootstrap import Interval, clustered_mean
from gram_jax.errors import UserError
from gram_jax.evaluation import Floats
from gram_jax.figures import save_svg

RESULTS = Path(__file__).parent / "results" / "rlhf"
FIGURES = Path(__file__).parents[1] / "docs" / "images" / "experiments"

LABELS = {"likelihood": "likelihood", "judge": "judge", "bradley_terry": "Bradley-Terry"}
PICKERS = {
    "likelihood": "likelihood, mean per token",
    "likelihood_sum": "likelihood, sum",
    "judge": "judge",
    "bradley_terry": "Bradley-Terry",
    "longest": "the longest",
    "gold": "the gold rule itself",
}
_SHOWN_SIZES = (1, 4, 16, 64)


class Found(NamedTuple):
    """All results of a folder.

    Attributes:
      runs: by reward, one a seed.
      best: one a seed.
    """

    runs: dict[str, list[Run]]
    best: list[Best]


def read_all(results: Path) -> Found:
    """Reads the seeds that are complete: of the runs, those with all rewards.

    Raises:
      UserError: there is none of the runs, or none of best of N.
    """
    runs: dict[str, list[Run]] = {name: [] for name in REWARDS}
    best = []
    seeds = sorted(int(path.name[4:].split("_")[0]) for path in results.glob(f"seed*_{BEST}.json"))
    for seed in seeds:
        best.append(read_best(run_path(results, seed, BEST)))
        paths = [run_path(results, seed, name) for name in REWARDS]
        if all(path.is_file() for path in paths):
            for name, path in zip(REWARDS, paths, strict=True):
                runs[name].append(read_run(path))
    if not all(runs.values()):
        raise UserError(f"{results}: no seed is complete here; run python -m experiments.rlhf")
    return Found(runs, best)


def tables(results: Path = RESULTS) -> dict[str, str]:
    """Markdown by name.

    ``rlhf/rewards``: what they get right of held-out pairs. ``rlhf/equal_kl``,
    ``rlhf/differences``: policies at the largest KL that all runs reach. ``rlhf/ends``: policies at
    the end of training. ``rlhf/best_of_n``. ``rlhf/cost``.

    Raises:
      UserError: no seed is complete.
    """
    found = read_all(results)
    places = _equal_places(found)
    ends = {name: [_end(run) for run in runs] for name, runs in found.runs.items()}
    made = {
        "rewards": _rewards_table(found),
        "equal_kl": _policies_table(found, places),
        "differences": _differences_table(found, places),
        "ends": _policies_table(found, ends),
        "best_of_n": _best_table(found.best),
        "cost": _cost_table(found),
    }
    return {f"rlhf/{name}": f"{text}\n" for name, text in made.items()}


def draw(results: Path = RESULTS, figures: Path = FIGURES) -> int:
    """Draws rlhf_gold.svg and rlhf_best_of_n.svg in a folder; returns how many.

    Raises:
      UserError: no seed is complete.
    """
    found = read_all(results)
    save_svg(gold_figure(found.runs, LABELS), figures / "rlhf_gold.svg")
    save_svg(best_figure(found.best, PICKERS), figures / "rlhf_best_of_n.svg")
    return 2


def _end(run: Run) -> Place:
    last = len(run.checks) - 1
    return Place(last, last, 0.0)


def _equal_places(found: Found) -> dict[str, list[Place]]:
    """Where each run reaches the largest KL that every one reaches."""
    curves = {name: [kl_of(run) for run in runs] for name, runs in found.runs.items()}
    kl = common_kl([curve for of_reward in curves.values() for curve in of_reward])
    return {name: [place_at(curve, kl) for curve in each] for name, each in curves.items()}


def _rewards_table(found: Found) -> str:
    rows = []
    for name, runs in found.runs.items():
        row = [LABELS[name]]
        for which in ("in", "out"):
            each = [run.facts["reward_accuracy"][which] for run in runs]
            text = ", ".join(f"{a['value']:.3f} [{a['low']:.3f}, {a['high']:.3f}]" for a in each)
            row.append(text)
        rows.append(row)
    return _table(["reward", "packages trained on, by seed", "packages never seen, by seed"], rows)


def _policies_table(found: Found, places: Mapping[str, Sequence[Place]]) -> str:
    header = [
        "reward", "KL, nats", "steps", "win rate against the start", "by seed",
        "win rate at equal length",
        "gain in chrF", "gain in parameters named", "gain of the reward itself, SD", "characters",
        "ended",
    ]  # fmt: skip
    rows = []
    for name, runs in found.runs.items():
        at = places[name]
        rows.append(
            [
                LABELS[name],
                _by_seed([p.of(kl_of(r)) for r, p in zip(runs, at, strict=True)], ".2f"),
                _by_seed([p.of([c.step for c in r.checks]) for r, p in zip(runs, at, strict=True)]),
                _interval(_pooled(runs, at, _wins)),
                _by_seed([_wins(r, p).mean() for r, p in zip(runs, at, strict=True)], ".3f"),
                _interval(_pooled(runs, at, _equal_wins)),
                _interval(_pooled(runs, at, _gain), signed=True),
                _interval(_pooled(runs, at, _named_gain), signed=True),
                _by_seed([_proxy_gain(r, p) for r, p in zip(runs, at, strict=True)], "+.2f"),
                _by_seed([_mean(r, p, "characters") for r, p in zip(runs, at, strict=True)]),
                _by_seed([_mean(r, p, "finished") for r, p in zip(runs, at, strict=True)], ".2f"),
            ]
        )
    start = next(iter(found.runs.values()))
    first = Place(0, 0, 0.0)
    lengths = _by_seed([_mean(run, first, "characters") for run in start])
    ended = _by_seed([_mean(run, first, "finished") for run in start], ".2f")
    rows.append(["(the start)", "0", "0", "0.500", "", "0.500", "0", "0", "0", lengths, ended])
    return _table(header, rows)


def _differences_table(found: Found, places: Mapping[str, Sequence[Place]]) -> str:
    """Rewards two by two at equal KL, on the same prompts of the same seeds."""
    rows = []
    for one, other in (
        ("likelihood", "bradley_terry"), ("judge", "bradley_terry"), ("likelihood", "judge"),
    ):  # fmt: skip
        row = [f"{LABELS[one]} less {LABELS[other]}"]
        for value in (_wins, _equal_wins, _gain):
            values, clusters = [], list[str]()
            for a, b, p, q in zip(
                found.runs[one], found.runs[other], places[one], places[other], strict=True
            ):
                values.append(value(a, p) - value(b, q))
                clusters += a.prompts
            row.append(_interval(clustered_mean(np.concatenate(values), clusters, seed=0), True))
        rows.append(row)
    return _table(["rewards", "win rate", "win rate at equal length", "chrF"], rows)


def _wins(run: Run, place: Place) -> Floats:
    """Against the start, [P]."""
    start = run.checks[0].gold
    return place.of([wins(check.gold, start) for check in run.checks])


def _equal_wins(run: Run, place: Place) -> Floats:
    """By chrF at equal length, [P]."""
    start = run.checks[0].equal
    return place.of([wins(check.equal, start) for check in run.checks])


def _gain(run: Run, place: Place) -> Floats:
    """Of gold over the start, [P]."""
    gold = np.array([np.mean(check.gold, axis=1) for check in run.checks])
    return place.of(gold - gold[0])


def _named_gain(run: Run, place: Place) -> Floats:
    """Of the parameters named, [P]; NaN where a prompt has none."""

    def means(check: Check) -> list[float]:
        return [np.nan if each is None else float(np.mean(each)) for each in check.named]

    named = np.array([means(check) for check in run.checks])
    return place.of(named - named[0])


def _proxy_gain(run: Run, place: Place) -> float:
    return float(place.of(proxy_gains(run)))


def _mean(run: Run, place: Place, field: str) -> float:
    return float(place.of([np.mean(getattr(check, field)) for check in run.checks]))


def _pooled(runs: Sequence[Run], places: Sequence[Place], value: object) -> Interval:
    """The mean over all seeds, with an interval clustered by prompt; NaN are left out."""
    assert callable(value)
    found = np.concatenate([value(run, place) for run, place in zip(runs, places, strict=True)])
    prompts = [prompt for run in runs for prompt in run.prompts]
    kept = np.isfinite(found)
    clusters = [prompt for prompt, keep in zip(prompts, kept, strict=True) if keep]
    return clustered_mean(found[kept], clusters, seed=0)


def _best_table(best: Sequence[Best]) -> str:
    sizes = best[0].sizes
    shown = [sizes.index(size) for size in _SHOWN_SIZES if size in sizes and size > 1]
    last = sizes[shown[-1]]
    header = [
        "picked by",
        *(f"gain in chrF, N = {sizes[k]} ({best_of_n_kl(sizes[k]):.1f} nats)" for k in shown),
        f"gain at equal length, N = {last}",
        f"gain in parameters named, N = {last}",
        "rank correlation with chrF",
        "with length",
        "with chrF, length held fixed",
    ]
    rows = []
    for picker, label in PICKERS.items():
        gains = [_best_gain(best, "gold", picker, k) for k in shown]
        gains += [_best_gain(best, rule, picker, shown[-1]) for rule in ("equal", "named")]
        cells = [_interval(gain, signed=True) for gain in gains]
        cells += [_correlation(best, rule, picker) for rule in _CORRELATIONS]
        rows.append([label, *cells])
    first, first_equal = (
        np.mean([np.array(getattr(one, rule)["gold"])[:, 0].mean() for one in best])
        for rule in ("gold", "equal")
    )
    note = f"One sample: chrF {first:.3f}, at equal length {first_equal:.3f}."
    return f"{_table(header, rows)}\n\n{note}"


def _best_gain(best: Sequence[Best], rule: str, picker: str, size: int) -> Interval:
    """Over a single sample, mean over prompts and seeds; prompts that the rule has no number for
    are left out."""
    return _mean_of_known(
        (prompt, None if curve is None else curve[size] - curve[0])
        for one in best
        for prompt, curve in zip(one.prompts, getattr(one, rule)[picker], strict=True)
    )


_CORRELATIONS = ("correlation", "length_correlation", "partial")
_KNOWN_BEFOREHAND = {
    ("gold", "correlation"), ("gold", "partial"), ("longest", "length_correlation"),
    ("longest", "partial"),
}  # fmt: skip


def _correlation(best: Sequence[Best], rule: str, picker: str) -> str:
    """Mean over prompts and seeds; an empty cell where it is known beforehand."""
    if (picker, rule) in _KNOWN_BEFOREHAND:
        return ""
    pairs = [
        pair
        for one in best
        for pair in zip(one.prompts, _of_prompts(one, rule, picker), strict=True)
    ]
    return _interval(_mean_of_known(pairs), signed=True)


def _of_prompts(one: Best, rule: str, picker: str) -> list[float | None]:
    if rule != "partial":
        found: list[float | None] = getattr(one, rule)[picker]
        return found
    partial: list[float | None] = []
    for a, c, bc in zip(
        one.correlation[picker], one.length_correlation[picker], one.correlation["longest"],
        strict=True,
    ):  # fmt: skip
        unknown = a is None or c is None or bc is None
        partial.append(None if unknown else partial_correlation(a, c, bc))  # type: ignore[arg-type]
    return partial


def _mean_of_known(pairs: Iterable[tuple[str, float | None]]) -> Interval:
    known = [(prompt, value) for prompt, value in pairs if value is not None]
    values = np.array([value for _, value in known])
    return clustered_mean(values, [prompt for prompt, _ in known], seed=0)


def _cost_table(found: Found) -> str:
    rows = []
    for name, runs in found.runs.items():
        rows.append(
            [
                LABELS[name],
                _by_seed([run.facts["seconds"]["stage_1"] for run in runs]),
                _by_seed([run.facts["seconds"]["stage_2"] for run in runs]),
                _by_seed([run.facts["seconds"]["grpo"] for run in runs]),
                _by_seed([run.facts["seconds"]["checks"] for run in runs]),
                _by_seed([run.facts["seconds"]["processor"] for run in runs]),
            ]
        )
    header = [
        "seconds, by seed", "stage 1", "stage 2", "GRPO", "checks of the policy",
        "processor, of both",
    ]  # fmt: skip
    table = _table(header, rows)
    best = _by_seed([one.facts["seconds"]["best_of_n"] for one in found.best])
    start = _by_seed([one.facts["seconds"]["start"] for one in found.best])
    return f"{table}\n\nSamples of the start: {start} s; rewards and gold of best of N: {best} s."


def _by_seed(values: Sequence[float | Floats], form: str = ".0f") -> str:
    return ", ".join(f"{float(value):{form}}" for value in values)


def _interval(value: Interval, signed: bool = False) -> str:
    sign = "+" if signed else ""
    return f"{value.value:{sign}.3f} [{value.low:{sign}.3f}, {value.high:{sign}.3f}]"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
