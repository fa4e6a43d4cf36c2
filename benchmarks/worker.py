"""One side of a benchmark in a process of its own, which works when it is told to.

Each side has its own threads and memory, and only one works at a time. The harness starts

  python -m benchmarks.worker MODULE:CLASS ARGUMENTS

with ARGUMENTS a JSON object for the class, and then writes a JSON array on a line for each call:
the name of a method and its arguments. The answer is a line with an `Answer`, as JSON. What
libraries print goes to standard error.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import sys
import time
from typing import Any, Protocol

from gram_jax.errors import UserError


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a call did.

    Attributes:
      seconds: that it took; with ``compile_seconds`` of them for tracing and compiling.
      numbers: that it computed, in an order that all sides share.
      facts: about how it was done.
      error: what a user can do about why it was not done, or "".
    """

    seconds: float = 0.0
    compile_seconds: float = 0.0
    numbers: list[float] = dataclasses.field(default_factory=list)
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    error: str = ""


class Side(Protocol):
    """What a worker runs; each method returns its numbers, and facts."""

    compile_seconds: float  # in all so far

    def warm_up(self) -> tuple[list[float], dict[str, Any]]: ...

    def peak(self) -> tuple[list[float], dict[str, Any]]:
        """Measures FLOP/s of a matrix product; the only number."""
        ...


def _answer(side: Side, name: str, arguments: list[Any]) -> Answer:
    compiled, began = side.compile_seconds, time.perf_counter()
    try:
        numbers, facts = getattr(side, name)(*arguments)
    except UserError as error:
        return Answer(error=str(error))
    return Answer(
        seconds=time.perf_counter() - began,
        compile_seconds=side.compile_seconds - compiled,
        numbers=[float(number) for number in numbers],
        facts=facts,
    )


def _serve() -> None:
    module, _, name = sys.argv[1].partition(":")
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)
        try:
            made = getattr(importlib.import_module(module), name)(**json.loads(sys.argv[2]))
            first = Answer()
        except UserError as error:
            first = Answer(error=str(error))
        print(json.dumps(dataclasses.asdict(first)), file=answers, flush=True)
        for line in sys.stdin:
            method, *arguments = json.loads(line)
            answer = _answer(made, method, arguments)
            print(json.dumps(dataclasses.asdict(answer)), file=answers, flush=True)


if __name__ == "__main__":
    _serve()
