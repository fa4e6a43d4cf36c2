"""What a benchmark found: times, ratios, and the targets they are held against."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gram_jax.errors import UserError


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A goal, and what was reached.

    Attributes:
      what: in a few words.
      goal: the least that is wanted; or the most, with ``at_most``.
      reached: the same, measured.
      unit: written after both: ``x``, or ``%`` of what are shares here.
      low, high: the spread of ``reached`` over the repetitions, None where there is none.
      at_peak: ``reached`` if gram_jax's operations ran at the speed of matrix products; None where
        that is not what is measured.
    """

    what: str
    goal: float
    reached: float
    unit: str
    at_most: bool = False
    low: float | None = None
    high: float | None = None
    at_peak: float | None = None

    @property
    def met(self) -> bool:
        return self.reached <= self.goal if self.at_most else self.reached >= self.goal


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """The runs of one side.

    Attributes:
      side: its name.
      seconds: of each repetition, in order.
      work: units done in a repetition.
      unit: such as ``tokens``.
      compile_seconds: of tracing and compiling, before.
      warm_up_seconds: of all that was done before, compiling included.
      facts: how it was done: places computed, padding, sizes of batches.
      flops: that a repetition needs (`benchmarks.needed`); 0 where they are not counted.
      peak: FLOP/s of matrix products by the side's library.
    """

    side: str
    seconds: list[float]
    work: float
    unit: str
    compile_seconds: float
    warm_up_seconds: float
    facts: dict[str, Any]
    flops: float = 0.0
    peak: float = 0.0

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def share(self) -> float | None:
        """Of the peak that was reached, by the median."""
        return self.flops / (self.median * self.peak) if self.flops else None

    @property
    def rate(self) -> float:
        """Units a second, by the median."""
        return self.work / self.median


@dataclasses.dataclass(frozen=True, slots=True)
class Ratio:
    """How many times as long one side takes: of the medians, and its spread over repetitions."""

    median: float
    low: float
    high: float


def ratio(slower: Sequence[float], faster: Sequence[float]) -> Ratio:
    """How many times as long ``slower`` takes; a repetition of one stands beside that of the other.

    Raises:
      ValueError: they are not equally many.
    """
    each = [a / b for a, b in zip(slower, faster, strict=True)]
    return Ratio(statistics.median(slower) / statistics.median(faster), min(each), max(each))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """The runs of one side where something that grows has reached some size.

    Attributes:
      side: its name.
      at: the size.
      seconds: of each repetition, in order.
      work: units done in a repetition.
      unit: such as ``pair``.
      temporary_bytes: that the compiled step needs beside its arguments and results.
    """

    side: str
    at: int
    seconds: list[float]
    work: int
    unit: str
    temporary_bytes: int

    @property
    def milliseconds(self) -> float:
        """A unit's, by the median."""
        return 1e3 * statistics.median(self.seconds) / self.work


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One comparison of a benchmark, or one thing that grows in it.

    Attributes:
      name: such as ``56M``.
      what: what was computed, in a sentence.
      timings: of gram_jax, first, and the others.
      difference: the largest relative difference of their numbers; None where none is compared.
      targets: goals, and what was reached.
      points: what grows, by size.
    """

    name: str
    what: str
    timings: list[Timing]
    difference: float | None
    targets: list[Target]
    points: list[Point] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A benchmark's result, with all that it takes to repeat it.

    Attributes:
      benchmark: the module's name.
      command: that made it.
      date: when, in UTC.
      machine: what it ran on.
      versions: of the packages on both sides.
      peak: FLOP/s of matrix products, by library.
      cases: the comparisons.
    """

    benchmark: str
    command: str
    date: str
    machine: dict[str, Any]
    versions: dict[str, str]
    peak: dict[str, float]
    cases: list[Case]

    def write(self, path: Path) -> None:
        """Writes it as JSON; the folder is made."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Result:
        """The inverse of `write`.

        Raises:
          UserError: the file is none of these.
        """
        try:
            values = json.loads(path.read_text("utf-8"))
            cases = [
                Case(
                    **{
                        **case,
                        "timings": [Timing(**timing) for timing in case["timings"]],
                        "targets": [Target(**target) for target in case["targets"]],
                        "points": [Point(**point) for point in case.get("points", [])],
                    }
                )
                for case in values["cases"]
            ]
            return cls(**{**values, "cases": cases})
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path}: not the result of a benchmark: {error!r}") from None


def largest_difference(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """max |a - b| / max(1, |b|); infinite where one is not finite, or they are not equally many."""
    if len(ours) != len(theirs):
        return float("inf")
    found = 0.0
    for a, b in zip(ours, theirs, strict=True):
        difference = abs(a - b) / max(1.0, abs(b))
        # A NaN is never larger than anything.
        found = max(found, difference if difference == difference else float("inf"))
    return found
