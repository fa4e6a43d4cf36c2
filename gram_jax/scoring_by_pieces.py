"""The scoring job of several processes that each hold the whole model.

Each scores pieces of the input (see ``scoring_pieces``) by itself, with nothing to wait for, and
writes them to OUTPUT.shards (see ``scoring_shards``); process 0 puts them together. A model that is
spread over several processes is the matter of ``scoring_job``, where all compute every batch
together.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import jax
from jax.sharding import Mesh

from gram_jax.config import MeshConfig
from gram_jax.distributed import barrier, is_main, main_first, process_count, process_id
from gram_jax.errors import UserError
from gram_jax.mesh import make_mesh
from gram_jax.reporting import Progress
from gram_jax.scorer import Loaded, Scorer
from gram_jax.scoring_input import Block, add_row, read_blocks
from gram_jax.scoring_job import (
    BLOCK_BATCHES,
    JobResult,
    RunningBlock,
    ScoringJob,
    Summary,
    ahead,
    summarise,
)
from gram_jax.scoring_pieces import (
    BlockFacts,
    Piece,
    block_size,
    check_blocks,
    cut,
    digest_of,
    read_pieces,
)
from gram_jax.scoring_shards import Manifest, Shards
from gram_jax.scoring_state import JobFiles, JobState, changes
from gram_jax.watchdog import watched


def by_pieces(output: str, mesh: MeshConfig) -> bool:
    """Whether the job of ``output`` is done in pieces: it was begun so, or there are several
    processes, each can hold the model, and it was not begun otherwise.

    Raises:
      UserError: it was begun in pieces, and the mesh spreads the model over processes.
    """
    parts, devices = mesh.fsdp * mesh.tensor * mesh.context, jax.local_device_count()
    fits = min(mesh.fsdp, mesh.tensor, mesh.context) > 0 and devices % parts == 0
    shards, files = Shards(output), JobFiles(output)
    if shards.exists():
        if not fits and process_count() > 1:
            raise UserError(
                f"{shards.folder} was begun by processes that each hold the model, and this mesh"
                " spreads it over several; choose fsdp x tensor x context that divides"
                f" {devices}, or delete the folder"
            )
        return True
    begun = main_first(lambda: files.state_path.exists() or files.output.exists())
    return process_count() > 1 and fits and not begun


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


def run_pieces(
    job: ScoringJob,
    load: Callable[[], Loaded],
    *,
    mesh: Mesh | None = None,
    stream: TextIO | None = None,
) -> JobResult:
    """Runs a job, goes on with it, or finds that it is complete.

    Arguments and errors are those of `scoring_job.run_job`; the mesh is of this process's devices.
    """
    if Path(job.input).resolve() == Path(job.output).resolve():
        raise UserError(f"--input and --output are both {job.input}")
    shards = Shards(job.output)
    with JobFiles(job.output) as files:
        if main_first(files.state_path.exists):  # they are being put together, or have been
            state = files.read_state()
            if state is not None and state.summary is not None:
                files.finish()
                if is_main():
                    shards.remove()
                return JobResult(Summary(**state.summary), was_complete=True)
        begun = shards.read()
        size = begun.block_size if begun else block_size(job.input)
        blocks = check_blocks(job.input, job.columns(), job.reward.reading, size)
        scorer = Scorer(load(), job.reward, mesh)
        settings = {**scorer.identity(), "per_token": job.per_token}
        digest, lines = digest_of(blocks), sum(block.lines for block in blocks)
        if begun:
            done = JobState(begun.settings, begun.input, begun.lines)
            if found := changes(done, settings, lines, {lines: digest}):
                raise UserError(
                    f"{shards.folder} was made by another job: {'; '.join(found)}. Delete it and"
                    f" {files.partial.name}, or choose another --output"
                )
            pieces = begun.pieces
        else:
            pieces = cut(blocks, scorer.shapes[-1].places)
        manifest = Manifest(settings, digest, size, pieces)
        files.open(JobState(settings, digest))
        shards.write(manifest)
        with watched(job.stall_seconds, "scoring"):
            _score(job, scorer, shards, manifest, blocks, stream)
        barrier("scored")
        summary = main_first(lambda: dataclasses.asdict(_merge(job, files, shards, manifest)))
        return JobResult(Summary(**summary), was_complete=False)


def _score(
    job: ScoringJob,
    scorer: Scorer,
    shards: Shards,
    manifest: Manifest,
    blocks: list[BlockFacts],
    stream: TextIO | None,
) -> None:
    """Scores this process's share of the pieces that are not done."""
    done = set(shards.done())
    missing = [n for n in range(len(manifest.pieces)) if n not in done]
    mine = missing[process_id() :: process_count()]
    numbers = {piece: n for n, piece in enumerate(manifest.pieces)}
    tokens = BLOCK_BATCHES * scorer.shapes[-1].places
    waiting: collections.deque[_Part] = collections.deque()

    def parts() -> Iterator[_Part]:
        wanted = [manifest.pieces[n] for n in mine]
        for piece, rows in read_pieces(job.input, manifest.block_size, blocks, wanted):
            for block in read_blocks(
                job.input, scorer.encoder, start=0, block_tokens=tokens, rows=rows
            ):
                yield _Part(block, scorer, piece, last=block.end == rows[-1][0])

    def batches() -> Iterator[Any]:
        for part in ahead(parts()):
            waiting.append(part)
            yield from part.batches

    total = len(manifest.pieces)
    progress = Progress(
        total,
        initial=len(done),
        unit="piece",
        log_every=max(total // 20, 1),
        stream=stream,
        enabled=None if is_main() else False,
    )
    clock = _Clock(scorer)
    rows: list[dict[str, Any]] = []
    counts: collections.Counter[str] = collections.Counter()
    with progress:
        for scores in scorer.run(batches(), per_token=job.per_token):
            waiting[0].add(scores)
            if waiting[0].missing:
                continue
            part = waiting.popleft()
            rows += part.rows(job, scorer.settings)
            counts.update(part.counts())
            if not part.last:
                continue
            shards.write_piece(numbers[part.piece], rows, {**counts, **clock.lap()})
            if is_main():
                # What the others have done by now can be seen in the folder.
                rate = counts["tokens"] / clock.last
                progress.update(len(shards.done_now()), {"tokens/s of this process": rate})
            rows, counts = [], collections.Counter()


class _Part(RunningBlock):
    """A block of a piece on its way through the engine."""

    def __init__(self, block: Block, scorer: Scorer, piece: Piece, *, last: bool):
        super().__init__(block, scorer.shapes)
        self.piece, self.last = piece, last

    def counts(self) -> dict[str, int]:
        return {
            "tokens": self.block.sequences.tokens,
            "computed": self.packed.tokens,
            "places": self.places,
        }


class _Clock:
    """Times of pieces, as shares of the job's: its processes work side by side."""

    def __init__(self, scorer: Scorer):
        self._engine, self._compiled, self._now = scorer.engine, 0.0, time.monotonic()
        self.last = 0.0

    def lap(self) -> dict[str, float]:
        """Seconds since the last lap, and how many of them went into compiling."""
        now, compiled = time.monotonic(), self._engine.compile_seconds
        spent, compiling = now - self._now, compiled - self._compiled
        self._now, self._compiled = now, compiled
        self.last = max(spent - compiling, 1e-9)
        return {
            "seconds": self.last / process_count(),
            "compile_seconds": compiling / process_count(),
        }


def _merge(job: ScoringJob, files: JobFiles, shards: Shards, manifest: Manifest) -> Summary:
    """Makes OUTPUT of the pieces. May be repeated after a kill, at any point. For process 0."""
    counts: collections.Counter[str] = collections.Counter()
    digest = hashlib.sha256()
    added, size = job.columns(), 0

    def add(facts: dict[str, Any]) -> None:
        names = ("tokens", "computed", "places", "seconds", "compile_seconds")
        counts.update({name: facts[name] for name in names})

    for rows in shards.merged(manifest, add):
        size += files.append(rows)
        for row in rows:  # what the input's row was: by it the finished job is known again
            add_row(digest, {name: value for name, value in row.items() if name not in added})
    state = JobState(
        manifest.settings, digest.hexdigest(), manifest.lines, size, dict(counts.items())
    )
    files.record(state)
    summary = summarise(state.counts, files.rows())
    files.write_state(dataclasses.replace(state, summary=dataclasses.asdict(summary)))
    files.finish()
    shards.remove()
    return summary
