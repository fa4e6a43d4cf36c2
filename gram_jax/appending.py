"""Files that grow record by record, and hold whole records only, also where the disk is full."""

from __future__ import annotations

import os
from pathlib import Path


class AppendFile:
    """A file that a record is appended to as a whole or not at all.

    Nothing is kept back in this process, so a kill loses nothing that was appended. That it is on
    the disk, and survives a loss of power, is known after `sync`.
    """

    def __init__(self, path: str | Path) -> None:
        """Opens the file at its end; it is made if it is missing.

        Raises:
          OSError: it cannot be opened.
        """
        self.path = Path(path)
        self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        self._length = os.fstat(self._file).st_size
        self._open = True

    def append(self, record: bytes) -> None:
        """Writes a record.

        Raises:
          OSError: it cannot be written, for want of room above all; the file is as it was.
        """
        left = memoryview(record)
        try:
            while left:
                left = left[os.write(self._file, left) :]
        except OSError:
            os.ftruncate(self._file, self._length)
            raise
        self._length += len(record)

    def sync(self) -> None:
        """Waits until all records are on the disk.

        Raises:
          OSError: they are not.
        """
        os.fsync(self._file)

    def close(self) -> None:
        """Closes the file; a second call does nothing."""
        if self._open:
            self._open = False
            os.close(self._file)


def sync_folder(folder: Path) -> None:
    """Waits until the names of a folder's entries are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
