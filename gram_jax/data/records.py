"""Where rows come from: `open_source` takes what a user names and gives blocks of records.

A source is named by

  a file         .jsonl (.ndjson, .json; also .gz and .zst), .parquet, .arrow, .array_record
  a folder       of such files, all of them in order of name; written by `save_to_disk` of Hugging
                 Face datasets; or written by TFDS with file_format='array_record'
  FOLDER:SPLIT   one split of a folder with splits (a DatasetDict, or TFDS)
  a pattern      of files, with *, ? or [...], and ** for folders at any depth
  a URL          of a file, a folder or a pattern in an object store (gs://, s3://, ...):
                 JSON Lines and Parquet; see `gram_jax.storage`
  builtin:NAME   what every installation has; see `BUILTIN`

Every record is a JSON-like object, whatever the format. `gram_jax.data.sources` makes rows of them.
"""

from __future__ import annotations

import dataclasses
import functools
import glob
import hashlib
import io
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from gram_jax.data import builtin
from gram_jax.data.docstrings import pretraining_text, split
from gram_jax.data.formats import (
    Block,
    Reader,
    Record,
    array_record_blocks,
    arrow_blocks,
    brief,
    jsonl_blocks,
    line_blocks,
    parquet_blocks,
    printable,
    reader_of,
    unreadable,
)
from gram_jax.errors import DataError
from gram_jax.storage import Place, Remote, is_url

__all__ = ["BUILTIN", "Block", "Piece", "Record", "Source", "TfdsBlock", "open_source"]

_EXTENSIONS = ".jsonl (plain, .gz or .zst), .parquet, .arrow or .array_record"


@dataclasses.dataclass(frozen=True)
class Piece:
    """What is read from its start to its end by one process: a file; can be pickled.

    Attributes:
      document: number of the file among all files; one given twice, one after the other, has one.
      blocks: cuts it into blocks of about so many bytes; see `Source.blocks`.
    """

    document: int
    blocks: Callable[[int], Iterator[Block]]


@dataclasses.dataclass(frozen=True)
class Source:
    """What a name stands for.

    Attributes:
      spec: the name.
      parts: the data files in order, and how each is read.
      metadata: files that say which data files there are, or how they are read.
      content: of a source without files, its JSON Lines.
    """

    spec: str
    parts: tuple[tuple[Place, Reader], ...] = ()
    metadata: tuple[Path, ...] = ()
    content: Callable[[], bytes] | None = None

    def files(self) -> tuple[Place, ...]:
        """The files whose content is the source's content; none for a built-in source."""
        return *self.metadata, *(path for path, _ in self.parts)

    def identity(self) -> str:
        """SHA-256 of the content of a source without files; "" for one with files."""
        return hashlib.sha256(self.content()).hexdigest() if self.content else ""

    def blocks(self, size: int) -> Iterator[Block]:
        """Yields the records in order, in blocks of about `size` (> 0) bytes, each of one file.

        Where the cuts are depends on the content and on `size` alone.

        Raises:
          DataError: a file is missing, unreadable, empty, damaged or cut off; the records before
            the damage are yielded first.
        """
        for read in self.readers():
            yield from read(size)

    def readers(self) -> tuple[Callable[[int], Iterator[Block]], ...]:
        """What reads each data file; of a source without files, its content."""
        if self.content is not None:
            return (functools.partial(_content_blocks, self.spec, self.content),)
        return tuple(functools.partial(reader, path) for path, reader in self.parts)


def pieces_of(sources: Sequence[Source]) -> list[Piece]:
    """The pieces of sources, in order."""
    pieces: list[Piece] = []
    document, before = -1, None
    for source in sources:
        names = [str(path) for path, _ in source.parts] or [source.spec]
        for name, read in zip(names, source.readers(), strict=True):
            if (source, name) != before:
                document, before = document + 1, (source, name)
            pieces.append(Piece(document, read))
    return pieces


@dataclasses.dataclass(frozen=True, slots=True)
class TfdsBlock(Block):
    """Examples as TFDS writes them.

    Attributes:
      raw: serialised examples.
      features: the content of the `features.json` they were written with.
    """

    raw: tuple[bytes, ...]
    features: str

    def content(self) -> tuple[bytes, ...]:
        return self.raw

    def records(self) -> Iterator[tuple[int, Record | DataError]]:
        for row, raw in enumerate(self.raw, start=self.first):
            yield row, _tfds_record(raw, self.features, self.file, row)


def open_source(spec: str) -> Source:
    """Finds what `spec` names; see the module for what it can be. Data is read by `blocks` only.

    Raises:
      DataError: nothing is there, or it is of no known kind, or a split is unknown or not named.
    """
    if not spec:
        raise DataError("the name of a source is empty", file='""')
    kind, _, name = spec.partition(":")
    if kind == "builtin":
        if name not in BUILTIN:
            raise DataError(f"no such built-in source; there is {', '.join(BUILTIN)}", file=spec)
        return Source(spec, content=BUILTIN[name])
    if is_url(spec):
        return _remote(spec, Remote(spec))
    try:
        return _find(spec)
    except OSError as error:
        raise DataError(unreadable(error), file=spec) from None


def docstring_lines() -> bytes:
    """What the quickstart pretrains on, as JSON Lines: docstrings and language-reference topics.

    Docstrings that the quickstart evaluates on are left out. Read once per process: it takes tens
    of seconds.
    """
    return _docstring_lines()


BUILTIN: dict[str, Callable[[], bytes]] = {"docstrings": docstring_lines}
"""Built-in sources by name."""


@functools.lru_cache(maxsize=1)
def _docstring_lines() -> bytes:
    standard = builtin.standard_library_docstrings().docstrings
    known = builtin.package_docstrings(builtin.IN_DISTRIBUTION).docstrings
    train, _ = split(builtin.distinct([*standard, *known]))
    rows = [
        {"text": "".join(pretraining_text(docstring)), "source": docstring.package}
        for docstring in (*train, *builtin.reference_topics())
    ]
    if not rows:
        reason = "this Python has no docstrings (an installation without sources?)"
        raise DataError(reason, file="builtin:docstrings")
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def _content_blocks(spec: str, content: Callable[[], bytes], size: int) -> Iterator[Block]:
    return line_blocks(spec, io.BytesIO(content()), size)


def _find(spec: str) -> Source:
    path = Path(spec)
    if path.is_dir():
        return _folder(spec, path, "")
    if path.exists():
        return Source(spec, (_part(path),))
    folder, colon, name = spec.rpartition(":")
    if colon and Path(folder).is_dir():
        return _folder(spec, Path(folder), name)
    if not any(character in spec for character in "*?["):
        raise DataError("there is no such file or folder", file=spec)
    # Not Path.glob, which takes no absolute pattern.
    found = (Path(match) for match in sorted(set(glob.glob(spec, recursive=True))))  # noqa: PTH207
    files = [path for path in found if not path.is_dir() and not _is_hidden(path)]
    if not files:
        raise DataError("no file matches this pattern", file=spec)
    return Source(spec, tuple(map(_part, files)))


def _remote(spec: str, place: Remote) -> Source:
    """A file, a folder or a pattern of files in an object store."""
    if any(character in spec for character in "*?[") or place.is_dir():
        files = [file for file in place.files() if not _is_hidden(file)]
        if not files:
            raise DataError("no file is there, or fits the pattern", file=spec)
        return Source(spec, tuple(map(_remote_part, files)))
    place.stat()  # says what is wrong if it is not there
    return Source(spec, (_remote_part(place),))


def _remote_part(place: Remote) -> tuple[Place, Reader]:
    reader = reader_of(place)
    if reader not in (jsonl_blocks, parquet_blocks):
        reason = "of a URL, .jsonl (plain, .gz or .zst) and .parquet are read; copy or mount others"
        raise DataError(reason, file=place)
    return place, reader


def _part(path: Path) -> tuple[Place, Reader]:
    reader = reader_of(path)
    if reader is None:
        reason = f"unknown kind of file; name it {_EXTENSIONS}, or leave it out with a pattern"
        raise DataError(reason, file=path)
    if not path.is_file():
        raise DataError("is not a regular file", file=path)
    return path, reader


def _is_hidden(path: Place) -> bool:
    """Such as .DS_Store, and the _SUCCESS that Spark leaves beside its files."""
    return path.name.startswith((".", "_"))


def _folder(spec: str, folder: Path, name: str) -> Source:
    """A folder of any kind; `name` is the split, or ""."""
    if (folder / "dataset_dict.json").exists():
        splits = _metadata(folder / "dataset_dict.json").get("splits")
        inner = folder / _known_split(spec, name, splits)
        return _saved_to_disk(spec, inner, (folder / "dataset_dict.json",))
    if (folder / "features.json").exists():
        return _tfds(spec, folder, name)
    if name:
        raise DataError(f"{folder} has no splits; leave out :{name}", file=spec)
    if (folder / "state.json").exists():
        return _saved_to_disk(spec, folder)
    if (folder / "dataset_info.json").exists():
        reason = "has a dataset_info.json, but neither state.json (Hugging Face) nor features.json"
        raise DataError(f"{reason} (TFDS) beside it; copy the folder again", file=folder)
    paths = sorted(path for path in folder.iterdir() if not _is_hidden(path))
    if not paths:
        raise DataError(f"the folder is empty; it needs files {_EXTENSIONS}", file=folder)
    for path in paths:
        if path.is_dir():
            reason = f"holds the folder {path.name}; name that one, or a pattern: {folder}/**/*.X"
            raise DataError(reason, file=folder)
    return Source(spec, tuple(map(_part, paths)))


def _known_split(spec: str, name: str, splits: Any) -> str:
    if not isinstance(splits, list) or not all(isinstance(s, str) and s for s in splits):
        raise DataError("the folder's list of splits is damaged; copy it again", file=spec)
    listed = printable(", ".join(splits) or "none", 400)
    if not name:
        raise DataError(f"name a split, as in {spec}:{splits[0]} (there are: {listed})", file=spec)
    if name not in splits:
        raise DataError(f"has no split {name!r} (there are: {listed})", file=spec)
    return name


def _metadata(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DataError("is missing; copy the folder again", file=path) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"is damaged ({brief(error)}); copy it again", file=path) from None
    if not isinstance(value, dict):
        raise DataError("is damaged (not a JSON object); copy it again", file=path)
    return value


def _saved_to_disk(spec: str, folder: Path, metadata: tuple[Path, ...] = ()) -> Source:
    """The folder of one Hugging Face `Dataset`: Arrow files, in the order of state.json."""
    state = _metadata(folder / "state.json")
    if state.get("_indices_data_files"):  # versions 1 of datasets wrote them
        reason = "selects rows through an indices file; load it, flatten_indices(), save it again"
        raise DataError(reason, file=folder)
    listed = state.get("_data_files")
    if not isinstance(listed, list) or not all(map(_is_data_file, listed)):
        reason = "is damaged (_data_files is not a list of file names); copy it again"
        raise DataError(reason, file=folder / "state.json")
    if not listed:
        raise DataError("the dataset is empty; it lists no data files", file=folder)
    paths = [folder / entry["filename"] for entry in listed]
    for path in paths:
        if not path.is_file():
            raise DataError("is missing, but state.json lists it", file=path)
    parts = tuple((path, arrow_blocks) for path in paths)
    return Source(spec, parts, (*metadata, folder / "state.json"))


def _is_data_file(entry: Any) -> bool:
    name = entry.get("filename") if isinstance(entry, dict) else None
    # A name with folders in it would lead out of the dataset.
    return isinstance(name, str) and bool(name) and Path(name).name == name


def _tfds(spec: str, folder: Path, name: str) -> Source:
    """One split of a folder written by TFDS: a list of ArrayRecord files."""
    features = folder / "features.json"
    _refuse_foreign_classes(features)
    info = _metadata(folder / "dataset_info.json")
    if info.get("fileFormat") != "array_record":
        found = printable(str(info.get("fileFormat", "tfrecord")), 80)
        reason = f"the files are {found}; prepare the dataset with file_format='array_record'"
        raise DataError(reason, file=folder)
    import tensorflow_datasets as tfds

    try:
        splits = tfds.builder_from_directory(str(folder)).info.splits
        split_name = _known_split(spec, name, list(splits))
        paths = [Path(str(path)) for path in splits[split_name].filepaths]
        lengths = list(splits[split_name].shard_lengths)
    except DataError:
        raise
    except Exception as error:
        # TFDS promises nothing about what it raises for metadata that is damaged.
        reason = f"TFDS cannot open the folder ({brief(error)}); copy it again"
        raise DataError(reason, file=folder) from None
    if not paths or not any(lengths):
        raise DataError("the split is empty", file=spec)
    for path in paths:
        if not path.is_file():
            raise DataError("is missing, but dataset_info.json lists it", file=path)
    text = features.read_text("utf-8")
    parts = tuple(
        (path, functools.partial(_tfds_blocks, features=text, rows=length))
        for path, length in zip(paths, lengths, strict=True)
        if length
    )
    return Source(spec, parts, (folder / "dataset_info.json", features))


def _refuse_foreign_classes(features: Path) -> None:
    """TFDS imports the modules that features.json names: only its own, or data could run code.

    Raises:
      DataError: a feature's class is not of TFDS.
    """
    names: list[str] = []

    def collect(value: dict[str, Any]) -> dict[str, Any]:
        keys = ("pythonClassName", "python_class_name", "type")
        names.extend(value[key] for key in keys if isinstance(value.get(key), str))
        if isinstance(value.get("json"), str):
            json.loads(value["json"], object_hook=collect)
        return value

    try:
        json.loads(features.read_bytes(), object_hook=collect)
    except (ValueError, RecursionError) as error:
        raise DataError(f"is damaged ({brief(error)}); copy it again", file=features) from None
    for name in names:
        if "." in name and not name.startswith("tensorflow_datasets."):
            reason = f"the class {printable(name, 80)} is not of TFDS; use features of TFDS alone"
            raise DataError(reason, file=features)


def _tfds_blocks(path: Path, size: int, *, features: str, rows: int) -> Iterator[TfdsBlock]:
    found = 0
    for block in array_record_blocks(path, size):
        found += len(block.raw)
        yield TfdsBlock(block.file, block.first, block.raw, features)
    if found != rows:
        reason = f"has {found:,} records, but dataset_info.json says {rows:,}; copy it again"
        raise DataError(reason, file=path)


def _tfds_record(raw: bytes, features: str, file: str, row: int) -> Record | DataError:
    try:
        feature = _tfds_features(features)
        return cast(Record, _tfds_value(feature.deserialize_example_np(raw), feature))
    except Exception as error:
        # TFDS promises nothing about what it raises for an example that does not fit.
        reason = f"not an example with the features of features.json ({brief(error)})"
        return DataError(reason, file=file, line=row)


@functools.lru_cache(maxsize=8)
def _tfds_features(features: str) -> Any:
    import tensorflow_datasets as tfds

    return tfds.features.FeatureConnector.from_json(json.loads(features))


def _tfds_value(value: Any, feature: Any) -> Any:
    """A decoded example as Python values; TFDS turns a list of dicts around, this turns it back."""
    from tensorflow_datasets import features

    if isinstance(feature, features.FeaturesDict):
        return {name: _tfds_value(value[name], inner) for name, inner in sorted(feature.items())}
    if isinstance(feature, features.Dataset):
        return [_tfds_value(item, feature.feature) for item in value]
    inner = getattr(feature, "feature", None)
    if isinstance(feature, features.Sequence) and isinstance(inner, features.FeaturesDict):
        names = list(inner)
        rows = zip(*(value[name] for name in names), strict=True)
        return [_tfds_value(dict(zip(names, row, strict=True)), inner) for row in rows]
    return _python_value(value)


def _python_value(value: Any) -> Any:
    if hasattr(value, "tolist"):  # a NumPy array or scalar
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_python_value(item) for item in value]
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return value
    return value
