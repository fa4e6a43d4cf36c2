"""The steps of a preparation, as functions of their arguments: blocks of rows in, packed rows out.

`gram_jax.data.work` calls them in processes of one machine and keeps what they give on disk;
`gram_jax.data.pipeline` calls the same ones wherever an Apache Beam runner works.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gram_jax.config import DataConfig
from gram_jax.data.examples import Layout, encode_rows, group_records
from gram_jax.data.near_duplicates import PERMUTATIONS, Signatures, signature
from gram_jax.data.records import Block
from gram_jax.data.rowset import write_shard
from gram_jax.data.selection import Selection, drawn
from gram_jax.data.shapes import parse_row
from gram_jax.data.sources import Row
from gram_jax.data.token_records import ExampleCounts, TokenRecord
from gram_jax.data.tokenizer import Tokenizer
from gram_jax.errors import DataError
from gram_jax.packing import PackCounts, pack
from gram_jax.rows import RowShape
from gram_jax.text_packing import pack_texts

_MOST_SHARDS = 1024
_ROWS_AT_ONCE = 256  # tokenised in one call


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What decides the rows, the sources and the tokenizer left aside."""

    config: DataConfig
    layout: Layout
    format: str
    shape: RowShape
    selection: Selection


@dataclasses.dataclass(frozen=True, slots=True)
class Encoded:
    """What became of a block.

    Attributes:
      records: sorted by key; those of one key keep their order.
      read: what is counted of the rows.
      bad: what is wrong with each row that cannot be used.
    """

    records: list[TokenRecord]
    read: ExampleCounts
    bad: list[DataError]

    @property
    def tokens(self) -> int:
        return sum(len(r.prompt) + sum(map(len, r.responses)) for r in self.records)


def encode_block(
    recipe: Recipe, tokenizer: Tokenizer, block: Block, document: str, repeated: Collection[int]
) -> Encoded:
    """Checks and tokenises the rows of a block; a function of its arguments alone.

    Args:
      document: names the block's file among all files.
      repeated: lines of rows that are left out, as nearly the same as an earlier one.
    """
    read, bad = ExampleCounts(), list[DataError]()
    records: list[TokenRecord] = []
    for found in _encoded(recipe, tokenizer, block, document, repeated, read):
        if isinstance(found, DataError):
            bad.append(found)
        else:
            records += found
    read.bad_rows = len(bad)
    records.sort(key=lambda record: record.key)
    return Encoded(records, read, bad)


def sign_block(recipe: Recipe, block: Block) -> tuple[npt.NDArray[np.int64], Signatures]:
    """Lines and signatures [N, 128] of the rows of a block that may be left out as repeated."""
    lines, signatures = list[int](), list[Signatures]()
    for row in _used_rows(recipe, block, ExampleCounts()):
        if not isinstance(row, DataError) and (found := signature(row)) is not None:
            lines.append(row.line)
            signatures.append(found)
    whole = np.array(signatures, np.uint32).reshape(-1, PERMUTATIONS)
    return np.array(lines, np.int64), whole


def num_shards(tokens: int, recipe: Recipe, rows_per_shard: int) -> int:
    """How many shards rows with so many tokens are written in."""
    wanted = tokens // (recipe.config.row_length * rows_per_shard)
    return min(max(wanted, 1), _MOST_SHARDS)


def shard_of(key: int, shards: int) -> int:
    """The shard of a record: keys are cut into equal ranges."""
    return key * shards >> 64


def shard_name(number: int, shards: int) -> str:
    return f"rows-{number:05}-of-{shards:05}.array_record"


def write_records(
    recipe: Recipe, records: Iterable[TokenRecord], last: int | None, path: Path
) -> dict[str, Any]:
    """Packs the records of a shard, in the order of their chunks, and writes its rows.

    The rows are a function of the recipe and the records alone. Returns what is counted of them.
    """
    read, packed = ExampleCounts(), PackCounts()
    used = (
        record
        for found in records
        if (record := found if last is None else drawn(found, last, read))
    )
    packer = pack_texts if recipe.format == "text" else pack
    rows = packer(group_records(used, recipe.format, read), recipe.shape, counts=packed)
    reference = bool(recipe.config.reference_field) and recipe.layout.pairs
    counts = write_shard(path, rows, recipe.shape, reference=reference)
    return {
        "file": path.name,
        **counts,
        "read": dataclasses.asdict(read),
        "packed": dataclasses.asdict(packed),
    }


def quarantined(fault: DataError) -> str:
    """The line that names a bad row."""
    values = {"file": fault.file, "line": fault.line, "field": fault.field, "reason": fault.reason}
    return json.dumps(values) + "\n"


def _used_rows(recipe: Recipe, block: Block, counts: ExampleCounts) -> Iterator[Row | DataError]:
    """The rows of a block that the selection uses, in order, and what is wrong with bad ones."""
    for line, record in block.records():
        counts.rows += 1
        try:
            if isinstance(record, DataError):
                raise record
            row = parse_row(
                record,
                recipe.format,
                file=block.file,
                line=line,
                reference_field=recipe.config.reference_field,
            )
            if recipe.selection.uses(row, counts):
                yield row
        except DataError as error:
            yield error


def _encoded(
    recipe: Recipe,
    tokenizer: Tokenizer,
    block: Block,
    document: str,
    repeated: Collection[int],
    counts: ExampleCounts,
) -> Iterator[list[TokenRecord] | DataError]:
    """For each record of a block, in order: its token records, or what is wrong with it."""
    waiting: list[Row] = []

    def encode() -> Iterator[list[TokenRecord] | DataError]:
        encoded = encode_rows(
            waiting,
            recipe.config,
            recipe.layout,
            tokenizer,
            counts,
            file=block.file,
            document=document,
        )
        for row, found in zip(waiting, encoded, strict=True):
            if not isinstance(found, DataError):
                recipe.selection.mark(found, f"{document}:{row.line}")
            yield found
        waiting.clear()

    for row in _used_rows(recipe, block, counts):
        if isinstance(row, DataError):
            yield from encode()
            yield row
        elif row.line in repeated:
            counts.near_duplicates += 1
        else:
            waiting.append(row)
        if len(waiting) >= _ROWS_AT_ONCE:
            yield from encode()
    yield from encode()
