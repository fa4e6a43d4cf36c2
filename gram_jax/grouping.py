"""Lines of a JSONL file in an order that puts those of one prompt side by side.

What stands together is computed together, a prompt once for all of its responses, so a shuffled
file is scored by prompts: in the order of their first lines. A line is found by its place in the
file, so only two numbers a line are held in memory.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]

_CHUNK = 1 << 22
_BOM = b"\xef\xbb\xbf"


class PromptOrder:
    """Collects the prompts of a file's lines, one after the other."""

    def __init__(self) -> None:
        self._groups: dict[bytes, int] = {}
        self._group_of_line: list[int] = []

    def add(self, prompt: Any) -> None:
        """Takes the next line's prompt, as it stands in the file."""
        key = hashlib.blake2b(json.dumps(prompt).encode(), digest_size=16).digest()
        self._group_of_line.append(self._groups.setdefault(key, len(self._groups)))

    def lines(self) -> IntArray | None:
        """Line numbers, from 1, by prompts; None if they are in that order already."""
        groups = np.array(self._group_of_line, np.int64)
        if (groups[1:] >= groups[:-1]).all():
            return None
        return np.argsort(groups, kind="stable") + 1


def has_places(path: str | Path) -> bool:
    """Whether a line of the file can be read by itself: one on a disk, and not compressed."""
    return Path(path).is_file() and not re.search(r"\.(gz|zst|json)$", str(path), re.IGNORECASE)


def rows_of(path: str | Path, lines: IntArray) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows on these lines with their numbers; all of them have been read before, and are good.

    Args:
      path: a JSONL file that :func:`has_places`.
      lines: from 1, in any order.
    """
    for line, raw in zip(lines.tolist(), lines_of(path, lines - 1), strict=True):
        yield line, json.loads(raw)


def lines_of(path: str | Path, wanted: IntArray) -> Iterator[bytes]:
    """Lines of a file with their ends; ``wanted`` are their places, from 0."""
    starts = _starts(path)
    with Path(path).open("rb") as stream:
        for place in starts[wanted].tolist():
            stream.seek(place)
            raw = stream.readline()
            yield raw if raw.endswith(b"\n") else raw + b"\n"


def _starts(path: str | Path) -> IntArray:
    """Where in the file each line begins; the last may be the file's end."""
    found: list[IntArray] = []
    at = 0
    with Path(path).open("rb") as stream:
        first = len(_BOM) if stream.read(len(_BOM)) == _BOM else 0
        stream.seek(0)
        while chunk := stream.read(_CHUNK):
            found.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")) + at + 1)
            at += len(chunk)
    return np.concatenate([np.array([first], np.int64), *found])
