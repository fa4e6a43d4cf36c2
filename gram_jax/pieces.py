"""The input of a job in pieces, for processes that each do some of them.

Files are cut into blocks, of JSON Lines at ends of lines, which costs no parsing and comes out the
same in every process; a piece is some blocks that follow one another. Each process parses, checks
and tokenises only the rows of its own blocks and pieces.
"""

from __future__ import annotations

import collections
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from gram_jax.data.formats import Block, Record, jsonl_blocks
from gram_jax.data.records import Source
from gram_jax.distributed import main_first, process_count, process_id, told_by_all
from gram_jax.errors import DataError, UserError
from gram_jax.scoring_state import check_alike
from gram_jax.storage import located

_SMALLEST_BLOCK, _LARGEST_BLOCK = 1 << 10, 1 << 22
_BLOCKS_PER_PROCESS = 32
_PIECES_PER_PROCESS = 4
"""So many at least, if there is a batch for each: processes may differ in speed."""
_PIECE_BATCHES = 64
"""Batches of a piece, at most: what is computed again of each process that was killed."""
_TOKEN_BYTES = 4  # of text, roughly


class SourceRow(NamedTuple):
    """A record, and where it stands.

    Attributes:
      source: which of the sources.
      file, line: as messages name them.
    """

    source: int
    file: str
    line: int
    record: Record


class BlockFacts(NamedTuple):
    """A block of a source: its rows, bytes, a digest of these, and what was counted in its rows."""

    source: int
    rows: int
    size: int
    digest: str
    counts: Mapping[str, int]


class Piece(NamedTuple):
    """Blocks that follow one another: the first, how many, and their rows."""

    first: int
    blocks: int
    rows: int


def jsonl_source(path: str) -> Source:
    """A JSONL file, whatever its name ends in."""
    return Source(path, ((located(path), jsonl_blocks),))


def block_size(sources: Sequence[Source]) -> int:
    """Bytes of a block: small enough that every process gets some of them.

    Raises:
      DataError: a file is not there.
    """

    def choose() -> int:
        size = 0
        for path in (path for source in sources for path in source.files()):
            try:
                size += path.stat().st_size
            except OSError as error:
                raise DataError(error.strerror or str(error), file=path) from None
        size //= _BLOCKS_PER_PROCESS * process_count()
        return min(max(size, _SMALLEST_BLOCK), _LARGEST_BLOCK)

    return main_first(choose)


def check_blocks(
    sources: Sequence[Source], check: Callable[[SourceRow], Mapping[str, int]], size: int
) -> list[BlockFacts]:
    """Reads sources to their ends, each process every so-manyth block, so that a bad row is named
    before any work is done.

    Args:
      sources: what is read.
      check: raises a `DataError` for a row that cannot be used; returns what is counted in others.
      size: of a block.

    Returns:
      All blocks, in every process.

    Raises:
      DataError: names file, line and field of the first bad row, in every process.
      UserError: the sources are not the same in all processes.
    """
    mine: list[tuple[int, BlockFacts]] = []
    total, fault = 0, None
    try:
        for number, (source, block) in enumerate(_blocks(sources, size)):
            total = number + 1
            if number % process_count() != process_id():
                continue
            rows, counts = 0, collections.Counter[str]()
            for row in _rows(source, block):
                counts.update(check(row))
                rows += 1
            data = block.content()
            facts = BlockFacts(source, rows, sum(map(len, data)), _digest(data), counts)
            mine.append((number, facts))
    except DataError as error:
        fault = [total, error.line or 0, error.reason, error.file, error.field]
    told = [json.loads(text) for text in told_by_all(json.dumps([fault, total, mine]))]
    if faults := [one[0] for one in told if one[0] is not None]:
        _, line, reason, file, field = min(faults, key=lambda one: (one[0], one[1]))
        raise DataError(reason, file=file, line=line or None, field=field)
    check_alike(", ".join(source.spec for source in sources), str(total))
    facts_of = {number: BlockFacts(*values) for _, _, some in told for number, values in some}
    blocks = [facts_of[number] for number in range(total)]
    for number, source_ in enumerate(sources):
        if not any(block.source == number and block.rows for block in blocks):
            raise DataError("holds no rows", file=source_.spec)
    return blocks


def digest_of(blocks: Sequence[BlockFacts]) -> str:
    """A digest of all sources."""
    return _digest([block.digest.encode() for block in blocks])


def count_of(blocks: Sequence[BlockFacts], name: str) -> int:
    """What was counted in some blocks."""
    return sum(block.counts.get(name, 0) for block in blocks)


def cut(blocks: Sequence[BlockFacts], batch_tokens: int) -> list[Piece]:
    """The pieces of an input, of at least a batch and of many batches where there are so many."""
    batch = batch_tokens * _TOKEN_BYTES
    share = sum(block.size for block in blocks) // (_PIECES_PER_PROCESS * process_count())
    wanted = min(max(share, batch), _PIECE_BATCHES * batch)
    pieces, first, size = [], 0, 0
    for number, block in enumerate(blocks):
        size += block.size
        if size >= wanted or number + 1 == len(blocks):
            some = blocks[first : number + 1]
            pieces.append(Piece(first, len(some), sum(one.rows for one in some)))
            first, size = number + 1, 0
    return pieces


def blocks_of(piece: Piece, blocks: Sequence[BlockFacts]) -> Sequence[BlockFacts]:
    """The blocks of a piece."""
    return blocks[piece.first : piece.first + piece.blocks]


def read_pieces(
    sources: Sequence[Source], size: int, blocks: Sequence[BlockFacts], pieces: Sequence[Piece]
) -> Iterator[tuple[Piece, list[SourceRow]]]:
    """Some pieces of an input with their rows.

    Args:
      sources, size, blocks: what is read, the size of its blocks, and what they are.
      pieces: in order.

    Raises:
      UserError: the sources are not those that were checked.
    """
    remaining = iter(pieces)
    piece = next(remaining, None)
    rows: list[SourceRow] = []
    for number, (source, block) in enumerate(_blocks(sources, size)):
        if piece is None:
            return
        if number < piece.first:
            continue
        if number >= len(blocks) or _digest(block.content()) != blocks[number].digest:
            raise UserError(
                f"{block.file}: the file has changed since it was checked, or is another one in"
                f" process {process_id()}; start again"
            )
        rows += _rows(source, block)
        if number + 1 == piece.first + piece.blocks:
            yield piece, rows
            piece, rows = next(remaining, None), []
    if piece is not None:
        name = sources[blocks[piece.first].source].spec
        raise UserError(f"{name}: has become shorter since it was checked; start again")


def _blocks(sources: Sequence[Source], size: int) -> Iterator[tuple[int, Block]]:
    for number, source in enumerate(sources):
        for block in source.blocks(size):
            yield number, block


def _rows(source: int, block: Block) -> Iterator[SourceRow]:
    for line, record in block.records():
        if isinstance(record, DataError):
            raise record
        yield SourceRow(source, block.file, line, record)


def _digest(data: Sequence[bytes]) -> str:
    """Of pieces of bytes and of where one ends; both are the same in every process."""
    digest = hashlib.sha256()
    for part in data:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()[:32]
