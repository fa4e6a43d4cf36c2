"""A file to score in pieces, for processes that each do some of them.

A file is cut into blocks of bytes at ends of lines, which costs no parsing and comes out the same
in every process; a piece is some blocks that follow one another. Each process parses, checks and
tokenises only the rows of its own blocks and pieces.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gram_jax.data.formats import jsonl_blocks
from gram_jax.distributed import main_first, process_count, process_id, told_by_all
from gram_jax.errors import DataError, UserError
from gram_jax.scoring_input import check_row
from gram_jax.scoring_state import check_alike

_SMALLEST_BLOCK, _LARGEST_BLOCK = 1 << 10, 1 << 22
_BLOCKS_PER_PROCESS = 32
_PIECES_PER_PROCESS = 4
"""So many at least, if there is a batch for each: processes may differ in speed."""
_PIECE_BATCHES = 64
"""Batches of a piece, at most: what is computed again of each process that was killed."""
_TOKEN_BYTES = 4  # of text, roughly


class BlockFacts(NamedTuple):
    """A block of the file: its lines, bytes, and a digest of these."""

    lines: int
    size: int
    digest: str


class Piece(NamedTuple):
    """Blocks that follow one another: the first, how many, and their lines."""

    first: int
    blocks: int
    lines: int


def block_size(path: str | Path) -> int:
    """Bytes of a block: small enough that every process gets some of them.

    Raises:
      DataError: there is no such file.
    """

    def choose() -> int:
        try:
            size = Path(path).stat().st_size
        except OSError as error:
            raise DataError(error.strerror or str(error), file=path) from None
        size //= _BLOCKS_PER_PROCESS * process_count()
        return min(max(size, _SMALLEST_BLOCK), _LARGEST_BLOCK)

    return main_first(choose)


def check_blocks(
    path: str | Path, reserved: Sequence[str], reading: str, size: int
) -> list[BlockFacts]:
    """Reads a file to its end, each process every so-manyth block, so that a bad row is named
    before any work is done.

    Args:
      path: a JSONL file.
      reserved: names of the columns that will be added, which no row may have.
      reading: what a score is.
      size: of a block.

    Returns:
      All blocks, in every process.

    Raises:
      DataError: names file, line and field of the first bad row, in every process.
      UserError: the file is not the same in all processes.
    """
    mine: list[tuple[int, BlockFacts]] = []
    total, fault = 0, None
    try:
        for number, block in enumerate(jsonl_blocks(path, size)):
            total = number + 1
            if number % process_count() != process_id():
                continue
            lines = 0
            for line, row in block.records():
                if isinstance(row, DataError):
                    raise row
                check_row(row, reserved, reading, file=path, line=line)
                lines += 1
            mine.append((number, BlockFacts(lines, len(block.data), _digest(block.data))))
    except DataError as error:
        fault = [error.line or 0, error.reason, error.field]
    told = [json.loads(text) for text in told_by_all(json.dumps([fault, total, mine]))]
    faults = [one[0] for one in told if one[0] is not None]
    if faults:
        line, reason, field = min(faults, key=lambda one: int(one[0]))
        raise DataError(reason, file=path, line=line or None, field=field)
    check_alike(path, str(total))
    facts = {number: BlockFacts(*values) for _, _, some in told for number, values in some}
    return [facts[number] for number in range(total)]


def digest_of(blocks: Sequence[BlockFacts]) -> str:
    """A digest of the whole file."""
    return _digest("".join(block.digest for block in blocks).encode())


def cut(blocks: Sequence[BlockFacts], batch_tokens: int) -> list[Piece]:
    """The pieces of a file, of at least a batch and of many batches where the file has them."""
    batch = batch_tokens * _TOKEN_BYTES
    share = sum(block.size for block in blocks) // (_PIECES_PER_PROCESS * process_count())
    wanted = min(max(share, batch), _PIECE_BATCHES * batch)
    pieces, first, size = [], 0, 0
    for number, block in enumerate(blocks):
        size += block.size
        if size >= wanted or number + 1 == len(blocks):
            some = blocks[first : number + 1]
            pieces.append(Piece(first, len(some), sum(one.lines for one in some)))
            first, size = number + 1, 0
    return pieces


def read_pieces(
    path: str | Path, size: int, blocks: Sequence[BlockFacts], pieces: Sequence[Piece]
) -> Iterator[tuple[Piece, list[tuple[int, dict[str, Any]]]]]:
    """Some pieces of a file with their rows, which have the numbers of their lines.

    Args:
      path, size, blocks: the file, the size of its blocks, and what they are.
      pieces: in the order of the file.

    Raises:
      UserError: the file is not the one that was checked.
    """
    remaining = iter(pieces)
    piece = next(remaining, None)
    rows: list[tuple[int, dict[str, Any]]] = []
    for number, block in enumerate(jsonl_blocks(path, size)):
        if piece is None:
            return
        if number < piece.first:
            continue
        if number >= len(blocks) or _digest(block.data) != blocks[number].digest:
            raise UserError(
                f"{path}: the file has changed since it was checked, or is another one in process"
                f" {process_id()}; start again"
            )
        # They were parsed once, and found good.
        rows += [(line, row) for line, row in block.records() if isinstance(row, dict)]
        if number + 1 == piece.first + piece.blocks:
            yield piece, rows
            piece, rows = next(remaining, None), []
    if piece is not None:
        raise UserError(f"{path}: the file has become shorter since it was checked; start again")


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]
