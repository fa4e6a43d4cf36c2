"""What a run says while it runs: metrics.jsonl and TensorBoard for machines, one bar and log lines
for people.

metrics.jsonl is the truth, TensorBoard's event files follow it. A run that resumes continues the
same files: a metrics log first cuts what was written after the checkpoint that the run resumes
from, as those steps will happen again, and writes the event files anew from the lines that are
left. The HTML report of a finished run is in `report.py`.

With several processes only the first writes; the others have `Logs` of nothing and a `Progress`
with enabled=False. Weights & Biases is in `wandb_log.py`.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, TextIO

from tqdm import tqdm

from gram_jax.appending import AppendFile
from gram_jax.errors import UserError
from gram_jax.events import scalars_event, write_folder

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"

# What each line has beside its numbers.
_RESERVED = ("step", "split", "time")

# Fields that are shares of one and that people read in per cent, by the last word of their name.
PERCENT_FIELDS = frozenset({"accuracy", "mfu", "padding"})


def warn(line: str) -> None:
    """A line on standard error about something that went wrong and did not stop the run."""
    tqdm.write(f"warning: {line}", file=sys.stderr)


class MetricsLog:
    """Numbers by step, appended to workdir/metrics.jsonl and to TensorBoard in workdir/tensorboard.

    A line is {"step": 120, "split": "train", "time": 1760000000.5, "loss": 2.3412, ...}, its time
    in seconds since 1970. JSON has no NaN and no infinity: those are written as the strings "nan",
    "inf" and "-inf", so that every line parses everywhere. Steps never fall from line to line.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        *,
        resume_step: int,
        tensorboard: bool = True,
        on_error: str = "stop",
    ) -> None:
        """Opens the log after cutting what lies beyond resume_step.

        Args:
          workdir: made if it is missing.
          resume_step: the step of the checkpoint the run goes on from; lines and events of later
            steps are cut. -1 starts over, also with what was written at step 0.
          tensorboard: whether to write event files beside metrics.jsonl.
          on_error: what happens where a file cannot be written, as the disk is full: "stop" is a
            UserError; "continue" warns once and keeps lines in memory until there is room.

        Raises:
          UserError: a line of an existing metrics.jsonl, other than a torn last one, is no line of
            this log; or a file cannot be written, and on_error is "stop".
        """
        self._on_error, self._warned = on_error, False
        folder = Path(workdir)
        self.path = folder / METRICS_FILE
        self._unwritten = b""
        self._file: AppendFile | None = None
        self._events: AppendFile | None = None
        # Whether the event files must be written anew, as some numbers are not in them.
        self._events_behind = tensorboard
        self._resume_step = resume_step
        self._attempt(self._open)
        self._catch_up()

    def write(self, step: int, metrics: Mapping[str, float], *, split: str = "train") -> None:
        """Appends one line; in TensorBoard the tags are split/name.

        Raises:
          ValueError: a metric is called as a field that each line has.
          UserError: the line cannot be written, and on_error is "stop".
        """
        clash = [name for name in _RESERVED if name in metrics]
        if clash:
            raise ValueError(f"a metric cannot be called {clash[0]!r}: each line has that field")
        values = {name: float(value) for name, value in metrics.items()}
        now = time.time()
        line: dict[str, Any] = {"step": int(step), "split": split, "time": round(now, 3)}
        line |= {
            name: value if math.isfinite(value) else str(value) for name, value in values.items()
        }
        self._unwritten += json.dumps(line, allow_nan=False).encode() + b"\n"
        self._attempt(self._flush)
        events = self._events
        if events is not None and not self._events_behind:
            record = scalars_event(int(step), split, values, line["time"])
            self._events_behind = not self._attempt(lambda: events.append(record))

    def sync(self) -> None:
        """Waits until all lines are on the disk: before a checkpoint, whose steps are not repeated.

        Raises:
          UserError: they cannot be written, and on_error is "stop".
        """
        self._attempt(self._flush)
        if self._file is not None:
            self._attempt(self._file.sync)
        self._catch_up()

    def close(self) -> None:
        """Closes both files; a second call does nothing.

        Raises:
          UserError: lines cannot be written, and on_error is "stop".
        """
        try:
            if self._file is not None:
                self._attempt(self._flush)
                self._catch_up()
        finally:
            for file in (self._file, self._events):
                if file is not None:
                    file.close()
            self._file = self._events = None
            self._events_behind = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _open(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            _cut_back(self.path, self._resume_step)
        self._file = AppendFile(self.path)

    def _flush(self) -> None:
        if self._file is None:
            self._open()
        if self._unwritten and self._file is not None:
            self._file.append(self._unwritten)
            self._unwritten = b""

    def _catch_up(self) -> None:
        """Writes the event files anew from metrics.jsonl where something is not in them."""
        if not self._events_behind or self._file is None or self._unwritten:
            return
        if self._events is not None:
            self._events.close()
            self._events = None

        def rewrite() -> None:
            self._events = write_folder(self.path.parent / TENSORBOARD_FOLDER, _events(self.path))

        self._events_behind = not self._attempt(rewrite)

    def _attempt(self, action: Callable[[], None]) -> bool:
        """Whether a write went well.

        Raises:
          UserError: it did not, and on_error is "stop".
        """
        try:
            action()
        except OSError as error:
            if self._on_error == "stop":
                raise UserError(
                    f"{self.path.parent}: metrics cannot be written: {error}. Mend that and run the"
                    " same command again"
                ) from error
            if not self._warned:
                warn(
                    f"{self.path.parent}: metrics cannot be written: {error}. They are kept in"
                    " memory, and written as soon as that works"
                )
            self._warned = True
            return False
        return True


class Log(Protocol):
    """Takes numbers by step, as a `MetricsLog` does."""

    def write(self, step: int, metrics: Mapping[str, float], *, split: str = "train") -> None: ...
    def sync(self) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


class Logs:
    """Several logs as one; of a process that is not the first, none at all."""

    def __init__(self, logs: Sequence[Log]) -> None:
        self._logs = tuple(logs)
        self._open = contextlib.ExitStack()

    def write(self, step: int, metrics: Mapping[str, float], *, split: str = "train") -> None:
        for log in self._logs:
            log.write(step, metrics, split=split)

    def sync(self) -> None:
        for log in self._logs:
            log.sync()

    def __enter__(self) -> Self:
        for log in self._logs:
            self._open.enter_context(log)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Closes all of them, also where one cannot be."""
        self._open.__exit__(kind, error, trace)


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


def _events(path: Path) -> Iterator[bytes]:
    """The records of the lines of a metrics log."""
    for _, row in _parsed_lines(path):
        values = {k: float(v) for k, v in row.items() if k not in _RESERVED}
        time_written = float(row.get("time", 0.0))
        yield scalars_event(row["step"], row.get("split", "train"), values, time_written)


def _parsed_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(where it ends in the file, its object) for each line, without a torn last line.

    Raises:
      UserError: any other line is bad.
    """
    bad: UserError | None = None
    end = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if bad:
                raise bad
            end += len(line)
            try:
                row = json.loads(line)
                if not isinstance(row, dict) or type(row.get("step")) is not int:
                    raise ValueError('no object with an integer "step"')
            except ValueError as error:
                # Only the last line can be torn, and whether it is that one is not known yet.
                bad = UserError(
                    f"{path}, line {number}: not a line of a metrics log ({error}); mend it or move"
                    " the file away"
                )
                continue
            yield end, row


def _cut_back(path: Path, resume_step: int) -> None:
    """Cuts the file before a torn last line and before the first step beyond resume_step.

    In place, as that needs no room on a disk that may be full.
    """
    kept = [end for end, row in _parsed_lines(path) if row["step"] <= resume_step]
    end = max(kept, default=0)
    with path.open("r+b") as file:
        file.truncate(end)
        if end:
            file.seek(end - 1)
            if file.read(1) != b"\n":
                file.write(b"\n")


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
