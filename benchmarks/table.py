"""One table of several benchmarks' results, with the targets beside what was reached.

python -m benchmarks.table runs/benchmarks/*.json
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.results import Case, Ratio, Result, Target, ratio
from gram_jax import distributed
from gram_jax.errors import UserError
from gram_jax.report import Table


def text(result: Result) -> str:
    """One benchmark: who was how fast, and the targets."""
    lines = [f"{result.benchmark}: {result.command}"]
    for case in result.cases:
        lines += ["", f"{case.name}: {case.what}"]
        if case.points:
            lines += ["", _points(case).text()]
        if case.timings:
            lines += ["", _timings(case).text()]
            if case.difference is not None:
                lines.append(f"largest difference {case.difference:.1e}")
            lines += [
                f"{timing.side} differs by up to {timing.facts['difference']:.1e}"
                for timing in case.timings
                if "difference" in timing.facts
            ]
    if result.peak:
        found = ", ".join(f"{value / 1e9:.3g} ({name})" for name, value in result.peak.items())
        lines += ["", f"matrix products, GFLOP/s, float32 where nothing is said: {found}"]
    if any(case.targets for case in result.cases):
        lines += ["", targets([result]).text()]
    return "\n".join(lines)


def targets(results: Sequence[Result]) -> Table:
    """What was wanted and what was reached, a line each.

    The last column is what gram_jax would reach if what it computes ran at the peak.
    """
    rows = [
        (result.benchmark, case.name, target.what, _goal(target), _reached(target),
         "yes" if target.met else "no",
         None if target.at_peak is None else _amount(target.at_peak, target.unit))
        for result in results
        for case in result.cases
        for target in case.targets
    ]  # fmt: skip
    return Table(["benchmark", "case", "what", "target", "reached", "met", "at the peak"], rows)


def _timings(case: Case) -> Table:
    ours = case.timings[0]
    headers = [
        "side", "s (min-max)", f"{ours.unit}/s", f"{ours.side} is (min-max)", "compile s",
        "padding", "TFLOP", "of peak",
    ]  # fmt: skip
    rows = []
    for timing in case.timings:
        padding = timing.facts.get("padding")
        rows.append(
            (
                timing.side,
                _spread(timing.seconds),
                _rate(timing.rate),
                None if timing is ours else _times(ratio(timing.seconds, ours.seconds)),
                f"{timing.compile_seconds:.1f}" if timing.compile_seconds else None,
                None if padding is None else f"{padding:.1%}",
                f"{timing.flops / 1e12:.3g}" if timing.flops else None,
                None if timing.share is None else f"{timing.share:.1%}",
            )
        )
    return Table(headers, rows)


def _points(case: Case) -> Table:
    rows = [
        (f"{p.at:,}", p.side, _spread(p.seconds), f"{p.milliseconds:.3g}",
         f"{p.temporary_bytes / 2**20:,.0f}")
        for p in case.points
    ]  # fmt: skip
    return Table(
        [case.name, "side", "s (min-max)", f"ms a {case.points[0].unit}", "memory, MiB"], rows
    )


def _spread(seconds: Sequence[float]) -> str:
    return f"{statistics.median(seconds):.3g} ({min(seconds):.3g}-{max(seconds):.3g})"


def _rate(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def _times(found: Ratio) -> str:
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
