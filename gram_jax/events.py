"""TensorBoard's event files, written record by record: scalars only, nothing held back.

A record is a protocol buffer `Event` framed as TFRecord: length (8 bytes), its checksum (4), the
event, its checksum (4). Encoded here because libraries that do it keep events in memory for
minutes, which a kill loses, and take seconds to import.
"""

from __future__ import annotations

import functools
import math
import os
import socket
import struct
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gram_jax.appending import AppendFile, sync_folder

_SUFFIX = "gram_jax"


def scalars_event(step: int, split: str, values: Mapping[str, float], wall_time: float) -> bytes:
    """The record of one step's numbers, under the tags split/name.

    Args:
      step: the step.
      split: the first part of each tag.
      values: numbers by name, not-a-number and infinities included.
      wall_time: seconds since 1970.
    """
    summary = b"".join(
        # Summary.value (1) = {tag (1), simple_value (2)}.
        _bytes(1, _bytes(1, f"{split}/{name}".encode()) + _float(2, value))
        for name, value in values.items()
    )
    # Event = {wall_time (1), step (2), summary (5)}.
    return _record(_double(1, wall_time) + b"\x10" + _varint(step) + _bytes(5, summary))


def write_folder(folder: Path, records: Iterable[bytes]) -> AppendFile:
    """Makes ``records`` all that the event files of a run in ``folder`` hold; the open file.

    The old files are removed once the new one is complete, so a kill loses nothing. Files that
    others wrote are left alone.

    Raises:
      OSError: the new file cannot be written; the old ones are as they were.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}"
    path, temporary = folder / f"{name}.{_SUFFIX}", folder / "rewriting.tmp"
    temporary.unlink(missing_ok=True)
    file = AppendFile(temporary)
    try:
        # Event = {wall_time (1), file_version (3)}.
        file.append(_record(_double(1, time.time()) + _bytes(3, b"brain.Event:2")))
        for record in records:
            file.append(record)
        file.sync()
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    finally:
        file.close()
    temporary.replace(path)
    sync_folder(folder)
    for old in folder.glob(f"events.out.tfevents.*.{_SUFFIX}"):
        if old != path:
            old.unlink()
    return AppendFile(path)


def _record(event: bytes) -> bytes:
    length = struct.pack("<Q", len(event))
    return length + _masked_crc(length) + event + _masked_crc(event)


def _masked_crc(data: bytes) -> bytes:
    """CRC-32C, rotated and shifted as TFRecord has it."""
    crc, table = 0xFFFFFFFF, _crc_table()
    for byte in data:
        crc = table[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


@functools.cache
def _crc_table() -> tuple[int, ...]:
    """Of the reflected Castagnoli polynomial."""
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return tuple(table)


def _varint(value: int) -> bytes:
    """Protocol buffers' variable-length integer, for value >= 0."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _bytes(field: int, data: bytes) -> bytes:
    return bytes([field << 3 | 2]) + _varint(len(data)) + data


def _double(field: int, value: float) -> bytes:
    return bytes([field << 3 | 1]) + struct.pack("<d", value)


def _float(field: int, value: Any) -> bytes:
    try:
        packed = struct.pack("<f", value)
    except OverflowError:  # beyond float32
        packed = struct.pack("<f", math.copysign(math.inf, value))
    return bytes([field << 3 | 5]) + packed
