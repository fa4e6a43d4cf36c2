"""One table of several benchmarks' results, with the targets beside what was reached.

python -m benchmarks.table runs/benchmarks/*.json
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.results import Case, Ratio, Result, Target, Timing, ratio
from gram_jax import distributed
from gram_jax.errors import UserError
from gram_jax.report import Table


def text(result: Result) -> str:
    """One benchmark: who was how fast, and the targets."""
    lines = [f"{result.benchmark}: {result.command}"]
    for case in result.cases:
        lines += ["", f"{case.name}: {case.what}"]
        if case.timings:
            lines += ["", _timings(case).text(), f"largest difference {case.difference:.1e}"]
    if result.peak:
        found = ", ".join(f"{value / 1e9:.3g} ({name})" for name, value in result.peak.items())
        lines += ["", f"matrix products, GFLOP/s, float32 but for the last: {found}"]
    return "\n".join([*lines, "", targets([result]).text()])


def targets(results: Sequence[Result]) -> Table:
    """What was wanted and what was reached, a line each."""
    rows = [
        (result.benchmark, case.name, target.what, _goal(target), _reached(target),
         "yes" if target.met else "no")
        for result in results
        for case in result.cases
        for target in case.targets
    ]  # fmt: skip
    return Table(["benchmark", "case", "what", "target", "reached", "met"], rows)


def _timings(case: Case) -> Table:
    headers = [
        "side", "s (min-max)", f"{case.timings[0].unit}/s", "gram_jax is (min-max)", "compile s",
        "padding",
    ]  # fmt: skip
    ours = case.timings[0]
    rows = []
    for timing in case.timings:
        times = f"{timing.median:.3g} ({min(timing.seconds):.3g}-{max(timing.seconds):.3g})"
        padding = timing.facts.get("padding")
        rows.append(
            (
                timing.side,
                times,
                _rate(timing.rate),
                _times(ratio(timing.seconds, ours.seconds), timing),
                f"{timing.compile_seconds:.1f}" if timing is ours else None,
                None if padding is None else f"{padding:.1%}",
            )
        )
    return Table(headers, rows)


def _rate(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def _times(found: Ratio, timing: Timing) -> str | None:
    if timing.side == "gram_jax":
        return None
    return f"{found.median:.2f}x ({found.low:.2f}-{found.high:.2f})"


def _goal(target: Target) -> str:
    return f"{'<=' if target.at_most else '>='} {_amount(target.goal, target.unit)}"


def _reached(target: Target) -> str:
    spread = ""
    if target.low is not None and target.high is not None:
        low, high = (_amount(value, target.unit) for value in (target.low, target.high))
        spread = f" ({low}-{high})"
    return f"{_amount(target.reached, target.unit)}{spread}"


def _amount(value: float, unit: str) -> str:
    return f"{value:.1%}" if unit == "%" else f"{value:.2f}{unit}"


def _main() -> None:
    """Prints the table of the files that are named."""
    try:
        results = [Result.read(Path(name)) for name in sys.argv[1:]]
        if not results:
            raise UserError("name the files: python -m benchmarks.table runs/benchmarks/*.json")
    except UserError as error:
        distributed.fail(2, f"error: {error}")
    print(targets(results).text())


if __name__ == "__main__":
    _main()
