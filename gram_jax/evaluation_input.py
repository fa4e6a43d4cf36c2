"""From data files to the items of an evaluation, and what there is to say of them.

Texts are read by whoever answers a question, and are of no use after that: numbers need to know
which prompts and responses are the same, for which names stand in their places.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gram_jax.benchmarks import BENCHMARKS, Benchmark, Item, Row, recognise
from gram_jax.data.records import Source, open_source
from gram_jax.data.sources import Prompt
from gram_jax.errors import DataError
from gram_jax.pieces import BlockFacts, SourceRow
from gram_jax.storage import digest_of

_FIRST_BLOCK = 1 << 16


@dataclasses.dataclass(frozen=True, slots=True)
class DataFile:
    """What was read.

    Attributes:
      name: as the user gave it.
      benchmark: the name of its `Benchmark`.
      rows: items in it.
      sha256: of each of its files, or of its content if it has no files.
    """

    name: str
    benchmark: str
    rows: int
    sha256: dict[str, str]


@dataclasses.dataclass(frozen=True, slots=True)
class EvaluationInput:
    """Items in order, with names in the place of texts, and what there is to say of them.

    Attributes:
      subsets: [items] what each is reported under: its subset, else its file's name; with its
        benchmark in front where there are several.
      keys: [items][pairs] a name for prompt, better and worse response.
      repeated: pairs that stand there more than once, the first time not counted.
      identical: pairs of two equal responses, which nothing can tell apart.
      contrary: pairs that stand there the other way round as well.
    """

    items: list[Item]
    files: list[DataFile]
    subsets: list[str]
    keys: list[tuple[str, ...]]
    repeated: int
    identical: int
    contrary: int

    @property
    def pairs(self) -> int:
        return sum(len(item.pairs) for item in self.items)


class EvaluationData:
    """Files to evaluate on.

    Attributes:
      sources: what is read.
      families: of each, the kind of its records.
    """

    def __init__(self, data: Sequence[str], benchmark: str = "", *, chat: bool = False) -> None:
        """Finds the files and reads the first record of each.

        Args:
          data: what `gram_jax.data.records.open_source` knows.
          benchmark: of all files; "" = each as its first record says.
          chat: prompts that are text become a user's message.

        Raises:
          DataError: a file is not there, or its first record is of no kind.
        """
        self.sources = [open_source(name) for name in data]
        self.families = [
            BENCHMARKS[benchmark] if benchmark else _family(source) for source in self.sources
        ]
        self._chat = chat

    def item(self, row: SourceRow) -> Item:
        """The item of a record.

        Raises:
          DataError: names file, line and field of what is missing or wrong.
        """
        item = self.families[row.source].read(Row(row.record, row.file, row.line))
        return _as_chat(item) if self._chat else item

    def digests(self) -> list[dict[str, str]]:
        """Of each source the SHA-256 of its files, or of its content if it has none."""
        return [_digests(source) for source in self.sources]

    def files(
        self, blocks: Sequence[BlockFacts], digests: Sequence[dict[str, str]]
    ) -> list[DataFile]:
        """What was read, in these blocks."""
        rows = collections.Counter[int]()
        for block in blocks:
            rows[block.source] += block.rows
        return [
            DataFile(source.spec, self.families[number].name, rows[number], digests[number])
            for number, source in enumerate(self.sources)
        ]


def named(item: Item) -> Item:
    """The item with names in the place of its texts, the same for equal ones."""
    responses = tuple(_digest(response) for response in item.responses)
    return item._replace(prompt=_digest(item.prompt), responses=responses)


def evaluation_input(items: list[Item], files: list[DataFile]) -> EvaluationInput:
    """What there is to say of items that are `named`."""
    several = len({file.benchmark for file in files}) > 1
    keys, pairs, identical = [], dict[tuple[str, str, str], int](), 0
    for item in items:
        names = [str(name) for name in (item.prompt, *item.responses)]
        triples = [(names[0], names[1 + a], names[1 + b]) for a, b in item.pairs]
        for triple in triples:
            pairs[triple] = pairs.get(triple, 0) + 1
            identical += triple[1] == triple[2]
        keys.append(tuple(_digest(triple) for triple in triples))
    return EvaluationInput(
        items,
        files,
        [_label(item, several) for item in items],
        keys,
        repeated=sum(pairs.values()) - len(pairs),
        identical=identical,
        contrary=sum((p, b, a) in pairs for p, a, b in pairs if a != b),
    )


def _family(source: Source) -> Benchmark:
    """What the first record is of."""
    for block in source.blocks(_FIRST_BLOCK):
        for line, record in block.records():
            if isinstance(record, DataError):
                raise record
            return recognise(Row(record, block.file, line))
    raise DataError("holds no rows", file=source.spec)


def _digests(source: Source) -> dict[str, str]:
    if identity := source.identity():
        return {source.spec: identity}
    return {str(path): digest_of(path) for path in source.files()}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _label(item: Item, several: bool) -> str:
    subset = item.subset or Path(item.file).name.partition(".")[0]
    return f"{item.benchmark}/{subset}" if several else subset


def _as_chat(item: Item) -> Item:
    if not isinstance(item.prompt, str):
        return item
    prompt: Prompt = [{"role": "user", "content": item.prompt}]
    return item._replace(prompt=prompt)
