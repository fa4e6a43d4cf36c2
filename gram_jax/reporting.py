"""What a run says while it runs: metrics.jsonl and TensorBoard for machines, one bar and log lines
for people.

A run that resumes continues the same files, so a metrics log first cuts what was written after the
checkpoint it
resumes from: those steps will happen again. The HTML report of a finished run is in `report.py`.

With several processes only the first writes; the others make no `MetricsLog` and a `Progress` with
enabled=False.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from tqdm import tqdm

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"

# Fields that are shares of one and that people read in per cent, by the last word of their name.
PERCENT_FIELDS = frozenset({"accuracy", "mfu", "padding"})


class MetricsLog:
    """Numbers by step, appended to workdir/metrics.jsonl and to TensorBoard in workdir/tensorboard.

    A line is {"step": 120, "split": "train", "loss": 2.3412, ...}. JSON has no NaN and no infinity:
    those are written as the strings "nan", "inf" and "-inf", so that every line parses everywhere.
    """

    def __init__(
        self, workdir: str | os.PathLike[str], *, resume_step: int, tensorboard: bool = True
    ) -> None:
        """Opens the log after cutting what lies beyond resume_step.

        Args:
          workdir: made if it is missing.
          resume_step: the step of the checkpoint the run goes on from; lines of later steps are cut
            and hidden in TensorBoard. -1 starts over, also with what was written at step 0.
          tensorboard: whether to write event files beside metrics.jsonl.

        Raises:
          ValueError: a line of an existing metrics.jsonl, other than a torn last one, is no line of
          this log.
        """
        folder = Path(workdir)
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / METRICS_FILE
        if self.path.exists():
            _cut_back(self.path, resume_step)
        self._file: TextIO = self.path.open("a", encoding="utf-8")
        self._events: Any = None
        if tensorboard:
            # Imported here: it takes seconds, which a run without it need not spend.
            from tensorboardX import SummaryWriter

            self._events = SummaryWriter(
                str(folder / TENSORBOARD_FOLDER),
                purge_step=resume_step + 1,
                # File names count in seconds: a run resumed within one would overwrite its events.
                filename_suffix=f".{resume_step}.{os.getpid()}",
            )

    def write(self, step: int, metrics: Mapping[str, float], *, split: str = "train") -> None:
        """Appends one line and flushes it; in TensorBoard the tags are split/name."""
        clash = {"step", "split"} & metrics.keys()
        if clash:
            raise ValueError(f"a metric cannot be called {min(clash)!r}: each line has that field")
        values = {name: float(value) for name, value in metrics.items()}
        line = {"step": int(step), "split": split}
        line |= {
            name: value if math.isfinite(value) else str(value) for name, value in values.items()
        }
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(f"{split}/{name}", value, int(step))

    def close(self) -> None:
        """Closes both files; a second call does nothing."""
        self._file.close()
        if self._events is not None:
            self._events.close()
            self._events = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def read_metrics(
    workdir: str | os.PathLike[str], *, split: str | None = None
) -> list[dict[str, Any]]:
    """The lines of workdir/metrics.jsonl in order, "nan" and "inf" as floats again; of one split,
    or of all.
    """
    rows = []
    for _, row in _parsed_lines(Path(workdir) / METRICS_FILE):
        if split is None or row.get("split") == split:
            rows.append({k: v if k in ("step", "split") else float(v) for k, v in row.items()})
    return rows


def _parsed_lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """(line, its object) for each line; a torn last line is left out, any other bad line is a
    ValueError.
    """
    # A tear may split a character: replaced, the line fails to parse as any torn one does.
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    if lines[-1] == "":
        lines.pop()
    parsed = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or type(row.get("step")) is not int:
                raise ValueError('no object with an integer "step"')
        except ValueError as error:
            if number == len(lines):
                break
            raise ValueError(
                f"{path}, line {number}: not a line of a metrics log ({error}); mend it or move "
                "the file away"
            ) from error
        parsed.append((line, row))
    return parsed


def _cut_back(path: Path, resume_step: int) -> None:
    """Rewrites the file without a torn last line and without steps beyond resume_step."""
    kept = [line for line, row in _parsed_lines(path) if row["step"] <= resume_step]
    # A crash while rewriting must leave the old file or the new one, never half of either.
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(line + "\n" for line in kept)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


class Progress:
    """A bar on a terminal, and a log line every so many steps that stays when the bar moves on.

    A line reads `step 120/400  loss 2.3412  tokens/s 12.3k  mfu 41.2%  eta 0:02:10`. Where the
    stream is no terminal (a file, a pipe, a cluster's log) there is no bar, only the lines.
    """

    def __init__(
        self,
        total: int,
        *,
        initial: int = 0,
        unit: str = "step",
        description: str = "",
        log_every: int = 1,
        stream: TextIO | None = None,
        enabled: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Starts at `initial` of `total` units.

        Args:
          total: the last step.
          initial: the step a resumed run starts from.
          unit: what is counted, the first word of the line.
          description: stands before the bar.
          log_every: a line each time this many steps are passed, and at the last one.
          stream: standard error by default.
          enabled: None for a bar on terminals only and lines everywhere; True for both everywhere;
            False for nothing at all.
          clock: seconds, for the time that remains.
        """
        if log_every < 1:
            raise ValueError(f"log_every must be at least 1, got {log_every}")
        self.total, self.unit, self.log_every = total, unit, log_every
        # Looked up at the call: a default bound at import would miss a stream replaced since.
        self.stream = sys.stderr if stream is None else stream
        self._lines = enabled is not False
        self._bar: tqdm[Any] = tqdm(
            total=total,
            initial=initial,
            unit=unit,
            desc=description or None,
            file=self.stream,
            disable=not (self.stream.isatty() if enabled is None else enabled),
            dynamic_ncols=True,
        )
        self._step = self._logged = initial
        self._clock = clock
        self._rate_from = (initial, clock())
        self._first_update = True

    def update(self, step: int, fields: Mapping[str, float | str]) -> None:
        """Says that `step` is done; fields are shown in the order given, strings as they are."""
        now = self._clock()
        remaining = duration(self._seconds_left(step, now))
        if self._first_update:
            # The first update waits for compilation; from the second on, time is counted from here.
            self._rate_from, self._first_update = (step, now), False
        texts = {
            name: text if isinstance(text, str) else format_field(name, text)
            for name, text in fields.items()
        }
        self._bar.set_postfix(texts, refresh=False)
        self._bar.update(step - self._step)
        self._step = step
        due = step // self.log_every > self._logged // self.log_every
        if self._lines and (due or (step >= self.total and step > self._logged)):
            self._logged = step
            parts = [f"{self.unit} {step}/{self.total}"]
            parts += [f"{name} {text}" for name, text in texts.items()]
            if step < self.total:
                parts.append(f"eta {remaining}")
            self.write("  ".join(parts))

    def write(self, line: str) -> None:
        """Writes a line above the bar without tearing it."""
        if self._lines:
            tqdm.write(line, file=self.stream)
            self.stream.flush()

    def close(self) -> None:
        """Leaves the bar as it stands."""
        self._bar.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _seconds_left(self, step: int, now: float) -> float:
        """At the mean speed since the first update; at that one, since the start."""
        from_step, from_time = self._rate_from
        if step <= from_step:
            return math.inf
        return (self.total - step) * (now - from_time) / (step - from_step)


def format_field(name: str, value: float) -> str:
    """A number as people read it under that name: rates by `human`, shares in per cent, the rest in
    five digits.
    """
    value = float(value)
    if not math.isfinite(value):
        return str(value)
    if name.endswith("/s"):
        return human(value)
    last_word = name.replace("/", "_").rsplit("_", maxsplit=1)[-1]
    if last_word in PERCENT_FIELDS:
        return f"{value:.1%}"
    if value.is_integer() and abs(value) < 1e6:
        return str(int(value))
    if abs(value) < 1e-2:
        return f"{value:.2e}"
    return f"{value:.4f}" if abs(value) < 1e3 else human(value)


def human(value: float) -> str:
    """Three significant digits and a unit: 1234567 -> "1.23M", 999 -> "999", 12345 -> "12.3k"."""
    value = float(value)
    if not math.isfinite(value):
        return str(value)
    scaled, units = value, iter("kMGTP")
    unit = ""
    # 999.5 would be printed as 1000: that belongs to the next unit.
    while abs(scaled) >= 999.5 and (bigger := next(units, "")):
        scaled, unit = scaled / 1000, bigger
    if not unit:
        return f"{scaled:.3g}"
    digits = 2 if abs(scaled) < 9.995 else 1 if abs(scaled) < 99.95 else 0
    return f"{scaled:.{digits}f}{unit}"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, with days before them: 130 -> "0:02:10", 90061 -> "1d 1:01:01";
    "?" if unknown.
    """
    if not math.isfinite(seconds) or seconds < 0:
        return "?"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return f"{days}d " * (days > 0) + f"{hour}:{minute:02d}:{second:02d}"
