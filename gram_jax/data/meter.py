"""Progress of a preparation: a bar with rows/s on terminals, a line every few seconds elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

from gram_jax.reporting import duration, human

_SECONDS_BETWEEN_LINES = 10.0


class Meter:
    """Says what a preparation does, on standard error; ``Meter(quiet=True)`` says nothing."""

    def __init__(self, *, quiet: bool = False):
        self._quiet = quiet

    def say(self, line: str) -> None:
        """Writes a line above the bar."""
        if not self._quiet:
            tqdm.write(line, file=sys.stderr)

    @contextlib.contextmanager
    def phase(self, name: str, unit: str) -> Iterator[Phase]:
        """A bar over a part of the work whose size is not known; closed with one last line."""
        phase = Phase(self, name, unit, bar=not self._quiet and sys.stderr.isatty())
        try:
            yield phase
        finally:
            phase.close()
        phase.line()


class Phase:
    """A count that grows."""

    def __init__(self, meter: Meter, name: str, unit: str, *, bar: bool):
        self._meter, self._name, self._unit = meter, name, unit
        self._count = self._tokens = 0
        self._began = self._said = time.monotonic()
        self._bar: tqdm[Any] = tqdm(
            desc=name, unit=f" {unit}", unit_scale=True, file=sys.stderr, disable=not bar
        )

    def add(self, count: int, *, tokens: int) -> None:
        self._count += count
        self._tokens += tokens
        self._bar.set_postfix_str(f"{human(self._tokens)} tokens", refresh=False)
        self._bar.update(count)
        now = time.monotonic()
        if self._bar.disable and now - self._said > _SECONDS_BETWEEN_LINES:
            self._said = now
            self.line()

    def line(self) -> None:
        seconds = time.monotonic() - self._began
        rate = human(self._count / max(seconds, 1e-9))
        self._meter.say(
            f"{self._name}: {self._count:,} {self._unit}, {human(self._tokens)} tokens,"
            f" {rate} {self._unit}/s, {duration(seconds)}"
        )

    def close(self) -> None:
        self._bar.close()
