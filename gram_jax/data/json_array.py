"""`.json` files as JSON Lines, whether they hold those or one list, as published data may."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from typing import BinaryIO, cast

_CHUNK = 1 << 16
_LONGEST = 1 << 28
_BOM = b"\xef\xbb\xbf"
# A whole string, or what opens, closes and parts; a lone quote begins a string that goes on.
_TOKEN = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|["\[\]{},]', re.DOTALL)


class ListLines:
    """A stream of JSON, for `read1` only: of a list each item on a line, else as it is.

    A list is not parsed and not held in memory. A line is the number of an item, from 1.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._chunks = _chunks(stream)

    def read1(self, _: int) -> bytes:
        """The next piece; b"" at the end.

        Raises:
          EOFError: the list does not end with the stream.
        """
        return next(self._chunks, b"")


def _chunks(stream: BinaryIO) -> Iterator[bytes]:
    before = b""
    while data := _read(stream):
        before += data
        if start := before.removeprefix(_BOM).strip():
            if not start.startswith(b"["):
                break
            # A line end between the parts of an item is a blank, and in a string it is an error.
            yield from (item.replace(b"\n", b" ") + b"\n" for item in _items(before, stream))
            return
    yield before
    while data := _read(stream):
        yield data


def _items(held: bytes, stream: BinaryIO) -> Iterator[bytes]:
    """The bytes of each item of a list; of what an item holds only brackets and quotes matter."""
    start = seen = depth = 0
    fault: Exception | None = None
    while True:
        while (match := _TOKEN.search(held, seen)) and match.group() != b'"':
            token, seen = match.group(), match.end()
            if token in b"[{":
                depth += 1
                start = seen if depth == 1 else start
            elif token in b"]}":
                depth -= 1
            if depth == 0 or (depth == 1 and token == b","):
                yield held[start : match.start()]
                start = seen
            if depth == 0:
                if (held[seen:] + _read(stream)).strip():
                    raise EOFError("something follows the end of the list")
                return
        seen = match.start() if match else len(held)
        held, seen, start = held[start:], seen - start, 0
        if fault is not None:
            raise fault
        if len(held) > _LONGEST:
            raise EOFError(f"an item of more than {_LONGEST >> 20} MiB")
        # As much again as there is, so that a long item is not searched once for each chunk.
        more = bytearray()
        try:
            while len(more) <= len(held) and (data := _read(stream)):
                more += data
        except (EOFError, OSError, zlib.error) as error:  # after the items that came before it
            fault = error
        if not more:
            raise fault or EOFError("the list is not closed")
        held += more


def _read(stream: BinaryIO) -> bytes:
    return cast(bytes, stream.read1(_CHUNK))  # type: ignore[attr-defined]
