"""From the start of the command to its first scores, compilation included.

  python -m benchmarks.loading [--data=FOLDER] [--small]

Each run is a process that loads a Hugging Face folder and scores a few pairs, one batch. gram_jax
does what `python -m gram_jax.score` does: once with an empty cache of compiled functions, once with
what that run left in it. transformers imports, loads, and scores the same pairs. The page cache
holds the weights, as they have just been written.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.command import finish, is_small, setting
from benchmarks.corpus import preference_rows
from benchmarks.harness import ROOT, TOLERANCE, say
from benchmarks.results import Case, Target, Timing, largest_difference
from gram_jax import entry
from gram_jax.errors import UserError
from gram_jax.report import Table

TARGET_SECONDS = 10.0
_LONGEST = 800
"""Characters of a prompt and of a response."""

FIRST, AGAIN, PEER = "gram_jax", "gram_jax again", "transformers"
_PARTS = ("imports", "input", "weights", "compile", "batch", "rest")


def main(_: list[str]) -> None:
    """Measures, prints and writes."""
    with setting("56M") as s:
        pairs = s.scratch / "pairs.jsonl"
        rows = [row for row, _ in zip(preference_rows(s.data), range(8), strict=False)]
        pairs.write_text(
            "".join(json.dumps({k: row[k][:_LONGEST] for k in row}) + "\n" for row in rows), "utf-8"
        )
        cache = s.scratch / "cache"
        runs: dict[str, list[dict[str, Any]]] = {FIRST: [], AGAIN: [], PEER: []}
        for repetition in range(s.repetitions):
            shutil.rmtree(cache, ignore_errors=True)
            for side, found in runs.items():
                found.append(_run(side, s.model, pairs, s.scratch / "scored.jsonl", cache))
            times = ", ".join(
                f"{side} {found[-1]['seconds']:.1f} s" for side, found in runs.items()
            )
            say(f"  {repetition + 1}/{s.repetitions}: {times}")
    difference = max(
        largest_difference(run["numbers"], runs[PEER][0]["numbers"])
        for found in runs.values()
        for run in found
    )
    if difference > TOLERANCE:
        raise UserError(f"{FIRST} and {PEER} did not compute the same: {difference:.2g}")
    timings = [_timing(side, found) for side, found in runs.items()]
    first, again, _peer = timings
    case = Case(
        name="tiny" if is_small() else "56M",
        what=f"start to first result: {2 * len(rows)} sequences, from a Hugging Face folder",
        timings=timings,
        difference=difference,
        targets=[
            Target(
                what="start to first result", goal=TARGET_SECONDS, reached=first.median, unit="s",
                at_most=True, low=min(first.seconds), high=max(first.seconds),
            ),
            Target(
                what="the second run, of the first's time", goal=1.0,
                reached=again.median / first.median, unit="%", at_most=True,
            ),
        ],
    )  # fmt: skip
    print(Table(["seconds", *_PARTS], [_parts_row(t) for t in timings]).text(), end="\n\n")
    finish("loading", {}, [case])


def _run(side: str, model: Path, pairs: Path, output: Path, cache: Path) -> dict[str, Any]:
    """One process from its start to its end: ``seconds``, ``parts`` of them, and ``numbers``."""
    for file in output.parent.glob(f"{output.name}*"):
        file.unlink()
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    started = time.time()
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.first_result", side.partition(" ")[0], repr(started),
         str(model), str(pairs), str(output)],
        cwd=ROOT, env=environment | {"XDG_CACHE_HOME": str(cache)},
        capture_output=True, text=True,
    )  # fmt: skip
    seconds = time.time() - started
    if done.returncode:
        raise UserError(f"{side} failed:\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout)
    found["parts"]["rest"] = seconds - sum(found["parts"].values())
    return {**found, "seconds": seconds}


def _timing(side: str, runs: list[dict[str, Any]]) -> Timing:
    parts = {
        name: statistics.median(run["parts"].get(name, 0.0) for run in runs) for name in _PARTS
    }
    return Timing(
        side=side,
        seconds=[run["seconds"] for run in runs],
        work=len(runs[0]["numbers"]),
        unit="sequences",
        compile_seconds=parts["compile"],
        warm_up_seconds=0.0,
        facts={"parts": parts},
    )


def _parts_row(timing: Timing) -> tuple[str, ...]:
    return (timing.side, *(f"{timing.facts['parts'][name]:.2f}" for name in _PARTS))


if __name__ == "__main__":
    entry.run(main, one_process=True)
