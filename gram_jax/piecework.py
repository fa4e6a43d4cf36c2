"""Jobs in pieces: what the jobs of several processes share, whatever they do with a row.

Each process that holds the whole model does pieces of the input (see ``pieces``) by itself, with
nothing to wait for, and writes them to OUTPUT.shards (see ``shards``); process 0 puts them
together. Where a model is spread over several processes, all do every piece together, and process 0
writes it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TextIO

import jax
from jax.sharding import Mesh

from gram_jax.config import MeshConfig
from gram_jax.data.records import Source
from gram_jax.distributed import barrier, is_main, main_first, process_count, process_id
from gram_jax.errors import UserError
from gram_jax.mesh import make_mesh
from gram_jax.pieces import (
    BlockFacts,
    Piece,
    SourceRow,
    block_size,
    blocks_of,
    check_blocks,
    count_of,
    cut,
    digest_of,
    read_pieces,
)
from gram_jax.reporting import Progress
from gram_jax.scoring import EngineCounts
from gram_jax.scoring_input import add_row
from gram_jax.scoring_state import JobFiles, JobState, changes
from gram_jax.shards import Manifest, Shards
from gram_jax.watchdog import watched

_SECONDS_BETWEEN_UPDATES = 0.2


class Made(NamedTuple):
    """A piece, the rows made of it, and sums over them."""

    piece: Piece
    rows: list[dict[str, Any]]
    counts: Mapping[str, float]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What is done with pieces, once the model is there.

    Attributes:
      settings: all that decides what is written.
      batch_tokens: token places of a batch.
      engine: where it counts what it computes.
      unit, counted: what progress shows, and the name it has among the counts of blocks.
      run: makes pieces, in order. It says as it goes how much of the unit it has done.
    """

    settings: dict[str, Any]
    batch_tokens: int
    engine: EngineCounts
    unit: str
    counted: str
    run: Callable[[Iterator[tuple[Piece, list[SourceRow]]], Callable[[int], None]], Iterator[Made]]


def fits(mesh: MeshConfig) -> bool:
    """Whether the devices of one process can hold the model, as this mesh splits it."""
    parts = mesh.fsdp * mesh.tensor * mesh.context
    one_is_open = min(mesh.fsdp, mesh.tensor, mesh.context) < 1
    return not one_is_open and jax.local_device_count() % parts == 0


def by_pieces(output: str, mesh: MeshConfig) -> bool:
    """Whether the job of ``output``, a file, is done in pieces: it was begun so, or there are
    several processes, each can hold the model, and it was not begun otherwise.

    Raises:
      UserError: it was begun in pieces, and the mesh spreads the model over processes.
    """
    shards, files = Shards(output), JobFiles(output)
    if shards.exists() and not main_first(lambda: _put_away(files, shards)):
        if not fits(mesh) and process_count() > 1:
            raise UserError(
                f"{shards.folder} was begun by processes that each hold the model, and this mesh"
                " spreads it over several; choose fsdp x tensor x context that divides"
                f" {jax.local_device_count()}, or delete the folder"
            )
        return True
    begun = main_first(lambda: files.state_path.exists() or files.output.exists())
    return process_count() > 1 and fits(mesh) and not begun


def _put_away(files: JobFiles, shards: Shards) -> bool:
    """Whether the job is complete; its pieces, which it was killed at deleting, are deleted then.
    For process 0."""
    state = files.stored_state() if files.state_path.exists() else None
    if state is None or state.summary is None:
        return False
    files.finish()
    shards.remove()
    return True


def own_mesh(config: MeshConfig) -> Mesh | None:
    """The part of the mesh that is this process's; one device needs none.

    Raises:
      UserError: the sizes are not those of the devices there are.
    """
    make_mesh(config, jax.devices())
    own = jax.local_devices()
    if len(own) == process_count() == 1:
        return None
    return make_mesh(dataclasses.replace(config, data=-1), own)


def do_pieces(
    sources: Sequence[Source],
    shards: Shards,
    check: Callable[[SourceRow], Mapping[str, int]],
    load: Callable[[], Work],
    *,
    doing: str,
    stall_seconds: float,
    together: bool = False,
    stream: TextIO | None = None,
) -> tuple[Manifest, list[BlockFacts]]:
    """Does all pieces that are not done, and returns when every process has; they are in
    ``shards`` then.

    Args:
      sources: the input.
      shards: where pieces are written.
      check: see `check_blocks`.
      load: gives the model; called after the whole input has been checked.
      doing: a word for the watchdog.
      stall_seconds: see `watchdog.watched`.
      together: the model is spread over the processes.
      stream: where progress goes; standard error by default.

    Raises:
      UserError: bad input (with file and line), bad settings, or pieces of another job.
    """
    begun, done = shards.read(), shards.done()
    size = begun.block_size if begun else block_size(sources)
    blocks = check_blocks(sources, check, size)
    work = load()
    digest = digest_of(blocks)
    if begun and (found := _changes(begun, work.settings, digest)):
        if done:
            raise UserError(
                f"{shards.folder} was made by another job: {'; '.join(found)}. Delete it, or choose"
                " another --output"
            )
        begun = None  # it ended before there was anything to keep
    pieces = begun.pieces if begun else cut(blocks, work.batch_tokens)
    manifest = Manifest(work.settings, digest, size, pieces)
    shards.write(manifest, shared=not together)
    with watched(stall_seconds, doing):
        _do(sources, shards, manifest, blocks, work, together, stream)
    barrier("pieces")
    return manifest, blocks


def _changes(begun: Manifest, settings: dict[str, Any], digest: str) -> list[str]:
    """How the job that was begun differs from this one, in words."""
    state = JobState(begun.settings, begun.input, begun.rows)
    return changes(state, settings, begun.rows, {begun.rows: digest})


def _do(
    sources: Sequence[Source],
    shards: Shards,
    manifest: Manifest,
    blocks: Sequence[BlockFacts],
    work: Work,
    together: bool,
    stream: TextIO | None,
) -> None:
    """Does this process's share of the pieces that are not done."""
    pieces = manifest.pieces
    done = shards.done()
    missing = [n for n in range(len(pieces)) if n not in set(done)]
    mine = missing if together else missing[process_id() :: process_count()]
    numbers = {piece: n for n, piece in enumerate(pieces)}
    amounts = [count_of(blocks_of(piece, blocks), work.counted) for piece in pieces]
    rows = read_pieces(sources, manifest.block_size, blocks, [pieces[n] for n in mine])
    clock = _Clock(work.engine, 1 if together else process_count())
    with _Shown(work, amounts, done, stream) as shown:
        for made in work.run(rows, shown.advance):
            counts = {**made.counts, **clock.lap()}
            if is_main() or not together:
                shards.write_piece(numbers[made.piece], made.rows, counts)
            if is_main():
                # What the others have done by now can be seen in the folder.
                shown.there(shards.done_now())


class _Shown:
    """Progress: what lies in the folder, and what this process has done since it last looked."""

    def __init__(
        self, work: Work, amounts: Sequence[int], done: Sequence[int], stream: TextIO | None
    ) -> None:
        self._work, self._amounts = work, amounts
        self._there, self._here = self._amount(done), 0
        self._initial, self._total = self._there, sum(amounts)
        self._began = self._last = time.monotonic()
        self._progress = Progress(
            self._total,
            initial=self._initial,
            unit=work.unit,
            log_every=max(self._total // 20, 1),
            stream=stream,
            enabled=None if is_main() else False,
        )

    def __enter__(self) -> _Shown:
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.close()

    def there(self, done: Sequence[int]) -> None:
        """These pieces are done."""
        self._there, self._here = self._amount(done), 0
        self._update()

    def advance(self, amount: int) -> None:
        """This process has done some of a piece."""
        self._here += amount
        # Results come in batches: one line for all that came at once.
        if time.monotonic() - self._last > _SECONDS_BETWEEN_UPDATES:
            self._update()

    def _amount(self, done: Sequence[int]) -> int:
        return sum(self._amounts[n] for n in done)

    def _update(self) -> None:
        self._last = time.monotonic()
        seconds = self._last - self._began - self._work.engine.compile_seconds
        position = min(self._there + self._here, self._total)
        rate = (position - self._initial) / max(seconds, 1e-9)
        self._progress.update(position, {f"{self._work.unit}s/s": rate})


class _Clock:
    """Times of pieces, as shares of the job's where so many processes work side by side."""

    def __init__(self, engine: EngineCounts, side_by_side: int) -> None:
        self._engine, self._side_by_side = engine, side_by_side
        self._compiled, self._now = engine.compile_seconds, time.monotonic()

    def lap(self) -> dict[str, float]:
        """Seconds since the last lap, and how many of them went into compiling."""
        now, compiled = time.monotonic(), self._engine.compile_seconds
        spent, compiling = now - self._now, compiled - self._compiled
        self._now, self._compiled = now, compiled
        return {
            "seconds": max(spent - compiling, 1e-9) / self._side_by_side,
            "compile_seconds": compiling / self._side_by_side,
        }


def add(counts: dict[str, float], more: Mapping[str, float]) -> None:
    """Adds counts to counts."""
    for name, value in more.items():
        counts[name] = counts.get(name, 0) + value


def merge_rows(
    output: str,
    shards: Shards,
    manifest: Manifest,
    added: Sequence[str],
    summarise: Callable[[JobState, Iterator[dict[str, Any]]], dict[str, Any]],
) -> dict[str, Any]:
    """Makes OUTPUT, a JSONL file, of the pieces, and deletes them. Every process calls it; it may
    be repeated after a kill, at any point.

    Args:
      output: the file.
      shards, manifest: its pieces.
      added: columns that the input's rows have not.
      summarise: makes the summary of the state and the rows.

    Returns:
      The summary.

    Raises:
      UserError: a piece is damaged.
    """
    with JobFiles(output) as files:
        files.open(JobState(manifest.settings, manifest.input))

        def merge() -> dict[str, Any]:
            counts: dict[str, float] = {}
            digest, size = hashlib.sha256(), 0
            for rows in shards.merged(manifest, lambda more: add(counts, more)):
                size += files.append(rows)
                for row in rows:  # what the input's row was: by it the finished job is known again
                    add_row(digest, {k: v for k, v in row.items() if k not in added})
            state = JobState(manifest.settings, digest.hexdigest(), manifest.rows, size, counts)
            files.record(state)
            summary = summarise(state, files.rows())
            files.write_state(dataclasses.replace(state, summary=summary))
            files.finish()
            shards.remove()
            return summary

        return main_first(merge)
