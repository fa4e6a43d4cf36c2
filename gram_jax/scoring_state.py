"""The output of a scoring job while it is being made: OUTPUT.partial and OUTPUT.state.json.

Lines are appended to OUTPUT.partial, forced to disk, and then counted in OUTPUT.state.json, which
is replaced whole. What stands in the partial file beyond what is counted (a torn line, or lines
whose counting a kill prevented) is cut when the job goes on, and computed again. At the end the
state gets its summary, and the partial file becomes OUTPUT in one step.

Of several processes, process 0 alone reads and writes these files, and tells the others what they
say.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self, cast

import numpy as np

from gram_jax.distributed import is_main, main_first, process_id
from gram_jax.errors import UserError
from gram_jax.grouping import IntArray, lines_of

_FORMAT = 1


@dataclasses.dataclass(slots=True)
class JobState:
    """What is on disk.

    Attributes:
      settings: all that decides the numbers and columns; see ``differences``.
      input_sha256: of the rows that are done; of all of them if they are done by prompts.
      lines: how many are done.
      size: bytes of the partial file that hold them.
      counts: sums over them, and seconds spent.
      summary: of the whole, once it is complete.
      by_prompt: they are done in the order of `grouping`, and so the partial file is.
    """

    settings: dict[str, Any]
    input_sha256: str
    lines: int = 0
    size: int = 0
    counts: dict[str, float] = dataclasses.field(default_factory=dict)
    summary: dict[str, Any] | None = None
    by_prompt: bool = False


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Settings that differ, in words."""
    return [
        f"{name} was {old.get(name)!r} and is {new.get(name)!r}"
        for name in sorted({*old, *new})
        if old.get(name) != new.get(name)
    ]


class JobFiles:
    """The files of one job. Use as a context manager: leaving it closes and unlocks them.

    Every process calls every method; those of process 0 do what they say.
    """

    def __init__(self, output: str | Path):
        self.output = Path(output)
        self.partial = self.output.with_name(self.output.name + ".partial")
        self.state_path = self.output.with_name(self.output.name + ".state.json")
        self._stream: BinaryIO | None = None

    def read_state(self) -> JobState | None:
        """The state of a job that was begun or completed here and whose lines are still there.

        Raises:
          UserError: there is an output that no state describes, or a state that cannot be read.
        """

        def read() -> dict[str, Any] | None:
            found = self.stored_state()
            return None if found is None else dataclasses.asdict(found)

        values = main_first(read)
        return None if values is None else JobState(**values)

    def stored_state(self) -> JobState | None:
        """`read_state` for process 0 alone."""
        if not self.state_path.exists():
            for path in (self.output, self.partial):
                if path.exists():
                    raise UserError(f"{path} exists already; delete it or choose another --output")
            return None
        try:
            values = json.loads(self.state_path.read_text(encoding="utf-8"))
            if values.pop("format") != _FORMAT:
                raise ValueError("another version wrote it")
            state = JobState(**values)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{self.state_path}: not the state of a scoring job ({error}); delete it and"
                f" {self.partial.name}, or choose another --output"
            ) from None
        kept = self.partial.exists() or (state.summary is not None and self.output.exists())
        return state if kept else None

    def write_state(self, state: JobState) -> None:
        """Replaces the state in one step."""
        if not is_main():
            return
        temporary = self.state_path.with_name(self.state_path.name + ".tmp")
        with temporary.open("w", encoding="utf-8") as stream:
            json.dump({"format": _FORMAT, **dataclasses.asdict(state)}, stream, indent=2)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(self.state_path)

    def open(self, state: JobState) -> None:
        """Opens the partial file for appending after what ``state`` counts; cuts what is beyond.

        Raises:
          UserError: another process writes it, or it is shorter than it should be.
        """
        main_first(lambda: self._open(state))

    def _open(self, state: JobState) -> None:
        self.output.parent.mkdir(parents=True, exist_ok=True)
        stream = cast(BinaryIO, self.partial.open("ab"))
        self._stream = stream
        lock(stream, self.partial)
        if os.fstat(stream.fileno()).st_size < state.size:
            raise UserError(
                f"{self.partial} is shorter than {self.state_path.name} says; delete both, or"
                " choose another --output"
            )
        stream.truncate(state.size)

    def append(self, rows: Sequence[dict[str, Any]]) -> int:
        """Writes rows, one a line; returns the bytes written. Not counted until `record`."""
        if not is_main():
            return 0
        assert self._stream is not None
        return self._stream.write(b"".join(map(line_of, rows)))

    def record(self, state: JobState) -> None:
        """Forces what was appended to disk, then counts it."""
        if not is_main():
            return
        assert self._stream is not None
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self.write_state(state)

    def rows(self) -> Iterator[dict[str, Any]]:
        """The rows that have been written, in order. For process 0."""
        with self.partial.open("rb") as stream:
            for line in stream:
                yield json.loads(line)

    def finish(self, order: IntArray | None = None) -> None:
        """Makes OUTPUT of the partial file in one step; may be repeated after a kill.

        Args:
          order: the lines' numbers in OUTPUT, from 1, as they stand in the partial file; None = in
            order.
        """
        if not is_main() or not self.partial.exists():
            return
        packed = self.output.name.endswith(".gz")
        if not packed and order is None:
            self.partial.replace(self.output)
            return
        temporary = self.output.with_name(self.output.name + ".tmp")
        with temporary.open("wb") as target:
            if packed:
                # No name and no time in the header: equal rows make equal files.
                with gzip.GzipFile("", "wb", compresslevel=6, fileobj=target, mtime=0) as stream:
                    self._copy(cast(BinaryIO, stream), order)
            else:
                self._copy(target, order)
        temporary.replace(self.output)
        self.partial.unlink()

    def _copy(self, target: BinaryIO, order: IntArray | None) -> None:
        if order is None:
            with self.partial.open("rb") as source:
                shutil.copyfileobj(source, target, 1 << 20)
            return
        target.writelines(lines_of(self.partial, np.argsort(order)))

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def short(value: float) -> float:
    """The decimal with the fewest digits that is the same float32."""
    return float(str(np.float32(value)))


def check_alike(path: str | Path, digest: str) -> None:
    """Processes that read different rows would wait for each other in vain.

    Raises:
      UserError: the digest of this process's rows is not that of process 0.
    """
    if digest != main_first(lambda: digest):
        raise UserError(
            f"{path}: in process {process_id()} the file is not the one that process 0 reads; it"
            " must be the same on every machine"
        )


def changes(
    state: JobState, settings: dict[str, Any], lines: int, digests: dict[int, str]
) -> list[str]:
    """How the job that was begun differs from the one that would go on, in words.

    Args:
      state: what is done.
      settings: of the job that would go on.
      lines: of its input, the whole file.
      digests: SHA-256 of the rows on so many first lines.
    """
    found = differences(state.settings, settings)
    if state.settings.get("too_long") == "error" and state.summary is None:
        # What is done was short enough: the rest may be cut.
        found = [text for text in found if not text.startswith("too_long ")]
        state.settings["too_long"] = settings["too_long"]
    changed = digests.get(state.lines) != state.input_sha256
    if changed or (state.summary is not None and lines != state.lines):
        found.append(f"the input's rows differ from those of the {state.lines} lines done")
    return found


def check_same(
    state: JobState,
    settings: dict[str, Any],
    lines: int,
    digests: dict[int, str],
    files: JobFiles,
) -> None:
    """Refuses to mix the numbers of two different jobs in one file; see `changes`.

    Raises:
      UserError: says what differs.
    """
    if found := changes(state, settings, lines, digests):
        done = files.output if state.summary is not None else files.partial
        raise UserError(
            f"{done} was made by another job: {'; '.join(found)}. Delete it and"
            f" {files.state_path.name}, or choose another --output"
        )


def line_of(row: dict[str, Any]) -> bytes:
    """A row as a line of JSON."""
    try:
        return (json.dumps(row, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:  # half a surrogate pair in some other column: escaped, as it came
        return (json.dumps(row) + "\n").encode()


def lock(stream: BinaryIO, path: Path) -> None:
    """Refuses to write what another process is writing; the lock dies with the process.

    Raises:
      UserError: another process has the file open and locked; ``path`` is what it is part of.
    """
    try:
        import fcntl
    except ImportError:  # no such locks on Windows
        return
    try:
        fcntl.flock(stream.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{path}: another process is writing it; wait for it or end it") from None
    except OSError:
        return  # some network file systems have no locks
