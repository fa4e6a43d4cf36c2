"""Files of records, read in blocks: JSON Lines, ArrayRecord, Parquet and Arrow.

Reading is split in two. One process walks over a file and cuts it into blocks, which costs little:
lines are found but not parsed, columns are copied but not turned into Python values. The rest is
done by whoever asks a block for its records, as a rule a worker process the block was sent to. A
block carries its bytes, so no worker opens a file, and where a file is cut depends on its content
and the block size alone.

A record that is damaged is one `DataError` among the records; a file that is damaged ends with a
raised `DataError`, after the records before the damage.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import re
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias, cast

from gram_jax.data.json_array import ListLines
from gram_jax.errors import DataError
from gram_jax.storage import Place, Remote, located

Record: TypeAlias = dict[str, Any]
Reader: TypeAlias = Callable[[Any, int], Iterator["Block"]]
"""What cuts a file (a `Path`; of JSON Lines and Parquet also a `Remote`) into blocks."""

_BOM = b"\xef\xbb\xbf"
_CHUNK = 1 << 16
_LONGEST_LINE = 1 << 28
# Far more than any chat needs, and far less than what json, pickle or == can recurse through.
_DEEPEST = 100
_ROWS_PER_BATCH = 1024
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}


@dataclasses.dataclass(frozen=True, slots=True)
class Block(ABC):
    """Consecutive records of one file; can be pickled.

    Attributes:
      file: the file, as messages name it.
      first: number of the first record, from 1: a line of JSON Lines, else a row.
    """

    file: str
    first: int

    @abstractmethod
    def content(self) -> tuple[bytes, ...]:
        """The bytes that its records are read from."""

    @abstractmethod
    def records(self) -> Iterator[tuple[int, Record | DataError]]:
        """Yields (number, record) in order, or (number, what is wrong with the record there)."""


@dataclasses.dataclass(frozen=True, slots=True)
class LinesBlock(Block):
    """Whole lines of JSON."""

    data: bytes

    def content(self) -> tuple[bytes, ...]:
        return (self.data,)

    def records(self) -> Iterator[tuple[int, Record | DataError]]:
        lines = self.data.split(b"\n")
        if not lines[-1]:
            lines.pop()
        for line, raw in enumerate(lines, start=self.first):
            yield line, _json_record(raw, self.file, line)


@dataclasses.dataclass(frozen=True, slots=True)
class RawBlock(Block):
    """Records of an ArrayRecord file, each a JSON object."""

    raw: tuple[bytes, ...]

    def content(self) -> tuple[bytes, ...]:
        return self.raw

    def records(self) -> Iterator[tuple[int, Record | DataError]]:
        for row, raw in enumerate(self.raw, start=self.first):
            yield row, _json_record(raw, self.file, row)


@dataclasses.dataclass(frozen=True, slots=True)
class TableBlock(Block):
    """Rows of a Parquet or Arrow file, as Arrow streams of one batch of rows each."""

    streams: tuple[bytes, ...]

    def content(self) -> tuple[bytes, ...]:
        return self.streams

    def records(self) -> Iterator[tuple[int, Record | DataError]]:
        import pyarrow as pa

        row = self.first
        for stream in self.streams:
            (batch,) = pa.ipc.open_stream(stream)
            for record in _table_records(batch, self.file, row):
                yield row, record
                row += 1


def reader_of(path: Place) -> Reader | None:
    """The reader for a file of this name, or None if its extension is not known."""
    for pattern, reader in _READERS.items():
        if re.search(pattern, path.name, re.IGNORECASE):
            return reader
    return None


def jsonl_blocks(path: str | Place, size: int) -> Iterator[LinesBlock]:
    """Cuts a JSON Lines file, plain, `.gz` or `.zst`, at the first line end after `size` bytes.

    A byte order mark at the start is dropped, and so are blank lines at the end. A `.json` file may
    hold one list instead, whose items count as lines.

    Raises:
      DataError: the file is missing, unreadable, empty, damaged or cut off.
    """
    line = 0
    try:
        with _open_bytes(path) as stream:
            is_json = re.search(r"\.json(\.gz|\.zst)?$", str(path), re.IGNORECASE)
            lines = cast(BinaryIO, ListLines(stream)) if is_json else stream
            for block in line_blocks(str(path), lines, size):
                yield block
                line = block.first + block.data.rstrip().count(b"\n")
    except FileNotFoundError:
        raise DataError("there is no such file", file=path) from None
    except IsADirectoryError:
        raise DataError("this is a folder; name a .jsonl file", file=path) from None
    except (EOFError, zlib.error, OSError) as error:
        # What is wrong with the content has no errno.
        if isinstance(error, OSError) and error.errno:
            raise DataError(unreadable(error), file=path) from None
        packing = _COMPRESSIONS.get(_suffix(path), "file's")
        reason = f"the {packing} data is cut off or damaged ({error}); copy the file again"
        raise DataError(reason, file=path, line=line + 1) from None
    except _LongLineError:
        reason = f"a line of more than {_LONGEST_LINE >> 20} MiB; is this one JSON object per line?"
        raise DataError(reason, file=path, line=line + 1) from None
    if not line:
        raise DataError("the file is empty; it needs one JSON object per line", file=path)


def line_blocks(file: str, stream: BinaryIO, size: int) -> Iterator[LinesBlock]:
    """The blocks of a stream of JSON Lines; what the stream raises comes after its whole lines."""
    first = 1
    blank = b""  # lines that are only dropped if nothing follows
    for data in _whole_lines(stream, size):
        data = blank + (data.removeprefix(_BOM) if first == 1 else data)
        used = len(data.rstrip())
        end = data.find(b"\n", used) + 1 if used else 0
        if used and not end:
            end = len(data)
        blank = data[end:]
        if used:
            yield LinesBlock(file, first, data[:end])
            first += data.count(b"\n", 0, end)


def array_record_blocks(path: Path, size: int) -> Iterator[RawBlock]:
    """Cuts an ArrayRecord file after the record that makes a block `size` bytes.

    Raises:
      DataError: the file is unreadable, empty, damaged or cut off.
    """
    file = str(path)
    first, held = 1, 0
    found: list[bytes] = []
    fault: DataError | None = None
    try:
        for raw in _array_records(path):
            found.append(raw)
            held += len(raw)
            if held >= size:
                yield RawBlock(file, first, tuple(found))
                first += len(found)
                held, found = 0, []
    except RuntimeError as error:
        reason = f"the file is cut off or damaged ({brief(error)}); copy it again"
        fault = DataError(reason, file=path, line=first + len(found))
    if found:
        yield RawBlock(file, first, tuple(found))
        first += len(found)
    if fault is not None:
        raise fault
    if first == 1:
        raise DataError("the file is empty; it holds no records", file=path)


def parquet_blocks(path: Place, size: int) -> Iterator[TableBlock]:
    """Cuts a Parquet file into blocks of about `size` bytes; see `_table_blocks`.

    Raises:
      DataError: the file is unreadable, empty, damaged or cut off.
    """
    import pyarrow.parquet as pq

    def batches() -> Iterator[Any]:
        # Buffered: without, each column of a row group would be read into memory whole.
        source = path.open() if isinstance(path, Remote) else path
        with pq.ParquetFile(source, page_checksum_verification=True, buffer_size=1 << 20) as file:
            for group in range(file.num_row_groups):
                facts = file.metadata.row_group(group)
                bytes_per_row = max(facts.total_byte_size, 0) // max(facts.num_rows, 1)
                rows = min(max(size // max(bytes_per_row, 1), 1), _ROWS_PER_BATCH)
                # No threads, which would not survive the fork of a worker process.
                yield from file.iter_batches(rows, row_groups=[group], use_threads=False)

    return _table_blocks(path, batches(), size)


def arrow_blocks(path: Path, size: int) -> Iterator[TableBlock]:
    """Cuts an Arrow file, stream or random access, into blocks of about `size` bytes.

    Raises:
      DataError: the file is unreadable, empty, damaged or cut off.
    """
    import pyarrow as pa

    def batches() -> Iterator[Any]:
        options = pa.ipc.IpcReadOptions(use_threads=False)
        with pa.OSFile(str(path)) as file:
            magic = file.read(6)
            file.seek(0)
            if magic == b"ARROW1":
                whole = pa.ipc.open_file(file, options=options)
                yield from map(whole.get_batch, range(whole.num_record_batches))
            else:
                yield from pa.ipc.open_stream(file, options=options)

    return _table_blocks(path, batches(), size)


_READERS: dict[str, Reader] = {
    r"\.(jsonl|ndjson|json)(\.gz|\.zst)?$": jsonl_blocks,
    r"\.parquet$": parquet_blocks,
    r"\.arrow$": arrow_blocks,
    r"\.array_?record(-\d+-of-\d+)?$": array_record_blocks,
}


def brief(error: BaseException) -> str:
    """The first line of what a library says, short and printable."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return printable(lines[0], 160)


def printable(text: str, longest: int) -> str:
    """`text` cut to `longest` characters, with half surrogates and control characters escaped."""
    cut = text if len(text) <= longest else f"{text[:longest]}..."
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in cut)
    return shown.encode("utf-8", "backslashreplace").decode("utf-8")


def unreadable(error: OSError) -> str:
    """The reason of a `DataError` for a file or folder that the system does not give."""
    return f"cannot be read ({os.strerror(error.errno) if error.errno else brief(error)})"


def kind(value: Any) -> str:
    """What JSON calls the value; values that JSON has not are called by their Python type."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, bytes):
        return "bytes (stored without a type that says text, or not UTF-8)"
    names = {str: "text", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


class _LongLineError(Exception):
    """A line too long to be one record; the file must be of another kind."""


def _open_bytes(path: str | Place) -> BinaryIO:
    packing = _COMPRESSIONS.get(_suffix(path))
    stream = located(path).open("rb")
    if packing == "gzip":
        return cast(BinaryIO, _Gunzipped(stream))
    if packing == "zstd":
        import pyarrow as pa

        return cast(BinaryIO, pa.CompressedInputStream(stream, "zstd"))
    return stream


class _Gunzipped(gzip.GzipFile):
    """Closes the stream that it reads, too."""

    def __init__(self, stream: BinaryIO) -> None:
        super().__init__(mode="rb", fileobj=stream)
        self._stream = stream

    def close(self) -> None:
        super().close()
        self._stream.close()


def _suffix(path: str | Place) -> str:
    return Path(str(path)).suffix.lower()


def _whole_lines(stream: BinaryIO, size: int) -> Iterator[bytes]:
    """Bytes that end with the first line end after `size` bytes, or with the stream."""
    held = bytearray()
    searched = size - 1
    while True:
        try:
            data = stream.read1(_CHUNK)  # type: ignore[attr-defined]
            if len(held) > size + _LONGEST_LINE:
                raise _LongLineError
        except (EOFError, zlib.error, OSError, _LongLineError):
            if end := held.rfind(b"\n") + 1:
                yield bytes(held[:end])
            raise
        if not data:
            break
        held += data
        while end := held.find(b"\n", searched) + 1:
            yield bytes(held[:end])
            del held[:end]
            searched = size - 1
        searched = max(len(held), size - 1)
    if held:
        yield bytes(held)


def _json_record(raw: bytes, file: str, line: int) -> Record | DataError:
    def fault(reason: str) -> DataError:
        return DataError(reason, file=file, line=line)

    if not raw.strip():
        return fault("a blank line; remove it")
    try:
        value = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        return fault(f"not UTF-8 (byte {error.start + 1} of the line); convert the file to UTF-8")
    except json.JSONDecodeError as error:
        return fault(f"not JSON: {error.msg} (column {error.colno})")
    except RecursionError:
        return fault(f"JSON nested more than {_DEEPEST} levels deep")
    except ValueError as error:  # an integer of thousands of digits
        return fault(f"not JSON: {brief(error)}")
    if not isinstance(value, dict):
        return fault(f"a JSON object is expected, not {kind(value)}")
    if raw.count(b"[") + raw.count(b"{") > _DEEPEST and is_too_deep(value):
        return fault(f"JSON nested more than {_DEEPEST} levels deep")
    return value


def is_too_deep(value: Any) -> bool:
    """Whether lists and objects lie in one another deeper than any row needs."""
    level = [value]
    for _ in range(_DEEPEST):
        inner = (v.values() if isinstance(v, dict) else v for v in level)
        level = [w for values in inner for w in values if isinstance(w, dict | list)]
        if not level:
            return False
    return True


def _array_records(path: Path) -> Iterator[bytes]:
    from array_record.python import array_record_module

    try:
        path.open("rb").close()  # for the reason: ArrayRecord opens what is not there as empty
    except OSError as error:
        raise DataError(unreadable(error), file=path) from None
    # No threads, which would not survive the fork of a worker process.
    reader = array_record_module.ArrayRecordReader(str(path), "max_parallelism:0")
    try:
        if not reader.ok():
            raise RuntimeError("no whole ArrayRecord file")
        for _ in range(reader.num_records()):
            yield reader.read()
    finally:
        reader.close()


def _table_blocks(path: Place, batches: Iterable[Any], size: int) -> Iterator[TableBlock]:
    """Cuts batches of rows so that each block holds about `size` bytes in Arrow's layout."""
    import pyarrow as pa

    file = str(path)
    first, row, held = 1, 1, 0
    streams: list[bytes] = []
    fault: DataError | None = None
    try:
        for batch in batches:
            _validate(batch)
            rows = max(batch.num_rows * size // max(batch.nbytes, 1), 1)
            for start in range(0, batch.num_rows, rows):
                piece = batch.slice(start, rows)
                streams.append(_stream_of(piece))
                held += piece.nbytes
                row += piece.num_rows
                if held >= size:
                    yield TableBlock(file, first, tuple(streams))
                    first, held, streams = row, 0, []
    except FileNotFoundError:
        raise DataError("there is no such file", file=path) from None
    except (pa.ArrowException, OSError, ValueError, KeyError, IndexError) as error:
        if isinstance(error, OSError) and error.errno:
            raise DataError(unreadable(error), file=path) from None
        reason = f"cannot be read from here on ({brief(error)}); it is cut off or damaged: copy it"
        fault = DataError(f"{reason} again", file=path, line=row)
    if streams:
        yield TableBlock(file, first, tuple(streams))
    if fault is not None:
        raise fault
    if row == 1:
        raise DataError("the file is empty; it holds no rows", file=path)


def _stream_of(batch: Any) -> bytes:
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return cast(bytes, sink.getvalue().to_pybytes())


def _validate(batch: Any) -> None:
    """Checks offsets and lengths, which Arrow would follow out of bounds.

    Raises:
      pyarrow.ArrowInvalid: the batch is damaged; but text that is not UTF-8 is no reason.
      UnicodeDecodeError: the name of a column is not UTF-8.
    """
    import pyarrow as pa

    _ = batch.schema.names
    try:
        batch.validate(full=True)
    except pa.ArrowInvalid:
        # Text that is not UTF-8 is the fault of its row alone: as bytes it is valid. A view repairs
        # lengths that are wrong, so these are checked before.
        batch.validate()
        for column in batch.columns:
            column.view(_as_bytes(column.type)).validate(full=True)
    # Columns without content can claim any number of rows. (nbytes follows offsets: only now.)
    if batch.num_rows > 8 * batch.nbytes + 64:
        raise pa.ArrowInvalid(f"{batch.num_rows} rows in {batch.nbytes} bytes")


def _as_bytes(arrow_type: Any) -> Any:
    """The type with text as bytes, of the same layout."""
    import pyarrow as pa

    types = pa.types
    if types.is_string(arrow_type):
        return pa.binary()
    if types.is_large_string(arrow_type):
        return pa.large_binary()
    if types.is_list(arrow_type):
        return pa.list_(arrow_type.value_field.with_type(_as_bytes(arrow_type.value_type)))
    if types.is_large_list(arrow_type):
        return pa.large_list(arrow_type.value_field.with_type(_as_bytes(arrow_type.value_type)))
    if types.is_struct(arrow_type):
        return pa.struct([field.with_type(_as_bytes(field.type)) for field in arrow_type])
    return arrow_type


def _table_records(batch: Any, file: str, first: int) -> Iterator[Record | DataError]:
    try:
        records = batch.to_pylist()
    except Exception:  # a value that Python has not: see _table_record
        rows = range(batch.num_rows)
        records = [_table_record(batch.slice(row, 1), file, first + row) for row in rows]
    yield from records


def _table_record(batch: Any, file: str, row: int) -> Record | DataError:
    record: Record = {}
    for place, field in enumerate(batch.schema):
        try:
            record[field.name] = batch.column(place)[0].as_py()
        except UnicodeDecodeError:
            return DataError("is not UTF-8", file=file, line=row, field=printable(field.name, 80))
        except Exception as error:
            # Dates past the year 9999, unknown time zones: whatever Python's types refuse.
            reason = f"cannot be read ({brief(error)}); remove the column or change its type"
            return DataError(reason, file=file, line=row, field=printable(field.name, 80))
    return record
