"""The preparation of rows as an Apache Beam pipeline, on the runner that the user names.

The steps are those of `gram_jax.data.steps`, as on one machine, and so are the rows, to the byte:
chunks and shards have the same bounds, and a shard takes its records in the order of chunks.

    pieces (files) -> blocks -> records by shard -> shards of rows

Where nearly equal rows are left out, blocks give signatures first; rows meet in the buckets of
their bands, and what repeats an earlier row goes back to the block it came from. Nothing passes
through the process that starts the pipeline but the report: FOLDER/work/report.json, which it
reads at the end. FOLDER/work/job-....pickle is what workers read; so FOLDER must be a place that
all workers reach, a URL if they are other machines.

Bad rows and damaged files are part of the report. Where they are to stop the preparation no shard
is packed, and the first of them is raised.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import itertools
import json
import pickle
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import apache_beam as beam
import numpy as np
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.pvalue import AsList, AsSingleton, TaggedOutput

from gram_jax.data import steps
from gram_jax.data.near_duplicates import Signatures, band_keys, repeated_in
from gram_jax.data.records import Block, Piece, Source, pieces_of
from gram_jax.data.rowset import write_json
from gram_jax.data.token_records import ExampleCounts, TokenRecord
from gram_jax.data.tokenizer import Tokenizer
from gram_jax.data.work import FOLDER, QUARANTINE
from gram_jax.errors import DataError
from gram_jax.storage import Place, digest_of, located, upload

Where: TypeAlias = tuple[int, int]
"""A chunk: number of its piece, number of its block in there. Chunks are in the order of these."""


@dataclasses.dataclass(frozen=True)
class Job:
    """What is made, and where; every worker reads it once."""

    recipe: steps.Recipe
    tokenizer: Tokenizer
    folder: Place
    spec: str
    chunk_bytes: int
    rows_per_shard: int


@dataclasses.dataclass(frozen=True)
class Made:
    """What a pipeline has made.

    Attributes:
      identity: content of each source.
      read: counts over all rows.
      parts: what is counted of each shard, in order.
    """

    identity: list[dict[str, Any]]
    read: ExampleCounts
    parts: list[dict[str, Any]]


class Sizes(NamedTuple):
    """What is known when every block is tokenised; ``last`` as in `steps.write_records`."""

    read: ExampleCounts
    shards: int
    last: int | None


class Fault(NamedTuple):
    """What is wrong with a row or a file, and in which chunk; ``stops``: nothing can be made."""

    where: Where
    error: DataError
    stops: bool


def run(job: Job, sources: Sequence[Source], options: Sequence[str]) -> Made:
    """Makes rows in ``job.folder``, all but the manifest.

    Args:
      options: those of the pipeline, as on a command line; --runner among them.

    Raises:
      DataError: a row or a file cannot be used; the first of them.
    """
    work = job.folder / FOLDER
    if isinstance(job.folder, Path):
        for old in job.folder.glob("rows-*.array_record*"):
            old.unlink()
        shutil.rmtree(job.folder / FOLDER, ignore_errors=True)
    data = pickle.dumps(job)
    # Workers keep what they have read, so another job has another name.
    file = work / f"job-{hashlib.sha256(data).hexdigest()[:16]}.pickle"
    _write(file, data)
    files = [
        (number, place, path)
        for number, source in enumerate(sources)
        for place, path in enumerate(source.files())
    ]
    with beam.Pipeline(options=PipelineOptions(list(options))) as root:
        _build(root, str(file), job, pieces_of(sources), files)
    with (work / "report.json").open("rb") as stream:
        report = json.loads(stream.read())
    for done in (file, work / "report.json"):
        done.unlink()
    faults = [DataError(**{k: fault[k] for k in _FAULT}) for fault in report["faults"]]
    for fault, values in zip(faults, report["faults"], strict=True):
        if values["stops"]:
            raise fault
    if faults:
        lines = "".join(map(steps.quarantined, faults))
        _write(job.folder / QUARANTINE, lines.encode())
    identity = [
        {"sha256": report["digests"].get(str(number), []), "identity": source.identity()}
        for number, source in enumerate(sources)
    ]
    return Made(identity, ExampleCounts(**report["read"]), report["parts"])


_FAULT = ("reason", "file", "line", "field")


def _build(root: Any, file: str, job: Job, pieces: Sequence[Piece], files: Sequence[Any]) -> None:
    """Everything that is done to pieces and files; the report is written last."""
    cut = (
        root
        | "pieces" >> beam.Create(list(enumerate(pieces)))
        | "spread the pieces" >> beam.Reshuffle()
        | "cut" >> beam.ParDo(_Cut(file)).with_outputs("faults", main="blocks")
    )
    blocks = cut.blocks | "spread the blocks" >> beam.Reshuffle()
    if job.recipe.selection.near_duplicates:
        repeated = (
            blocks
            | "sign" >> beam.ParDo(_Sign(file))
            | "meet" >> beam.GroupByKey()
            | "compare" >> beam.ParDo(_Compare(file))
        )
        grouped = {"blocks": blocks, "repeated": repeated} | "join" >> beam.CoGroupByKey()
        tasks = grouped | "leave out" >> beam.Map(_without_repeated)
    else:
        tasks = blocks | "leave out none" >> beam.Map(_all_rows)
    encoded = tasks | "tokenise" >> beam.ParDo(_Encode(file)).with_outputs(
        "counts", "draws", "faults", main="records"
    )
    counts = encoded.counts | "count" >> beam.CombineGlobally(_add_counts)
    sizes = counts | "measure" >> beam.ParDo(_Measure(file), AsList(encoded.draws)).with_outputs(
        "faults", main="sizes"
    )
    faults = (cut.faults, encoded.faults, sizes.faults) | "faults" >> beam.Flatten()
    stopping = (
        faults
        | "those that stop" >> beam.Filter(_stops)
        | "how many" >> beam.combiners.Count.Globally()
    )
    split = encoded.records | "split" >> beam.FlatMap(_by_shard, AsSingleton(sizes.sizes))
    # A shard that no record falls into is a file all the same.
    empty = sizes.sizes | "every shard" >> beam.FlatMap(_every_shard)
    parts = (
        (split, empty)
        | "records" >> beam.Flatten()
        | "by shard" >> beam.GroupByKey()
        | "pack" >> beam.ParDo(_Pack(file), AsSingleton(sizes.sizes), AsSingleton(stopping))
    )
    digests = (
        root
        | "files" >> beam.Create(list(files))
        | "spread the files" >> beam.Reshuffle()
        | "digest" >> beam.Map(_digest)
    )
    _ = (
        root
        | "end" >> beam.Create([str(job.folder / FOLDER)])
        | "report"
        >> beam.Map(
            _report, AsSingleton(sizes.sizes), AsList(parts), AsList(faults), AsList(digests)
        )
    )


class _Step(beam.DoFn):
    """A step that knows the job."""

    def __init__(self, file: str):
        self._file = file

    @property
    def job(self) -> Job:
        return _job(self._file)


@functools.lru_cache(maxsize=1)
def _job(file: str) -> Job:
    with located(file).open("rb") as stream:
        job = pickle.loads(stream.read())
    assert isinstance(job, Job)
    return job


class _Cut(_Step):
    """(number, piece) -> (chunk, (document, block))"""

    def process(self, element: tuple[int, Piece]) -> Iterator[Any]:
        number, piece = element
        count = 0
        try:
            for count, block in enumerate(piece.blocks(self.job.chunk_bytes), start=1):
                yield (number, count - 1), (str(piece.document), block)
        except DataError as error:
            yield TaggedOutput("faults", Fault((number, count), error, True))


class _Sign(_Step):
    """(chunk, (document, block)) -> (bucket, (chunk, line, signature)) for each row and band"""

    def process(self, element: tuple[Where, tuple[str, Block]]) -> Iterator[Any]:
        where, (_, block) = element
        recipe = self.job.recipe
        lines, signatures = steps.sign_block(recipe, block)
        for band, keys in enumerate(band_keys(signatures, recipe.selection.near_duplicates)):
            for line, key, own in zip(lines, keys, signatures, strict=True):
                yield (band, key.tobytes()), (where, int(line), own.tobytes())


class _Compare(_Step):
    """A bucket -> (chunk, line) of each row that is nearly the same as an earlier one"""

    def process(self, element: tuple[Any, Iterable[tuple[Where, int, bytes]]]) -> Iterator[Any]:
        members = sorted(element[1])
        if len(members) == 1:
            return
        bucket: Signatures = np.stack([np.frombuffer(own, np.uint32) for _, _, own in members])
        threshold = self.job.recipe.selection.near_duplicates
        for (where, line, _), out in zip(members, repeated_in(bucket, threshold), strict=True):
            if out:
                yield where, line


def _without_repeated(element: tuple[Where, dict[str, Any]]) -> tuple[Any, ...]:
    where, found = element
    ((document, block),) = found["blocks"]
    return where, document, block, frozenset(found["repeated"])


def _all_rows(element: tuple[Where, tuple[str, Block]]) -> tuple[Any, ...]:
    where, (document, block) = element
    return where, document, block, frozenset()


class _Encode(_Step):
    """(chunk, document, block, repeated lines) -> (chunk, its records)"""

    def process(self, element: tuple[Where, str, Block, frozenset[int]]) -> Iterator[Any]:
        where, document, block, repeated = element
        recipe = self.job.recipe
        found = steps.encode_block(recipe, self.job.tokenizer, block, document, repeated)
        yield where, found.records
        yield TaggedOutput("counts", (found.read, found.tokens))
        if recipe.selection.max_pairs:
            draws = [draw for record in found.records for draw in record.draws]
            yield TaggedOutput("draws", np.array(draws, np.uint64))
        stops = recipe.config.on_bad_row == "stop"
        for error in found.bad:
            yield TaggedOutput("faults", Fault(where, error, stops))


def _add_counts(values: Iterable[tuple[ExampleCounts, int]]) -> tuple[ExampleCounts, int]:
    read, tokens = ExampleCounts(), 0
    for part, number in values:
        read.add(part)
        tokens += number
    return read, tokens


class _Measure(_Step):
    """(counts, tokens) -> Sizes"""

    def process(self, element: tuple[ExampleCounts, int], draws: list[Any]) -> Iterator[Any]:
        read, tokens = element
        selection, last = self.job.recipe.selection, None
        if selection.max_pairs:
            numbers = np.concatenate([np.zeros(0, np.uint64), *draws])
            try:
                last = selection.last_drawn(numbers, self.job.spec)
                tokens = selection.drawn_tokens(tokens, numbers, last)
            except DataError as error:
                # After all others: rows that cannot be used may be why there are too few.
                yield TaggedOutput("faults", Fault((2**31, 0), error, True))
        shards = steps.num_shards(tokens, self.job.recipe, self.job.rows_per_shard)
        yield Sizes(read, shards, last)


def _stops(fault: Fault) -> bool:
    return fault.stops


def _by_shard(element: tuple[Where, list[TokenRecord]], sizes: Sizes) -> Iterator[Any]:
    """(shard, (chunk, the chunk's records of that shard)); records are sorted by key."""
    where, records = element
    for shard, part in itertools.groupby(records, lambda r: steps.shard_of(r.key, sizes.shards)):
        yield shard, (where, list(part))


def _every_shard(sizes: Sizes) -> Iterator[Any]:
    for shard in range(sizes.shards):
        yield shard, ((-1, -1), [])


class _Pack(_Step):
    """(shard, its records by chunk) -> what is counted of its rows, which are written"""

    def process(
        self,
        element: tuple[int, Iterable[tuple[Where, list[TokenRecord]]]],
        sizes: Sizes,
        stopping: int,
    ) -> Iterator[dict[str, Any]]:
        if stopping:
            return
        number, by_chunk = element
        parts = sorted(by_chunk, key=lambda part: part[0])
        records = (record for _, part in parts for record in part)
        name = steps.shard_name(number, sizes.shards)
        with tempfile.TemporaryDirectory(prefix="gram_jax-") as folder:
            local = Path(folder) / name
            counts = steps.write_records(self.job.recipe, records, sizes.last, local)
            upload(local, self.job.folder / name)
        yield counts


def _digest(element: tuple[int, int, Place]) -> tuple[int, int, str]:
    source, place, path = element
    try:
        return source, place, digest_of(path)
    except (DataError, OSError):
        return source, place, ""  # what is wrong with the file is said where it is cut


def _report(
    work: str,
    sizes: Sizes,
    parts: list[dict[str, Any]],
    faults: list[Fault],
    digests: list[tuple[int, int, str]],
) -> None:
    """Writes what the process that started the pipeline is to know, in order."""
    by_source: dict[int, list[str]] = {}
    for source, _, digest in sorted(digests):
        by_source.setdefault(source, []).append(digest)
    faults = sorted(faults, key=lambda fault: (fault.where, fault.error.line or 0))
    report = {
        "read": dataclasses.asdict(sizes.read),
        "parts": sorted(parts, key=lambda part: part["file"]),
        "faults": [
            {**{k: getattr(fault.error, k) for k in _FAULT}, "stops": fault.stops}
            for fault in faults
        ],
        "digests": by_source,
    }
    write_json(located(work) / "report.json", report)


def _write(place: Place, data: bytes) -> None:
    if isinstance(place, Path):
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(data)
    else:
        place.write(io.BytesIO(data))
