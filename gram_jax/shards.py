"""The output of a job in pieces while it is being made: OUTPUT.shards.

  manifest.json   the settings, what the input is, and how it is cut into pieces
  00012.jsonl     the rows of piece 12 with what was computed of them
  00012.json      that piece 12 is whole: the size and digest of its rows, and counts over them
  lock            held by process 0 while it is at work

Each process writes the pieces that are its own, each file in one step. A piece with both files is
done, whoever made it: a job that goes on, on any number of processes, computes the others. At the
end process 0 puts them together in the order of the input.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self, cast

from gram_jax.distributed import main_first, process_id, told_by_all
from gram_jax.errors import UserError
from gram_jax.pieces import Piece
from gram_jax.scoring_state import line_of, lock

_FORMAT = 2
_MANIFEST = "manifest.json"


@dataclasses.dataclass(slots=True)
class Manifest:
    """What the pieces are of.

    Attributes:
      settings: all that decides the numbers and columns.
      input: digest of the input.
      block_size: bytes of its blocks.
      pieces: of it, in order.
    """

    settings: dict[str, Any]
    input: str
    block_size: int
    pieces: list[Piece]

    @property
    def rows(self) -> int:
        """Of the whole input."""
        return sum(piece.rows for piece in self.pieces)


class Shards:
    """The folder. Use as a context manager: leaving it unlocks the folder.

    Every process calls every method, unless it says otherwise.
    """

    def __init__(self, output: str | Path):
        output = Path(output)
        self.folder = output.with_name(output.name + ".shards")
        self._lock: BinaryIO | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def exists(self) -> bool:
        """Whether a job was begun here."""
        return main_first((self.folder / _MANIFEST).exists)

    def read(self) -> Manifest | None:
        """What was begun here, if anything was.

        Raises:
          UserError: it cannot be read.
        """

        def read() -> dict[str, Any] | None:
            path = self.folder / _MANIFEST
            if not path.exists():
                return None
            try:
                values = json.loads(path.read_text("utf-8"))
                if values.pop("format") != _FORMAT:
                    raise ValueError("another version wrote it")
                return dataclasses.asdict(Manifest(**values))
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(
                    f"{path}: not the manifest of a job in pieces ({error}); delete"
                    f" {self.folder}, or choose another --output"
                ) from None

        values = main_first(read)
        if values is None:
            return None
        return Manifest(**values | {"pieces": [Piece(*piece) for piece in values["pieces"]]})

    def write(self, manifest: Manifest, *, shared: bool) -> None:
        """Begins a job, or goes on with it.

        Args:
          shared: every process will write pieces here, and not process 0 alone.

        Raises:
          UserError: another job is at work here, or the folder has to be shared and is not.
        """
        text = json.dumps({"format": _FORMAT, **dataclasses.asdict(manifest)}, indent=1)

        def write() -> None:
            if not (self.folder / _MANIFEST).exists() and self.folder.exists():
                shutil.rmtree(self.folder)  # what `remove` was killed at
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = cast(BinaryIO, (self.folder / "lock").open("ab"))
            lock(self._lock, self.folder)
            _write(self.folder / _MANIFEST, text.encode())

        main_first(write)
        if not shared:
            return
        path = self.folder / _MANIFEST
        seen = path.exists() and path.read_text("utf-8") == text
        if not all(json.loads(one) for one in told_by_all(json.dumps(seen))):
            raise UserError(
                f"{self.folder}: what process 0 writes is not seen by all processes; --output must"
                " be in a folder that they share"
            )

    def done(self) -> list[int]:
        """Numbers of the pieces that are whole, the same list in every process."""
        return main_first(self.done_now)

    def done_now(self) -> list[int]:
        """The same as this process sees it, while others are at work. For one process."""
        # From a listing: a network file system remembers for a while that a name was not there.
        return sorted(int(path.stem) for path in self.folder.glob("[0-9]*.json"))

    def write_piece(
        self, number: int, rows: Sequence[dict[str, Any]], counts: Mapping[str, float]
    ) -> None:
        """Writes a piece. For the process that made it."""
        data = b"".join(map(line_of, rows))
        _write(self._rows(number), data)
        facts = {"size": len(data), "sha256": _digest(data), "counts": dict(counts)}
        _write(self._facts(number), json.dumps(facts).encode())

    def merged(
        self, manifest: Manifest, add: Callable[[Mapping[str, float]], None]
    ) -> Iterator[list[dict[str, Any]]]:
        """The rows of each piece, in order. For process 0.

        Args:
          add: is given the counts of each piece.

        Raises:
          UserError: a piece is missing, or not what was written.
        """
        for number in range(len(manifest.pieces)):
            path = self._rows(number)
            try:
                facts = json.loads(self._facts(number).read_bytes())
                data = path.read_bytes()
                if len(data) != facts["size"] or _digest(data) != facts["sha256"]:
                    raise ValueError("it is not what was written")
            except (OSError, ValueError, KeyError, TypeError) as error:
                self._facts(number).unlink(missing_ok=True)
                raise UserError(
                    f"{path}: this piece of the output cannot be used ({error}); the same command"
                    " computes it again"
                ) from None
            add(facts["counts"])
            yield [json.loads(line) for line in data.splitlines()]

    def remove(self) -> None:
        """Deletes the folder, once all that is in it stands elsewhere. For process 0.

        The manifest goes first: without it the rest is nothing to go on with.
        """
        (self.folder / _MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _rows(self, number: int) -> Path:
        return self.folder / f"{number:05}.jsonl"

    def _facts(self, number: int) -> Path:
        return self.folder / f"{number:05}.json"


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _write(path: Path, data: bytes) -> None:
    """In one step, and on the disk before it has its name."""
    temporary = path.with_name(f"{path.name}.{process_id()}.tmp")
    with temporary.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)
