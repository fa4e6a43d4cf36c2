"""Tokenises and packs sources once, into rows on disk (see gram_jax.data.rowset).

In passes, spread over all cores and made of pure functions of their input (gram_jax.data.steps):

0. where rows that are nearly the same as earlier ones are left out: a signature of each row, in
   FOLDER/work/signatures-N, and which rows these are (gram_jax.data.near_duplicates);
1. chunks: consecutive records are checked and tokenised, each chunk by itself, and kept in
   FOLDER/work/chunk-N sorted by key (a document's, or a prompt's);
2. shards: the range of keys is cut into equal parts; the records of a part, from all chunks, are
   grouped by prompt, packed and written as one shard.

Chunks and shards are put in place whole, so a preparation that was killed goes on with those it
has. The rows depend on the sources, the settings and the tokenizer; not on the number of processes.
An Apache Beam runner makes the same rows (gram_jax.data.pipeline).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gram_jax.config import DataConfig
from gram_jax.data import work
from gram_jax.data.examples import Layout, row_shape
from gram_jax.data.meter import Meter
from gram_jax.data.records import Block, Piece, Source, open_source, pieces_of
from gram_jax.data.rowset import (
    MANIFEST,
    ROW_FORMAT,
    Manifest,
    RowSet,
    read_manifest,
    write_json,
)
from gram_jax.data.selection import Selection
from gram_jax.data.shapes import LABELLED, UNLABELLED, detect_format, kind_of
from gram_jax.data.steps import Recipe, num_shards
from gram_jax.data.token_records import ExampleCounts
from gram_jax.data.tokenizer import Tokenizer
from gram_jax.errors import DataError, UserError
from gram_jax.packing import PackCounts
from gram_jax.storage import Place, Remote, digest_of
from gram_jax.versions import versions

CHUNK_BYTES = 4 * 2**20
"""Content of a chunk, before it is tokenised: what a worker gets at once, or loses in a kill."""
_ROWS_PER_SHARD = 4096
_BYTES_PER_WORKER = 2 * 2**20  # less is not worth the start of a process

_SETTINGS = (
    "reference_field", "row_length", "row_targets", "row_sequences", "row_pairs", "max_prompt",
    "too_long", "add_eos",
)  # fmt: skip
"""Fields of DataConfig that decide rows."""


@dataclasses.dataclass(frozen=True)
class Beam:
    """Rows are made by an Apache Beam runner.

    Attributes:
      runner: its name, as Beam knows it.
      options: further pipeline options, as on a command line.
    """

    runner: str
    options: tuple[str, ...] = ()


def prepared_rows(
    spec: str,
    config: DataConfig,
    tokenizer: Tokenizer,
    folder: Path,
    *,
    layout: Layout,
    replace: bool,
    meter: Meter,
    use: str = "train",
) -> RowSet:
    """The rows of a source, opened; see `prepare_rows`."""
    prepare_rows(
        spec, config, tokenizer, folder, layout=layout, replace=replace, meter=meter, use=use
    )
    return RowSet(folder)


def prepare_rows(
    spec: str,
    config: DataConfig,
    tokenizer: Tokenizer,
    folder: Place,
    *,
    layout: Layout,
    replace: bool,
    meter: Meter,
    use: str = "train",
    beam: Beam | None = None,
) -> Manifest:
    """Makes the rows of a source in ``folder``, unless its rows are there; returns what they are.

    Args:
      spec: a source, as in ``config.train``; several joined by commas are one.
      layout: what the objective needs of a row.
      replace: other rows that are in ``folder`` give way; else they are an error.
      meter: shows progress.
      use: "train"; "validation"; or "held_out", for the prompts of a training source that are held
        out for validation.
      beam: what makes the rows; None for the processes of this machine.

    Raises:
      UserError: the source, or a row of it, cannot be used, or ``folder`` holds other rows.
    """
    asked = _Asked(spec, config, tokenizer, layout, Selection.of(config, use))
    manifest = read_manifest(folder)
    found = [] if manifest is None else _differences(manifest, asked, meter)
    if found and not replace:
        raise UserError(
            f"{folder}: the prepared rows here are not those asked for: {'; '.join(found)}. Delete"
            " the folder, so that they are prepared again, or choose another"
        )
    if found:
        meter.say(f"{folder}: preparing again: {'; '.join(found)}")
        (folder / MANIFEST).unlink()
    if manifest is not None and not found:
        return manifest
    if isinstance(folder, Remote):
        return _prepare(asked, folder, meter, beam)
    with work.locked(folder, meter.say):
        # Another process may have been quicker.
        return read_manifest(folder) or _prepare(asked, folder, meter, beam)


@dataclasses.dataclass(frozen=True)
class _Asked:
    """Rows that are asked for."""

    spec: str
    config: DataConfig
    tokenizer: Tokenizer
    layout: Layout
    selection: Selection

    def sources(self) -> list[Source]:
        return [open_source(part) for part in self.spec.split(",")]

    def excluded(self) -> list[Source]:
        """Sources of prompts that should not be among these rows."""
        specs = self.config.exclude if self.selection.use == "train" else ()
        return [open_source(part) for spec in specs for part in spec.split(",")]


def _differences(manifest: Manifest, asked: _Asked, meter: Meter) -> list[str]:
    """In what the rows of a folder are not those that are asked for."""
    key, config = manifest.key, asked.config
    if key["row_format"] != ROW_FORMAT:
        return ["another version of gram_jax made them"]
    found = [
        f"config.data.{name} was {key['settings'][name]!r} and is {getattr(config, name)!r}"
        for name in _SETTINGS
        if key["settings"][name] != getattr(config, name)
    ]
    found += [
        f"{'' if name == 'use' else 'config.data.'}{name} was {before!r} and is {now!r}"
        for name, before, now in _selection_changes(key["selection"], asked.selection.key())
    ]
    if key["tokenizer"] != asked.tokenizer.fingerprint():
        found.append("the tokenizer is another")
    if config.format not in ("auto", key["format"]):
        found.append(f"they are rows of {key['format']}")
    if key["layout"] != asked.layout.key():
        found.append(f"they are laid out for {key['layout']}, and {asked.layout.key()} is wanted")
    if manifest.read["bad_rows"] and config.on_bad_row == "stop":
        found.append(f"{manifest.read['bad_rows']} bad rows were left out (on_bad_row)")
    return (
        found + _source_changes(manifest, asked, meter) + _exclude_changes(manifest, asked, meter)
    )


def _selection_changes(
    before: dict[str, Any], now: dict[str, Any]
) -> Iterator[tuple[str, Any, Any]]:
    """(name, value before, value now) of what differs; what is absent is 0."""
    for name in {**now, **before}:
        old, new = before.get(name, 0), now.get(name, 0)
        if old != new:
            yield name, old, new


def _source_changes(manifest: Manifest, asked: _Asked, meter: Meter) -> list[str]:
    """In what a source is not as it was when its rows were made."""
    try:
        sources = asked.sources()
    except DataError as error:
        # Rows may be made on one machine and used on another, where their source is not.
        meter.say(f"rows prepared earlier are used without a look at their source: {error}")
        return []
    before = {file["path"]: file for source in manifest.sources for file in source["files"]}
    now = {file["path"]: file for source in sources for file in _seen(source)["files"]}
    if now and now == before:
        return []
    if _identity(sources) == manifest.key["sources"]:
        return []
    changed = [path for path, file in now.items() if before.get(path) != file]
    return [f"{asked.spec} has changed ({', '.join(changed[:3]) or 'its content is another'})"]


def _exclude_changes(manifest: Manifest, asked: _Asked, meter: Meter) -> list[str]:
    """Whether other prompts were excluded when rows were made."""
    try:
        if _identity(asked.excluded()) == manifest.key["exclude"]:
            return []
    except DataError as error:
        meter.say(f"rows prepared earlier are used without a look at config.data.exclude: {error}")
        return []
    return ["config.data.exclude holds other files"]


def _identity(sources: Sequence[Source]) -> list[dict[str, Any]]:
    """The content of sources, wherever they lie."""
    found = []
    for source in sources:
        digests = []
        for path in source.files():
            digests.append(digest_of(path))
        found.append({"sha256": digests, "identity": source.identity()})
    return found


def _prepare(asked: _Asked, folder: Place, meter: Meter, beam: Beam | None) -> Manifest:
    """Makes rows in ``folder``, going on with what an earlier try has left."""
    began, config, sources = time.monotonic(), asked.config, asked.sources()
    seen = [_seen(source) for source in sources]
    key = {
        "sources": [],
        "format": _format(sources, config, asked.layout),
        "layout": asked.layout.key(),
        "selection": asked.selection.key(),
        "exclude": _identity(asked.excluded()),
        "settings": {name: getattr(config, name) for name in _SETTINGS},
        "tokenizer": asked.tokenizer.fingerprint(),
        "row_format": ROW_FORMAT,
    }
    recipe = Recipe(
        config,
        asked.layout,
        str(key["format"]),
        row_shape(config, asked.layout),
        asked.selection.excluding(asked.excluded()),
    )
    if beam is not None:
        key["sources"], made = _make_by_beam(asked, recipe, sources, folder, meter, beam)
    elif isinstance(folder, Path):
        key["sources"] = _identity(sources)
        size = sum(file["size"] for source in seen for file in source["files"])
        made = _make(asked, recipe, sources, folder, meter, key, size)
    else:
        reason = "rows are made in a local or mounted folder; in a URL with --runner only"
        raise DataError(reason, file=folder)
    read, parts = made
    for part in parts:
        read.add(ExampleCounts(**part["read"]))
    packed = {
        field.name: sum(int(part["packed"][field.name]) for part in parts)
        for field in dataclasses.fields(PackCounts)
    }
    if not packed["rows"]:
        purpose = "train" if asked.selection.use == "train" else "validate"
        raise DataError(f"nothing to {purpose} on: {read.text()}", file=asked.spec)
    if read.bad_rows:
        path = folder / work.QUARANTINE
        meter.say(f"{read.bad_rows:,} bad rows were left out; {path} names them")
    manifest = Manifest(
        id=hashlib.sha256(json.dumps([key, read.bad_rows], sort_keys=True).encode()).hexdigest(),
        key=key,
        sources=seen,
        shape=dataclasses.asdict(recipe.shape),
        reference=bool(config.reference_field),
        shards=[{k: part[k] for k in ("file", "rows", "bytes")} for part in parts],
        read=dataclasses.asdict(read),
        packed=packed,
        context=2 * sum(part["positions"] for part in parts) / packed["tokens"],
        targets=sum(part["targets"] for part in parts),
        seconds=time.monotonic() - began,
        versions=versions(),
    )
    write_json(folder / MANIFEST, dataclasses.asdict(manifest))
    if isinstance(folder, Path):
        shutil.rmtree(folder / work.FOLDER)
    meter.say(
        f"{asked.spec}: {packed['rows']:,} rows of {config.row_length} tokens in {len(parts)}"
        f" shards, padding {manifest.padding:.2%}, {manifest.seconds:.1f} s; {read.text()}"
    )
    return manifest


def _make(
    asked: _Asked,
    recipe: Recipe,
    sources: Sequence[Source],
    folder: Path,
    meter: Meter,
    key: dict[str, Any],
    size: int,
) -> tuple[ExampleCounts, list[dict[str, Any]]]:
    """Makes rows with the processes of this machine; returns what was read, and of each shard."""
    config, selection = asked.config, recipe.selection
    fields = {field.name: getattr(recipe, field.name) for field in dataclasses.fields(recipe)}
    plan = work.Plan(**fields, folder=folder / work.FOLDER)
    # What was left out of a chunk depends on this, too.
    work.begin(plan, {**key, "on_bad_row": config.on_bad_row}, asked.tokenizer)
    pieces = pieces_of(sources)
    with work.Workers(config.workers, size // _BYTES_PER_WORKER, plan) as workers:
        repeated: dict[int, frozenset[int]] = {}
        if selection.near_duplicates:
            _make_signatures(pieces, workers, meter, asked.spec)
            repeated = work.repeated_rows(plan)
        read, tokens = _make_chunks(pieces, repeated, workers, meter, asked.spec)
        last = None
        if selection.max_pairs:
            draws = work.all_draws(plan)
            last = selection.last_drawn(draws, asked.spec)
            tokens = selection.drawn_tokens(tokens, draws, last)
        shards = num_shards(tokens, recipe, _ROWS_PER_SHARD)
        parts = _make_shards(shards, last, workers, meter, asked.spec)
    if read.bad_rows:
        work.gather_quarantine(plan, folder)
    return read, parts


def _make_by_beam(
    asked: _Asked,
    recipe: Recipe,
    sources: Sequence[Source],
    folder: Place,
    meter: Meter,
    beam: Beam,
) -> tuple[list[dict[str, Any]], tuple[ExampleCounts, list[dict[str, Any]]]]:
    """Makes rows by a Beam runner; returns the sources' identity, and what `_make` returns."""
    try:
        from gram_jax.data import pipeline
    except ImportError as error:
        raise UserError(
            f"--runner={beam.runner} needs Apache Beam ({error}), in an environment of its own:"
            " pip install -c constraints-beam.txt -e '.[beam]' (docs/preparing.md)"
        ) from None
    for source in sources:
        if source.content is not None:  # other machines have other packages
            reason = "is read from what is installed here; with --runner write it to a file first"
            raise DataError(reason, file=source.spec)
    meter.say(f"{asked.spec}: {beam.runner} makes its rows in {folder}")
    job = pipeline.Job(recipe, asked.tokenizer, folder, asked.spec, CHUNK_BYTES, _ROWS_PER_SHARD)
    made = pipeline.run(job, sources, [f"--runner={beam.runner}", *beam.options])
    return made.identity, (made.read, made.parts)


def _format(sources: Sequence[Source], config: DataConfig, layout: Layout) -> str:
    """What a source's rows are; as its first good row says, if the settings do not.

    Raises:
      DataError: it is not what the objective needs, or cannot be told.
    """
    found, kinds = config.format, LABELLED if layout.pairs else UNLABELLED
    where = sources[0].spec
    if found == "auto":
        records = (
            (block.file, line, record)
            for source in sources
            for block in source.blocks(2**16)
            for line, record in block.records()
        )
        for where, line, record in records:
            if not isinstance(record, DataError):
                found = detect_format(record, file=where, line=line, kinds=kinds)
                break
            if config.on_bad_row == "stop":
                raise record
        else:
            raise DataError("no row can be used", file=where)
    if kind_of(found) not in kinds:
        needed = "preferences" if layout.pairs else "text or responses"
        raise DataError(f"its rows are {found}, but the objective needs {needed}", file=where)
    if kind_of(found) == "unpaired" and layout.reading == "judge":
        reason = "its rows are unpaired, but a judge compares two responses; make pairs of them"
        raise DataError(f"{reason} first, or choose another objective", file=where)
    if kind_of(found) == "unpaired" and config.max_pairs:
        reason = "its rows are unpaired, so config.data.max_pairs has no pairs to draw from; set it"
        raise DataError(f"{reason} to 0, or make pairs of them first", file=where)
    return found


def _seen(source: Source) -> dict[str, Any]:
    """Where a source was read, and each file's size and time of change."""
    stats = [(path, path.stat()) for path in source.files()]
    files = [
        {"path": str(path), "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
        for path, stat in stats
    ]
    return {"spec": source.spec, "files": files}


def _blocks(pieces: Sequence[Piece]) -> Iterator[tuple[int, Block, str]]:
    """Number of the chunk, content, and name of the file among all files."""
    chunk = 0
    for piece in pieces:
        for block in piece.blocks(CHUNK_BYTES):
            yield chunk, block, str(piece.document)
            chunk += 1


def _make_signatures(
    pieces: Sequence[Piece], workers: work.Workers, meter: Meter, spec: str
) -> None:
    with meter.phase(f"comparing {spec}", "rows") as bar:
        tasks = ((chunk, block) for chunk, block, _ in _blocks(pieces))
        for rows in workers.map(work.sign_chunk, tasks):
            bar.add(rows, tokens=0)


def _make_chunks(
    pieces: Sequence[Piece],
    repeated: Mapping[int, frozenset[int]],
    workers: work.Workers,
    meter: Meter,
    spec: str,
) -> tuple[ExampleCounts, int]:
    """Tokenises what is not tokenised yet; returns counts, and tokens of all records."""
    read, tokens = ExampleCounts(), 0
    tasks = (
        (chunk, block, document, repeated.get(chunk, frozenset()))
        for chunk, block, document in _blocks(pieces)
    )
    with meter.phase(f"tokenising {spec}", "rows") as bar:
        # In order, so that of several bad rows the first is named.
        for counts in workers.map(work.make_chunk, tasks):
            part = ExampleCounts(**counts["read"])
            read.add(part)
            tokens += counts["tokens"]
            bar.add(part.rows, tokens=counts["tokens"])
    return read, tokens


def _make_shards(
    shards: int, last: int | None, workers: work.Workers, meter: Meter, spec: str
) -> list[dict[str, Any]]:
    """Packs what is not packed yet; returns what is counted of each shard."""
    parts = []
    with meter.phase(f"packing {spec}", "packed rows") as bar:
        tasks = ((n, shards, last) for n in range(shards))
        for part in workers.map(work.make_shard, tasks):
            parts.append(part)
            bar.add(part["rows"], tokens=part["packed"]["tokens"])
    return parts
