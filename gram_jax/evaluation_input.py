"""From data files to the items of an evaluation, all checked before any work is done."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gram_jax.benchmarks import BENCHMARKS, Benchmark, Item, Record, Row, recognise
from gram_jax.data.formats import brief
from gram_jax.data.records import open_source
from gram_jax.data.sources import Prompt
from gram_jax.errors import DataError
from gram_jax.storage import Place

_BLOCK_SIZE = 1 << 20


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
    """Items in order, and what there is to say of them.

    Attributes:
      subsets: [items] what each is reported under: its subset, else its file's name; with its
        benchmark in front where there are several.
      prompts: [items] a name for the prompt, the same for equal prompts.
      keys: [items][pairs] a name for prompt, better and worse response.
      repeated: pairs that stand there more than once, the first time not counted.
      identical: pairs of two equal responses, which nothing can tell apart.
      contrary: pairs that stand there the other way round as well.
    """

    items: list[Item]
    files: list[DataFile]
    subsets: list[str]
    prompts: list[str]
    keys: list[tuple[str, ...]]
    repeated: int
    identical: int
    contrary: int

    @property
    def pairs(self) -> int:
        return sum(len(item.pairs) for item in self.items)


def read_evaluation(
    data: Sequence[str], benchmark: str = "", *, chat: bool = False
) -> EvaluationInput:
    """Reads all files to their ends.

    Args:
      data: what `gram_jax.data.records.open_source` knows, or .json files that hold a list.
      benchmark: of all files; "" = each as its first record says.
      chat: prompts that are text become a user's message.

    Raises:
      DataError: names file, line and field of what is missing or wrong.
    """
    items: list[Item] = []
    files: list[DataFile] = []
    for name in data:
        family, found = _read_file(name, BENCHMARKS[benchmark] if benchmark else None)
        items += (_as_chat(item) for item in found) if chat else found
        files.append(DataFile(name, family.name, len(found), _digests(name)))
    several = len({file.benchmark for file in files}) > 1
    subsets = [_label(item, several) for item in items]
    digests = [_digest(item.prompt) for item in items]
    keys, pairs, identical = [], dict[tuple[str, str, str], int](), 0
    for item, prompt in zip(items, digests, strict=True):
        responses = [_digest(response) for response in item.responses]
        triples = [(prompt, responses[a], responses[b]) for a, b in item.pairs]
        for triple in triples:
            pairs[triple] = pairs.get(triple, 0) + 1
            identical += triple[1] == triple[2]
        keys.append(tuple(_digest(triple) for triple in triples))
    return EvaluationInput(
        items,
        files,
        subsets,
        digests,
        keys,
        repeated=sum(pairs.values()) - len(pairs),
        identical=identical,
        contrary=sum((p, b, a) in pairs for p, a, b in pairs if a != b),
    )


def _read_file(name: str, family: Benchmark | None) -> tuple[Benchmark, list[Item]]:
    items: list[Item] = []
    for file, line, record in _records(name):
        row = Row(record, file, line)
        if family is None:
            family = recognise(row)
        items.append(family.read(row))
    if family is None or not items:
        raise DataError("holds no rows", file=name)
    return family, items


def _records(name: str) -> Iterator[tuple[str, int, Record]]:
    """(file, line, record) of a source, or of a .json file with a list of records."""
    if Path(name).suffix == ".json" and _starts_a_list(Path(name)):
        yield from _list_of_records(Path(name))
        return
    for block in open_source(name).blocks(_BLOCK_SIZE):
        for line, record in block.records():
            if isinstance(record, DataError):
                raise record
            yield block.file, line, record


def _starts_a_list(path: Path) -> bool:
    try:
        with path.open("rb") as stream:
            return stream.read(256).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
    except OSError:
        return False  # open_source says what is wrong


def _list_of_records(path: Path) -> Iterator[tuple[str, int, Record]]:
    """As benchmarks are published; a record's number in the list stands for its line."""
    try:
        values: list[Any] = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"is not JSON ({brief(error)}); download it again", file=path) from None
    for number, value in enumerate(values, start=1):
        if not isinstance(value, dict):
            raise DataError("a JSON object is expected", file=path, line=number)
        yield str(path), number, value


def _digests(name: str) -> dict[str, str]:
    if Path(name).is_file():
        paths: tuple[Place, ...] = (Path(name),)
    else:
        source = open_source(name)
        paths = source.files()
        if not paths:
            return {name: source.identity()}
    found = {}
    for path in paths:
        with path.open("rb") as stream:
            found[str(path)] = hashlib.file_digest(stream, "sha256").hexdigest()
    return found


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
