"""The work of a preparation: what is done to one chunk and to one shard, in which process.

FOLDER/work holds what is half done (see gram_jax.data.prepare): plan.json, the tokenizer, a folder
for each chunk, and what was counted of each shard. Everything is written beside its place and then
moved there, so what is in place is whole.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import json
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

import numpy as np
import numpy.typing as npt

from gram_jax.data.near_duplicates import repeated_among
from gram_jax.data.records import Block
from gram_jax.data.rowset import write_json
from gram_jax.data.steps import (
    Recipe,
    encode_block,
    quarantined,
    shard_name,
    sign_block,
    write_records,
)
from gram_jax.data.token_records import TokenRecord
from gram_jax.data.tokenizer import Tokenizer
from gram_jax.errors import UserError
from gram_jax.pair import Pair

QUARANTINE = "quarantine.jsonl"
FOLDER = "work"


@dataclasses.dataclass(frozen=True)
class Plan(Recipe):
    """What is to be made, and where the work lies; sent to the workers.

    Attributes:
      folder: FOLDER/work.
    """

    folder: Path

    def chunk(self, number: int) -> Path:
        return self.folder / f"chunk-{number:06}"


@contextlib.contextmanager
def locked(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """One process at a time works in a folder; another waits. The lock dies with its process."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:  # no such locks on Windows
        yield
        return
    with (folder / ".lock").open("w") as stream:
        try:
            fcntl.flock(stream.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"{folder}: another process prepares these rows; waiting for it")
            fcntl.flock(stream.fileno(), fcntl.LOCK_EX)
        except OSError as error:  # some network file systems have no locks
            say(f"{folder}: cannot be locked ({error}); start no second preparation here")
        yield


def begin(plan: Plan, key: dict[str, Any], tokenizer: Tokenizer) -> None:
    """Keeps the work of an earlier try at the same rows; removes any other."""
    path = plan.folder / "plan.json"
    key = json.loads(json.dumps(key))
    try:
        if json.loads(path.read_text(encoding="utf-8")) == key:
            return
    except (OSError, ValueError):
        pass  # there is no plan, or half of one: nothing to go on with
    shutil.rmtree(plan.folder, ignore_errors=True)
    for old in plan.folder.parent.glob("rows-*.array_record*"):
        old.unlink()
    plan.folder.mkdir(parents=True)
    tokenizer.save(plan.folder / "tokenizer")
    write_json(path, key)


def sign_chunk(plan: Plan, _: Tokenizer, number: int, block: Block) -> int:
    """Keeps the signatures of a chunk's rows, unless they are there; returns how many rows."""
    path = plan.folder / f"signatures-{number:06}.npz"
    if not path.is_file():
        lines, signatures = sign_block(plan, block)
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp.npz")
        np.savez(temporary, lines=lines, signatures=signatures)
        temporary.replace(path)
        return len(lines)
    with np.load(path) as kept:
        return len(kept["lines"])


def repeated_rows(plan: Plan) -> dict[int, frozenset[int]]:
    """By chunk, the lines of the rows that are left out as nearly the same as an earlier one."""
    paths = sorted(plan.folder.glob("signatures-??????.npz"))
    kept = [np.load(path) for path in paths]
    if not kept:
        return {}
    lines = np.concatenate([found["lines"] for found in kept])
    chunks = np.repeat(np.arange(len(kept)), [len(found["lines"]) for found in kept])
    signatures = np.concatenate([found["signatures"] for found in kept])
    places = np.flatnonzero(repeated_among(signatures, plan.selection.near_duplicates))
    by_chunk: dict[int, list[int]] = {}
    for chunk, line in zip(chunks[places].tolist(), lines[places].tolist(), strict=True):
        by_chunk.setdefault(chunk, []).append(line)
    return {chunk: frozenset(found) for chunk, found in by_chunk.items()}


def make_chunk(
    plan: Plan,
    tokenizer: Tokenizer,
    number: int,
    block: Block,
    document: str,
    repeated: Collection[int],
) -> dict[str, Any]:
    """Tokenises a block into a chunk, unless that is there; returns what it counts.

    Raises:
      DataError: a row cannot be used, and ``on_bad_row`` is "stop".
    """
    folder = plan.chunk(number)
    if folder.is_dir():
        return cast(dict[str, Any], json.loads((folder / "counts.json").read_text("utf-8")))
    found = encode_block(plan, tokenizer, block, document, repeated)
    if found.bad and plan.config.on_bad_row == "stop":
        raise found.bad[0]
    counts = {"read": dataclasses.asdict(found.read), "tokens": found.tokens}
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    _save_records(temporary, found.records)
    (temporary / QUARANTINE).write_text("".join(map(quarantined, found.bad)), encoding="utf-8")
    write_json(temporary / "counts.json", counts)
    temporary.replace(folder)
    return counts


def _save_records(folder: Path, records: Sequence[TokenRecord]) -> None:
    """Records as flat arrays, which a shard reads a part of."""
    sequences = [(record.prompt, *record.responses) for record in records]
    sizes = [len(ids) for group in sequences for ids in group]
    ids = [ids for group in sequences for ids in group]
    references = [r for record in records for r in _references(record)]
    pairs = [
        (p.a, -1 if p.b is None else p.b, p.target, p.weight, p.margin)
        for record in records
        for p in record.pairs
    ]
    arrays = {
        "keys": np.array([record.key for record in records], np.uint64),
        "first_sequence": np.cumsum([0, *map(len, sequences)], dtype=np.int64),
        "first_id": np.cumsum([0, *sizes], dtype=np.int64),
        "first_pair": np.cumsum([0, *(len(r.pairs) for r in records)], dtype=np.int64),
        "ids": np.concatenate(ids) if ids else np.zeros(0, np.int32),
        "references": np.array(references, np.float64),
        "pairs": np.array(pairs, np.float64).reshape(-1, 5),
        "draws": np.array([draw for record in records for draw in record.draws], np.uint64),
    }
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)


def _references(record: TokenRecord) -> Sequence[float]:
    """One number per response; NaN where there is no reference model."""
    return record.reference or (np.nan,) * len(record.responses)


def _load_records(folder: Path, low: int, high: int) -> Iterator[TokenRecord]:
    """The records of a chunk with low <= key < high, in the order of their keys."""
    keys = np.load(folder / "keys.npy")
    begin = int(np.searchsorted(keys, np.uint64(low)))
    end = len(keys) if high >= 2**64 else int(np.searchsorted(keys, np.uint64(high)))
    names = ("first_sequence", "first_id", "first_pair", "ids", "references", "pairs", "draws")
    first_sequence, first_id, first_pair, ids, references, pairs, draws = (
        np.load(folder / f"{name}.npy", mmap_mode="r") for name in names
    )
    for i in range(begin, end):
        bounds = first_id[first_sequence[i] : first_sequence[i + 1] + 1]
        # Copies: a view would keep the file open.
        parts = [np.array(ids[a:b]) for a, b in itertools.pairwise(bounds)]
        # Each record before this one has one sequence, its prompt, that is no response.
        start = int(first_sequence[i]) - i
        reference = tuple(map(float, references[start : start + len(parts) - 1]))
        yield TokenRecord(
            int(keys[i]),
            parts[0],
            tuple(parts[1:]),
            tuple(
                Pair(int(a), None if b < 0 else int(b), float(target), float(weight), float(margin))
                for a, b, target, weight, margin in pairs[first_pair[i] : first_pair[i + 1]]
            ),
            None if np.isnan(reference).any() else reference,
            tuple(map(int, draws[first_pair[i] : first_pair[i + 1]])),  # none, or one of each pair
        )


def all_draws(plan: Plan) -> npt.NDArray[np.uint64]:
    """The numbers in the draw of all pairs of all chunks."""
    return np.concatenate(
        [np.load(chunk / "draws.npy") for chunk in sorted(plan.folder.glob("chunk-??????"))]
    )


def make_shard(
    plan: Plan, _: Tokenizer, number: int, shards: int, last: int | None
) -> dict[str, Any]:
    """Packs the records of one part of the keys, unless that is done; returns what it counts.

    ``last`` is the highest number in the draw of pairs that is drawn; None if all pairs are used.
    """
    name = shard_name(number, shards)
    described = plan.folder / f"{name}.json"
    if described.is_file():
        return cast(dict[str, Any], json.loads(described.read_text("utf-8")))
    low, high = (-(-n * 2**64 // shards) for n in (number, number + 1))
    records = (
        record
        for chunk in sorted(plan.folder.glob("chunk-??????"))
        for record in _load_records(chunk, low, high)
    )
    found = write_records(plan, records, last, plan.folder.parent / name)
    write_json(described, found)
    return found


def gather_quarantine(plan: Plan, folder: Path) -> Path:
    """Joins the bad rows of all chunks, in order, in one file."""
    path = folder / QUARANTINE
    with path.open("wb") as output:
        for chunk in sorted(plan.folder.glob("chunk-??????")):
            output.write((chunk / QUARANTINE).read_bytes())
    return path


class Workers:
    """Calls functions of this module in other processes, or here where there is little to do.

    Processes are spawned: JAX, which may run in this one, cannot be forked.
    """

    def __init__(self, wanted: int, useful: int, plan: Plan):
        """At most ``useful`` processes, and ``wanted`` of them if that is not 0."""
        self._plan = plan
        self._tokenizer = Tokenizer.load(plan.folder / "tokenizer")
        number = min(wanted or os.cpu_count() or 1, max(useful, 1))
        self._number = number
        self._pool: ProcessPoolExecutor | None = None
        if number > 1:
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(number, context, _start_worker, (plan,))

    def map(self, function: Callable[..., Any], tasks: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
        """``function(plan, tokenizer, *task)`` for each task, in order."""
        if self._pool is None:
            for task in tasks:
                yield function(self._plan, self._tokenizer, *task)
            return
        running: collections.deque[Future[Any]] = collections.deque()
        try:
            for task in tasks:
                running.append(self._pool.submit(_call, function, task))
                if len(running) > 2 * self._number:  # the content of few blocks is in memory
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        except BrokenProcessPool:
            raise UserError(
                "a process that prepares rows was killed, maybe for want of memory; the same"
                " command goes on from there, with --config.data.workers=1 in less memory"
            ) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=error is None, cancel_futures=True)


_context: tuple[Plan, Tokenizer] | None = None


def _start_worker(plan: Plan) -> None:
    """Runs first in a worker."""
    global _context
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process per core is enough
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process to deal with
    threading.Thread(target=_die_with_parent, daemon=True).start()
    _context = plan, Tokenizer.load(plan.folder / "tokenizer")


def _die_with_parent() -> None:
    """A worker whose parent was killed would wait for tasks for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def _call(function: Callable[..., Any], task: tuple[Any, ...]) -> Any:
    assert _context is not None
    return function(*_context, *task)
