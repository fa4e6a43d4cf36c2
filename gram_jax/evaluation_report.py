"""What people read of an evaluation: tables on a console, results.md and report.html."""

from __future__ import annotations

from collections.abc import Mapping

from gram_jax.benchmarks import Official
from gram_jax.bootstrap import DRAWS
from gram_jax.evaluation import Accuracy
from gram_jax.evaluation_input import EvaluationInput
from gram_jax.evaluation_results import ALL, Facts, PairTable, Results, SubsetResult
from gram_jax.figures import (
    accuracy_rows,
    margin_histogram,
    margin_over_length,
    reliability_diagram,
)
from gram_jax.report import Cell, Report, Table
from gram_jax.reporting import duration, human

_ACCURACY_NOTE = (
    "Ties count one half. Intervals are 95 %: Wilson's, or, where pairs share a prompt (marked *),"
    f" a bootstrap of {DRAWS:,} draws of prompts. `longer wins` is what preferring the response of"
    " more tokens gets, `shorter right` this model's accuracy where the better response is the"
    " shorter one, `length corr.` the correlation of the margin with the difference in length."
)


def console(facts: Facts, given: EvaluationInput, results: Results) -> str:
    """All tables, and every count of what was not as it should be."""
    parts = ["\n".join(_facts_lines(facts, given))]
    tables = (accuracy_table(results), calibration_table(results), kind_table(results))
    parts += map(str, tables)
    if any(found.interval == "bootstrap" for found in results.subsets.values()):
        parts[1] += f"\n* pairs share prompts: interval by bootstrap, {DRAWS:,} draws of prompts"
    for one in results.official:
        parts.append("\n".join([one.title, str(official_table(one)), *_official_notes(one)]))
    return "\n\n".join(parts)


def markdown(facts: Facts, given: EvaluationInput, results: Results) -> str:
    """The same tables, to be pasted."""
    parts = [f"## {facts.checkpoint}", "\n".join(f"- {x}" for x in _facts_lines(facts, given))]
    parts += [accuracy_table(results).markdown(), _ACCURACY_NOTE]
    parts += [calibration_table(results).markdown(), kind_table(results).markdown()]
    for one in results.official:
        parts += [f"### {one.title}", official_table(one).markdown(), *_official_notes(one)]
    return "\n\n".join(parts) + "\n"


def accuracy_table(results: Results) -> Table:
    """Accuracy by subset beside the baseline of length."""
    headers = ["subset", "pairs", "accuracy [95 %]", "ties", "longer wins", "shorter right"]
    headers += ["length corr."]
    rows: list[list[Cell]] = []
    for name, found in shown(results).items():
        pairs = found.pairs
        mark = "*" if found.interval == "bootstrap" else ""
        rows.append(
            [
                name + mark,
                pairs.n,
                _interval(pairs.accuracy),
                pairs.ties,
                pairs.longer_wins.value if pairs.longer_wins else None,
                pairs.shorter_chosen.value if pairs.shorter_chosen else None,
                pairs.length_correlation,
            ]
        )
    if results.macro:
        macro = f"{results.macro.value:.3f} [{results.macro.low:.3f}, {results.macro.high:.3f}]"
        pairs_in_all = results.subsets[ALL].pairs.n
        rows.append(["macro*", pairs_in_all, macro, None, None, None, None])
    return Table(headers, rows)


def calibration_table(results: Results) -> Table:
    """Margins, and how far the probabilities can be taken at their word."""
    headers = ["subset", "margin mean", "margin std", "NLL", "Brier", "ECE"]
    rows: list[list[Cell]] = []
    for name, found in shown(results).items():
        p = found.pairs
        rows.append([name, p.margin_mean, p.margin_std, p.nll, p.brier, p.ece])
    return Table(headers, rows)


def kind_table(results: Results) -> Table:
    """What a judge does with the order, or what rewards there are."""
    judge = results.subsets[ALL].judge is not None
    if judge:
        headers = ["subset", "consistent", "mean p(A)", "first wins", "right shown first"]
        headers += ["right shown second", "undecided"]
    else:
        headers = ["subset", "responses", "reward mean", "std", "min", "max"]
    rows: list[list[Cell]] = []
    for name, found in shown(results).items():
        if found.judge:
            j = found.judge
            row: list[Cell] = [name, j.consistency, j.mean_first, j.first_wins]
            rows.append([*row, j.accuracy_first, j.accuracy_second, j.undecided])
        elif found.rewards:
            r = found.rewards
            rows.append([name, r.n, r.mean, r.std, r.low, r.high])
    return Table(headers, rows)


def official_table(official: Official) -> Table:
    """The sums of a benchmark in per cent, as they are published."""
    rows = [
        [one.name, one.n, None if one.value is None else f"{100 * one.value:.1f}"]
        for one in official.sums
    ]
    return Table(["sum", "items", "%"], rows)


def shown(results: Results) -> Mapping[str, SubsetResult]:
    """The subsets, and all of them together if there are several."""
    if len(results.subsets) > 2:
        return results.subsets
    return {name: found for name, found in results.subsets.items() if name != ALL}


def report(facts: Facts, given: EvaluationInput, results: Results, table: PairTable) -> Report:
    """The page."""
    page = Report(
        "Evaluation of a reward model",
        f"`{facts.checkpoint}`, reward: {facts.kind}, {facts.pairs:,} pairs",
    )
    page.section("What was done", "\n\n".join(_facts_lines(facts, given)))
    files: list[list[Cell]] = [
        [file.name, file.benchmark, file.rows, ", ".join(s[:12] for s in file.sha256.values())]
        for file in given.files
    ]
    page.table(Table(["data", "benchmark", "rows", "SHA-256 begins with"], files))
    page.section("Accuracy", _ACCURACY_NOTE)
    page.table(accuracy_table(results))
    _add_bars(page, results)
    for one in results.official:
        page.section(f"{one.title}, its own sums", "\n\n".join(_official_notes(one)))
        page.table(official_table(one))
    page.section(
        "Calibration and margins",
        f"p(the better response is better) is sigmoid({facts.beta:g} x margin), where the margin is"
        " the reward of the better response less that of the worse one."
        if facts.kind != "judge"
        else "p(the better response is better) is the mean over both orders of the probability of"
        " its label; the margin is the mean over both orders of its log-odds. mean p(A) is 0.5 for"
        " a judge that does not care what is shown first.",
    )
    page.table(calibration_table(results))
    page.table(kind_table(results))
    page.figure(
        reliability_diagram(results.reliability, "all pairs"),
        "Accuracy against confidence. Where circles lie on the line, p can be taken at its word.",
        "Reliability diagram: accuracy by bin of confidence, and pairs in each bin",
    )
    page.figure(
        margin_histogram(table.margin),
        "How many pairs have which margin; to the right of zero they are right.",
        "Histogram of the margins, split at zero into right and wrong",
    )
    page.figure(
        margin_over_length(table.margin, table.chosen_length - table.rejected_length),
        "Margin against how many tokens longer the better response is. A cloud that rises to the"
        " right belongs to a model that rewards length.",
        "Scatter of margin against length difference",
    )
    page.section("Settings", "All that decides the numbers; `results.json` has the rest.")
    settings = [[name, str(value)] for name, value in facts.settings.items()]
    page.table(Table(["setting", "value"], settings))
    return page


def _add_bars(page: Report, results: Results) -> None:
    found = shown(results)
    longer = {name: one.pairs.longer_wins for name, one in found.items()}
    page.figure(
        accuracy_rows(
            list(found),
            [one.pairs.accuracy for one in found.values()],
            {name: one.value for name, one in longer.items() if one is not None},
        ),
        "Accuracy with 95 % intervals; the stroke is what preferring the longer response gets.",
        "Bars of accuracy by subset, each with its interval and the baseline of length",
    )


def _facts_lines(facts: Facts, given: EvaluationInput) -> list[str]:
    """What was done, with every count that a reader must know."""
    seconds = max(facts.seconds, 1e-9)
    padding = "" if facts.padding is None else f", padding {facts.padding:.1%}"
    lines = [
        f"{facts.items:,} rows of {len(given.files)} file{'s' * (len(given.files) > 1)},"
        f" {facts.responses:,} responses, {facts.pairs:,} pairs; reward: {facts.kind}",
        f"{duration(facts.seconds)} ({human(facts.pairs / seconds)} pairs/s,"
        f" {human(facts.tokens / seconds)} tokens/s{padding}), {facts.sequences:,} sequences read,"
        f" compilation {facts.compile_seconds:.1f} s",
    ]
    counts = {
        "pairs that are ties, counted one half": facts.ties,
        "rows of which something was cut to fit": facts.truncated,
        "pairs that repeat an earlier one, and count again": facts.repeated,
        "pairs of two equal responses": facts.identical,
        "pairs that are there the other way round as well": facts.contrary,
    }
    return lines + [f"{text}: {count:,}" for text, count in counts.items() if count]


def _official_notes(official: Official) -> list[str]:
    notes = []
    if official.missing:
        notes.append(
            f"Not the official sum: there is nothing of {', '.join(official.missing)}; what they"
            " enter into is left out."
        )
    if official.differs:
        notes.append(f"Other numbers of items than published: {', '.join(official.differs)}.")
    return notes


def _interval(found: Accuracy) -> str:
    return f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}]"
