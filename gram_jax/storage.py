"""Files by name: a path, or a URL of an object store (gs://, s3://, ...) that fsspec knows.

Text and JSON Lines are read and written here wherever they lie. A URL's own package does the
talking (gcsfs for gs://, s3fs for s3://), and fsspec names it where it is missing. The first word
with a store is limited to `REACH_SECONDS`: what such packages do without a network is to try again
for minutes, in silence.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Literal, TypeAlias, TypeVar

from gram_jax.errors import DataError, UserError

REACH_SECONDS = 15.0
_BUFFER = 1 << 20

_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True, slots=True)
class Remote:
    """A file or folder at a URL, with what is used of a `Path`.

    Every method raises `DataError` where the store cannot be reached or refuses.
    """

    url: str

    @property
    def name(self) -> str:
        return PurePosixPath(self.url).name

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> Remote:
        return Remote(f"{self.url.rstrip('/')}/{name}")

    def open(self, mode: Literal["rb"] = "rb") -> io.BufferedReader:
        """A stream of its bytes."""
        opened = self._reached(lambda system: system.open(self.url, mode))
        return io.BufferedReader(_RemoteStream(opened), _BUFFER)

    def write(self, source: BinaryIO) -> None:
        """Writes all that a stream holds; the store shows the file when it is whole."""
        with self._reached(lambda system: system.open(self.url, "wb")) as target:
            shutil.copyfileobj(source, target, _BUFFER)

    def stat(self) -> RemoteStat:
        """Its size, and no time of change: stores do not agree on one."""
        return RemoteStat(int(self._reached(lambda system: system.info(self.url))["size"] or 0))

    def exists(self) -> bool:
        return bool(self._reached(lambda system: system.exists(self.url)))

    def is_dir(self) -> bool:
        return bool(self._reached(lambda system: system.isdir(self.url)))

    def unlink(self) -> None:
        self._reached(lambda system: system.rm_file(self.url))

    def files(self) -> list[Remote]:
        """The files in this folder, or those that this pattern fits, sorted by name."""

        def find(system: Any) -> list[str]:
            if any(character in self.url for character in "*?["):
                paths = system.glob(self.url)
            else:
                entries = system.ls(self.url, detail=True)
                paths = [entry["name"] for entry in entries if entry["type"] == "file"]
            return sorted(system.unstrip_protocol(path) for path in paths)

        return [Remote(url) for url in self._reached(find)]

    def _reached(self, ask: Callable[[Any], _T]) -> _T:
        """What ``ask`` answers, given the file system; it has so many seconds."""

        def call() -> _T:
            # Not at the top: commands that read local files start quicker without.
            import fsspec

            system, _ = fsspec.core.url_to_fs(self.url)
            return ask(system)

        try:
            return within(REACH_SECONDS, call)
        except FileNotFoundError:
            raise DataError("there is no such file", file=self.url) from None
        except TimeoutError:
            reason = f"cannot be reached: no answer within {REACH_SECONDS:.0f} s; check the network"
            raise DataError(f"{reason} and the credentials", file=self.url) from None
        except ImportError as error:
            reason = f"is read by another package: {_line(error)} with pip"
            raise DataError(reason, file=self.url) from None
        except Exception as error:
            # Each store's package raises errors of its own.
            raise DataError(f"cannot be reached ({_line(error)})", file=self.url) from None


@dataclasses.dataclass(frozen=True, slots=True)
class RemoteStat:
    """What a store says of a file: bytes."""

    st_size: int
    st_mtime_ns: int = 0


Place: TypeAlias = Path | Remote


def is_url(name: str | Path | Remote) -> bool:
    """Whether a name is a URL; `builtin:...` and FOLDER:SPLIT are none."""
    return isinstance(name, Remote) or "://" in str(name)


def located(name: str | Path | Remote) -> Place:
    """The place that a name stands for."""
    if isinstance(name, Remote):
        return name
    return Remote(str(name)) if is_url(name) else Path(name)


def local_folder(name: str | Path, what: str) -> Path:
    """The folder that a name stands for; checkpoints and rows are read from local ones only.

    Raises:
      UserError: it is a URL.
    """
    if is_url(name):
        raise UserError(
            f"{what}={name}: must be a local or a mounted folder; mount the bucket (gcsfuse,"
            " mountpoint-s3), or copy from and to it"
        )
    return Path(name)


def upload(local: Path, place: Place) -> None:
    """Puts a copy of a local file in its place; a store shows it when it is whole.

    Raises:
      DataError: the store cannot be reached.
      OSError: it cannot be written.
    """
    if isinstance(place, Path):
        place.parent.mkdir(parents=True, exist_ok=True)
        temporary = place.with_name(f"{place.name}.{os.getpid()}.tmp")
        shutil.copyfile(local, temporary)
        temporary.replace(place)
        return
    with local.open("rb") as source:
        place.write(source)


def digest_of(place: Place) -> str:
    """SHA-256 of a file's content."""
    with place.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextlib.contextmanager
def local_output(name: str, *, writes: bool = True) -> Iterator[str]:
    """A local file to write in the place of ``name``, which is copied there at the end.

    Of a path, that is the path. What is written of a URL stands in the user's cache folder until
    it is complete, so that a command that was killed goes on on the same machine.

    Args:
      writes: this is the process that writes the file.

    Raises:
      DataError: the store cannot be reached; said before any work is done.
    """
    if not is_url(name):
        yield name
        return
    remote = Remote(name)
    if remote.exists():
        raise DataError("exists already; delete it or choose another name", file=name)
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    digest = hashlib.sha256(name.encode()).hexdigest()[:16]
    folder = home / "gram_jax" / "outputs" / digest
    folder.mkdir(parents=True, exist_ok=True)
    yield str(folder / remote.name)
    if writes:
        upload(folder / remote.name, remote)
        shutil.rmtree(folder)


def within(seconds: float, call: Callable[[], _T]) -> _T:
    """What ``call`` returns or raises, if it does so in time.

    Raises:
      TimeoutError: it does not; its thread is left behind, and ends with the process.
    """
    answers: list[_T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            answers.append(call())
        except BaseException as error:  # raised again below, in the caller's thread
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not answers:
        raise TimeoutError
    return answers[0]


class _RemoteStream(io.RawIOBase):
    """A store's file whose faults are all `OSError`, as those of local files are."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._file.read(len(buffer))
        except Exception as error:  # each store's package raises errors of its own
            raise OSError(_line(error)) from None
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def _line(error: BaseException) -> str:
    """The first line of what a library says."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:160]
