"""Runs two sides in turn, compares their numbers, and says how long each took.

Every side works in a process of its own, and waits while another works. First each is warmed up;
then they take turns, so that whatever else the machine does meets all of them. Repetitions are
compared with the one beside them, and medians with medians.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks.results import Case, Result, Target, Timing, largest_difference, ratio
from benchmarks.worker import Answer
from gram_jax.errors import UserError
from gram_jax.versions import versions

ROOT = Path(__file__).resolve().parents[1]
OURS = "gram_jax"
BFLOAT16 = "bfloat16"
"""The peer's variant that rounds otherwise: shown with its difference, held to no tolerance."""
TOLERANCE = 1e-4
"""Largest |a - b| / max(1, |b|) between numbers of two sides: scores, losses, gradient norms."""

_PEERS = ("torch", "transformers")
# Threads of the side that has just finished spin for a moment before they sleep.
_PAUSE = 0.3


def say(text: str) -> None:
    """Progress, on standard error."""
    print(text, file=sys.stderr, flush=True)


class Worker:
    """A side in a process of its own; ends with the ``with`` block."""

    def __init__(self, side: str, **arguments: Any):
        """Args: side: MODULE:CLASS in `benchmarks`, made with ``arguments``."""
        self._side, command = side, [sys.executable, "-m", "benchmarks.worker"]
        self._process = subprocess.Popen(
            [*command, f"benchmarks.{side}", json.dumps(arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            # Compile time is that of a first run.
            env=os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"},
        )

        self._is_ready = False

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        if kind is not None:
            self._process.kill()
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def ready(self) -> None:
        """Waits until the side is made; sides that are started together load side by side.

        Raises:
          UserError: it cannot be made.
        """
        if not self._is_ready:
            self._answer()
            self._is_ready = True

    def call(self, method: str, *arguments: Any) -> Answer:
        """Has the side do something, and waits for it.

        Raises:
          UserError: it says that it cannot, or it ended.
        """
        assert self._process.stdin is not None
        self.ready()
        time.sleep(_PAUSE)
        try:
            print(json.dumps([method, *arguments]), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            raise self._ended() from None
        return self._answer()

    def _answer(self) -> Answer:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._ended()
        answer = Answer(**json.loads(line))
        if answer.error:
            raise UserError(answer.error)
        return answer

    def _ended(self) -> UserError:
        status = self._process.wait()
        return UserError(f"benchmarks.{self._side} ended with status {status}; see its error above")


def check_peer() -> None:
    """Raises UserError, which says what to install, if the peer is not there."""
    missing = [name for name in _PEERS if not _is_installed(name)]
    if missing:
        raise UserError(
            f"{' and '.join(missing)} missing, which gram_jax is measured against; install with"
            " `pip install torch --index-url https://download.pytorch.org/whl/cpu` and then"
            " `pip install -e '.[test]'`, or run `make bench`"
        )


def compare(
    ours: Worker,
    peers: dict[str, tuple[Worker, str]],
    *,
    repetitions: int,
    work: float,
    unit: str,
    flops: dict[str, float],
    peak: dict[str, float],
    warm_up_counts: bool = False,
) -> tuple[list[Timing], float]:
    """Warms the sides up, lets them take turns, and compares their numbers.

    Args:
      ours: gram_jax's side.
      peers: by name, another side and which of its variants.
      repetitions: how often each runs, warm-up left out.
      work, unit: what a run does, and in what.
      flops: that a run of each side needs.
      peak: what :func:`measure_peak` found.
      warm_up_counts: the numbers of the warm-up must agree, too.

    Returns:
      The timings, ours first, and the largest relative difference of any number, but of BFLOAT16.

    Raises:
      UserError: the numbers differ by more than TOLERANCE: they did not compute the same.
    """
    calls: dict[str, tuple[Worker, tuple[str, ...]]] = {OURS: (ours, ())}
    calls |= {name: (worker, (variant,)) for name, (worker, variant) in peers.items()}
    warm = {name: worker.call("warm_up", *which) for name, (worker, which) in calls.items()}
    for name, answer in warm.items():
        say(f"  warm-up of {name}: {answer.seconds:.1f} s {answer.facts}")
    difference = agree(warm) if warm_up_counts else 0.0
    rounding = 0.0
    runs: dict[str, list[Answer]] = {name: [] for name in calls}
    for repetition in range(repetitions):
        answers = {name: worker.call("run", *which) for name, (worker, which) in calls.items()}
        difference = max(difference, agree(answers))
        if BFLOAT16 in answers:
            pair = answers[OURS].numbers, answers[BFLOAT16].numbers
            rounding = max(rounding, largest_difference(*pair))
        times = ", ".join(f"{name} {answer.seconds:.2f} s" for name, answer in answers.items())
        say(f"  {repetition + 1}/{repetitions}: {times}")
        for name, answer in answers.items():
            runs[name].append(answer)
            if answer.compile_seconds:
                say(f"  {name} compiled again, which its time includes")
    timings = [
        Timing(
            side=name,
            seconds=[answer.seconds for answer in runs[name]],
            work=work,
            unit=unit,
            compile_seconds=warm[name].compile_seconds,
            warm_up_seconds=warm[name].seconds,
            facts={
                **warm[name].facts,
                **runs[name][-1].facts,
                **({"difference": rounding} if name == BFLOAT16 else {}),
            },
            flops=flops[name],
            peak=peak[_LIBRARY.get(name, "PyTorch")],
        )
        for name in calls
    ]
    return timings, difference


def agree(answers: dict[str, Answer]) -> float:
    """The largest relative difference between the numbers of gram_jax and any other float32 side.

    Raises:
      UserError: it is more than TOLERANCE.
    """
    largest = 0.0
    for name, answer in answers.items():
        if name == BFLOAT16:
            continue
        difference = largest_difference(answers[OURS].numbers, answer.numbers)
        if difference > TOLERANCE:
            raise UserError(
                f"{OURS} and {name} did not compute the same: of {len(answers[OURS].numbers)} and"
                f" {len(answer.numbers)} numbers the largest relative difference is"
                f" {difference:.2g}, and {TOLERANCE:.0e} is allowed; a time would mean nothing"
            )
        largest = max(largest, difference)
    return largest


_LIBRARY = {OURS: "XLA", BFLOAT16: "PyTorch bfloat16"}


def has_bfloat16(peak: dict[str, float]) -> bool:
    """Whether the processor has instructions for it: without, it is a hundred times slower."""
    return peak["PyTorch bfloat16"] > peak["PyTorch"]


def measure_peak(ours: Worker, peer: Worker, size: int) -> dict[str, float]:
    """FLOP/s of matrix products of this size, by library, in float32 and in bfloat16."""
    ours.ready()
    peer.ready()
    peak = {}
    for name, side in (("XLA", ours), ("PyTorch", peer)):
        peak[name], peak[f"{name} bfloat16"] = side.call("peak", size).numbers
    found = ", ".join(f"{name} {value / 1e9:.3g} GFLOP/s" for name, value in peak.items())
    say(f"  matrix products: {found}")
    return peak


def speed_target(goal: float, timings: Sequence[Timing], peer: str) -> Target:
    """A target for how many times as long the side named ``peer`` takes."""
    by_name = {timing.side: timing for timing in timings}
    ours = by_name[OURS]
    found = ratio(by_name[peer].seconds, ours.seconds)
    return Target(
        what=f"speed, {peer} = 1",
        goal=goal,
        reached=found.median,
        unit="x",
        low=found.low,
        high=found.high,
        at_peak=found.median / ours.share if ours.share else None,
    )


def result(benchmark: str, command: str, peak: dict[str, float], cases: list[Case]) -> Result:
    """A result with the machine, the versions and the date."""
    return Result(
        benchmark=benchmark,
        command=command,
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        machine=machine(),
        versions={**versions(), **{name: metadata.version(name) for name in _PEERS}},
        peak=peak,
        cases=cases,
    )


def machine() -> dict[str, Any]:
    """Processor, cores that may be used, and memory in GiB."""
    processor = platform.processor() or platform.machine()
    details = Path("/proc/cpuinfo")
    if details.is_file():
        with details.open(encoding="utf-8") as lines:
            names = (line.partition(":")[2].strip() for line in lines if line[:10] == "model name")
            processor = next(names, processor)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "processor": processor,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory, 1),
        "system": platform.system(),
    }


def _is_installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True
