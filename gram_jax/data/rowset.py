"""Packed rows on disk: ArrayRecord shards and a manifest, read by row number.

    FOLDER/
      manifest.json                       what the rows are made of, counts, shards
      rows-00000-of-00004.array_record    one row per record, little-endian, compressed (zstd)
      quarantine.jsonl                    bad rows, with on_bad_row=quarantine

A record holds the fields of `gram_jax.rows.Batch` one after the other, in the order and with
the types of `row_dtype`. The manifest is written last: without it the folder is unfinished.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np

from gram_jax.errors import DataError, UserError
from gram_jax.rows import Batch, PackedRow, RowShape, empty_row
from gram_jax.storage import Place, Remote

MANIFEST = "manifest.json"
ROW_FORMAT = 4
"""Raised whenever equal sources would make other rows, or rows are laid out in another way."""

_WRITER_OPTIONS = "group_size:1,zstd:1"  # each row can be read alone


@dataclasses.dataclass(kw_only=True)
class Manifest:
    """What a folder of rows is.

    Attributes:
      id: digest of ``key``: rows with one id are the same rows.
      key: all that decides the rows: content of the sources, kind, settings, tokenizer, format.
      sources: where they were read, and each file's size and time of change then.
      shape, reference: of the rows; whether they have reference log-probs.
      shards: {"file", "rows", "bytes"} of each, in order.
      read, packed: counts of gram_jax.data.examples and gram_jax.packing.
      context: mean number of tokens of the contexts that tokens lie in.
      targets: targets with a weight.
      seconds: spent preparing, over all runs that were needed.
      versions: of what made them, for information.
    """

    id: str
    key: dict[str, Any]
    sources: list[dict[str, Any]]
    shape: dict[str, Any]
    reference: bool
    shards: list[dict[str, Any]]
    read: dict[str, int]
    packed: dict[str, int]
    context: float
    targets: int
    seconds: float
    versions: dict[str, str]

    @property
    def rows(self) -> int:
        return sum(int(shard["rows"]) for shard in self.shards)

    @property
    def has_branches(self) -> bool:
        """Whether a segment may be more than one run of tokens; those of text are not."""
        return self.key.get("format") != "text"

    @property
    def padding(self) -> float:
        """Share of the places in rows that hold no token."""
        return 1 - self.packed["tokens"] / max(self.packed["places"], 1)


def row_dtype(shape: RowShape, *, reference: bool) -> np.dtype[Any]:
    """The record of one row: its fields, each of its full length."""
    template = dataclasses.asdict(empty_row(shape, reference=reference))
    fields = [(k, v.dtype.newbyteorder("<"), v.shape) for k, v in template.items() if v is not None]
    return np.dtype(fields)


def write_shard(
    path: Path, rows: Iterable[PackedRow], shape: RowShape, *, reference: bool
) -> dict[str, float]:
    """Writes rows to ``path`` in one step; returns what the manifest counts over them."""
    from array_record.python.array_record_module import ArrayRecordWriter

    dtype = row_dtype(shape, reference=reference)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    counts = {"rows": 0, "targets": 0, "positions": 0, "tokens": 0}
    record = np.zeros((), dtype)
    writer = ArrayRecordWriter(str(temporary), _WRITER_OPTIONS)
    try:
        for row in rows:
            for name in dtype.names or ():
                record[name] = getattr(row.batch, name)
            writer.write(record.tobytes())
            used = row.batch.segment_ids != 0
            counts["rows"] += 1
            counts["tokens"] += int(used.sum())
            counts["positions"] += int((row.batch.positions[used] + 1).sum())
            if row.batch.weights is not None:
                counts["targets"] += int((row.batch.weights != 0).sum())
    finally:
        writer.close()
    with temporary.open("rb") as stream:
        os.fsync(stream.fileno())
    counts["bytes"] = temporary.stat().st_size
    temporary.replace(path)
    return dict(counts)


def write_json(path: Place, values: Any) -> None:
    """Replaces a JSON file in one step."""
    if isinstance(path, Remote):
        path.write(io.BytesIO(json.dumps(values, indent=1).encode()))
        return
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as stream:
        json.dump(values, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)


def read_manifest(folder: Place) -> Manifest | None:
    """The manifest of a folder, or None where there is none.

    Raises:
      DataError: it cannot be used.
    """
    path = folder / MANIFEST
    try:
        if isinstance(path, Remote) and not path.exists():
            return None
        with path.open("rb") as stream:
            return Manifest(**json.loads(stream.read()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        reason = f"not a manifest of prepared rows ({error}); delete {folder} and prepare it again"
        raise DataError(reason, file=path) from None


class RowSet:
    """The rows of one folder, addressed by number."""

    def __init__(self, folder: str | Path):
        """Opens a folder whose shards are complete.

        Raises:
          DataError: the manifest or a shard is missing, or a shard is not as the manifest says.
        """
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        self.folder = Path(folder)
        manifest = read_manifest(self.folder)
        if manifest is None:
            raise DataError("there are no prepared rows here", file=self.folder)
        self.manifest = manifest
        paths = [self.folder / shard["file"] for shard in manifest.shards]
        for path, shard in zip(paths, manifest.shards, strict=True):
            # ArrayRecord opens a missing file as an empty one.
            size = path.stat().st_size if path.is_file() else None
            if size != shard["bytes"]:
                found = "is missing" if size is None else f"has {size} bytes"
                reason = f"{found}, but the manifest says {shard['bytes']} bytes; {self._remedy()}"
                raise DataError(reason, file=path)
        self.shape = RowShape(**manifest.shape)
        self.dtype = row_dtype(self.shape, reference=manifest.reference)
        try:
            self._source = ArrayRecordDataSource([str(path) for path in paths])
            found_rows = len(self._source)
        except (RuntimeError, ValueError, OSError) as error:
            raise DataError(f"{error}; {self._remedy()}", file=self.folder) from None
        if found_rows != manifest.rows:
            reason = f"has {found_rows} rows, the manifest says {manifest.rows}; {self._remedy()}"
            raise DataError(reason, file=self.folder)

    def __len__(self) -> int:
        return self.manifest.rows

    def read(self, numbers: Sequence[int]) -> np.ndarray:
        """The rows with these numbers, a vector of `row_dtype`.

        Raises:
          DataError: a row is damaged.
        """
        if not len(numbers):
            return np.zeros(0, self.dtype)
        try:
            records = self._source.__getitems__([int(number) for number in numbers])
            return np.frombuffer(b"".join(records), self.dtype)
        except (RuntimeError, ValueError, OSError) as error:
            reason = f"rows {list(map(int, numbers))} cannot be read ({error}); {self._remedy()}"
            raise DataError(reason, file=self.folder) from None

    def _remedy(self) -> str:
        return "delete the folder, so that it is prepared again"


class Rows:
    """The rows of several folders under one count, and one row of padding after them.

    Raises:
      UserError: the folders' rows are of different shapes.
    """

    def __init__(self, sets: Sequence[RowSet]):
        self.sets = list(sets)
        first = self.sets[0]
        for other in self.sets[1:]:
            if other.dtype != first.dtype:
                raise UserError(
                    f"{first.folder} and {other.folder}: their rows have different fields; sources"
                    " of one stage must all have reference log-probs, or none"
                )
        self.dtype = first.dtype
        self.sizes = [len(s) for s in self.sets]
        self._starts = np.cumsum([0, *self.sizes])
        self.padding = int(self._starts[-1])
        """The number of a row of padding, to fill up a last batch."""

    def __len__(self) -> int:
        return self.padding

    def mean(self, of: str, weights: Sequence[float]) -> float:
        """Mean per row of a count of the manifests: tokens, pairs, targets; weighted by source."""
        shares = np.asarray(weights or self.sizes, float)
        counts = [
            s.manifest.targets if of == "targets" else s.manifest.packed[of] for s in self.sets
        ]
        means = np.asarray(counts) / np.asarray(self.sizes)
        return float((shares / shares.sum() * means).sum())

    def context(self) -> float:
        """Mean number of tokens of the contexts that tokens lie in: 2 x their mean position."""
        tokens = np.array([s.manifest.packed["tokens"] for s in self.sets], float)
        return float((tokens / tokens.sum()) @ [s.manifest.context for s in self.sets])

    def targets_per_token(self, weights: Sequence[float]) -> float:
        return self.mean("targets", weights) / self.mean("tokens", weights)

    def read(self, numbers: np.ndarray) -> Batch:
        """The rows with these numbers (any shape), as numpy arrays [*numbers.shape, ...]."""
        flat = numbers.reshape(-1)
        found = np.zeros(len(flat), self.dtype)
        for start, rows in zip(self._starts, self.sets, strict=False):
            inside = (flat >= start) & (flat < start + len(rows))
            found[inside] = rows.read(flat[inside] - start)
        fields: dict[str, Any] = {name: found[name] for name in self.dtype.names or ()}
        if not any(rows.manifest.has_branches for rows in self.sets):
            fields["branch_ids"] = None  # attention is simpler without
        batch = Batch(**fields)
        return cast(
            Batch, jax.tree.map(lambda leaf: leaf.reshape(*numbers.shape, *leaf.shape[1:]), batch)
        )
