"""From texts and preferences to token examples; what is cut is cut by rule, and counted.

Text: a document is BOS, its tokens, EOS. One longer than a row goes on in another example that
starts from the last token of the one before, so that every token is predicted once.

Preferences: rows of one prompt become one example, so that the prompt is computed once; a response
that occurs in several pairs is there once. A prompt that is too long keeps BOS and its end. Two
responses that do not fit beside it are cut at their ends, the longer one first, and lose their EOS
with it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from gram_jax.config import DataConfig
from gram_jax.data.prompts import ExampleError, encode_pair
from gram_jax.data.sources import PreferenceRow, read_preferences, read_texts
from gram_jax.data.tokenizer import Tokenizer
from gram_jax.errors import DataError, UserError
from gram_jax.rows import Example, IntArray, Pair, RowShape


@dataclasses.dataclass(slots=True)
class ExampleCounts:
    """What became of the rows that were read."""

    rows: int = 0
    examples: int = 0
    tokens: int = 0  # of documents; of prompts and responses before anything is cut or shared
    split_documents: int = 0  # documents that were longer than a row
    cut_prompts: int = 0
    cut_responses: int = 0
    cut_tokens: int = 0
    shared_responses: int = 0  # occurrences of a response that is already there for its prompt
    repeated_pairs: int = 0  # pairs that stand in the data more than once; all are kept
    dropped_pairs: int = 0  # pairs whose responses became equal when they were cut

    def text(self) -> str:
        """One line: every count that is not zero."""
        counts = dataclasses.asdict(self).items()
        return ", ".join(f"{name.replace('_', ' ')} {n:,}" for name, n in counts if n)


def row_shape(config: DataConfig) -> RowShape:
    """The shape of the rows of a stage: text rows have no sequences and no pairs."""
    targets = config.row_targets or config.row_length
    if config.format == "text":
        return RowShape(config.row_length, targets)
    return RowShape(config.row_length, targets, config.row_sequences, config.row_pairs)


def read_examples(
    paths: Sequence[str | Path], config: DataConfig, tokenizer: Tokenizer, counts: ExampleCounts
) -> Iterator[Example]:
    """The examples of these files, in order.

    Raises:
      DataError: names file, line and field of a bad row.
    """
    if config.format == "text":
        texts = (row.text for path in paths for row in read_texts(path))
        yield from text_examples(texts, config, tokenizer, counts)
        return
    rows = ((path, row) for path in paths for row in read_preferences(path, config.reference_field))
    yield from preference_examples(rows, config, tokenizer, counts)


def text_examples(
    texts: Iterable[str], config: DataConfig, tokenizer: Tokenizer, counts: ExampleCounts
) -> Iterator[Example]:
    """Documents as examples of at most a row's length.

    Where the tokenizer has no BOS, a document's first token is context only.
    """
    length = min(config.row_length, config.row_targets or config.row_length)
    for group in _groups(texts, 512):
        starts = tokenizer.encode_prompts([""] * len(group))
        bodies = tokenizer.encode_responses(group, add_eos=config.add_eos)
        for start, body in zip(starts, bodies, strict=True):
            ids = np.asarray(start + body, np.int32)
            counts.rows += 1
            counts.tokens += len(ids)
            first = max(len(start), 1)
            counts.split_documents += len(ids) - first > length
            for begin in range(first, len(ids), length):
                prompt = ids[:begin] if begin == first else ids[begin - 1 : begin]
                counts.examples += 1
                yield Example(prompt, (ids[begin : begin + length],), key=counts.examples)


def preference_examples(
    rows: Iterable[tuple[str | Path, PreferenceRow]],
    config: DataConfig,
    tokenizer: Tokenizer,
    counts: ExampleCounts,
) -> Iterator[Example]:
    """One example per distinct prompt, in order of first appearance, with all of its pairs."""
    grouped: dict[bytes, _Group] = {}
    for path, row in rows:
        counts.rows += 1
        try:
            prompt, chosen, rejected = encode_pair(
                row.prompt, row.chosen, row.rejected, tokenizer, add_eos=config.add_eos
            )
        except ExampleError as error:
            raise DataError(error.reason, file=path, line=row.line, field=error.field) from None
        except UserError as error:  # the tokenizer or its chat template cannot do with this row
            raise DataError(str(error), file=path, line=row.line) from None
        counts.tokens += len(prompt) + len(chosen) + len(rejected)
        before = counts.cut_tokens
        prompt, chosen, rejected = _fit(
            prompt, chosen, rejected, config, tokenizer.prefix_ids, counts
        )
        if row.reference is not None and counts.cut_tokens > before:
            raise DataError(
                f"{counts.cut_tokens - before} tokens must be cut to fit a row, but the reference"
                " log-probs are of the whole texts; raise config.data.row_length (or max_prompt),"
                " or leave the row out",
                file=path,
                line=row.line,
                field=config.reference_field,
            )
        if np.array_equal(chosen, rejected):
            counts.dropped_pairs += 1
            continue
        group = grouped.setdefault(prompt.tobytes(), _Group(prompt))
        group.add(chosen, rejected, row.reference, counts)
    for key, group in enumerate(grouped.values()):
        counts.examples += 1
        yield group.example(key)


class _Group:
    """The pairs of one prompt."""

    def __init__(self, prompt: IntArray):
        self.prompt = prompt
        self.responses: list[IntArray] = []
        self.references: list[float] = []
        self.pairs: list[Pair] = []
        self.has_reference = False
        self._places: dict[bytes, int] = {}

    def add(
        self,
        chosen: IntArray,
        rejected: IntArray,
        reference: tuple[float, float] | None,
        counts: ExampleCounts,
    ) -> None:
        a = self._place(chosen, reference[0] if reference else 0.0, counts)
        b = self._place(rejected, reference[1] if reference else 0.0, counts)
        counts.repeated_pairs += Pair(a, b) in self.pairs
        self.pairs.append(Pair(a, b))
        self.has_reference = reference is not None

    def _place(self, response: IntArray, reference: float, counts: ExampleCounts) -> int:
        place = self._places.setdefault(response.tobytes(), len(self.responses))
        if place == len(self.responses):
            self.responses.append(response)
            self.references.append(reference)
        else:
            counts.shared_responses += 1
        return place

    def example(self, key: int) -> Example:
        reference = tuple(self.references) if self.has_reference else None
        return Example(self.prompt, tuple(self.responses), tuple(self.pairs), reference, key)


def _fit(
    prompt: IntArray,
    a: IntArray,
    b: IntArray,
    config: DataConfig,
    prefix: Sequence[int],
    counts: ExampleCounts,
) -> tuple[IntArray, IntArray, IntArray]:
    """Cuts a prompt from the left and two responses from the right so that they fit one row.

    The prompt keeps ``prefix`` (BOS), as it does in scoring, and at least its last token.
    """
    longest = config.max_prompt or config.row_length // 2
    if len(prompt) > longest:
        counts.cut_prompts += 1
        counts.cut_tokens += len(prompt) - longest
        head = len(prefix) if prompt[: len(prefix)].tolist() == list(prefix) else 0
        head = min(head, longest - 1)
        prompt = np.concatenate((prompt[:head], prompt[len(prompt) - (longest - head) :]))
    room = min(config.row_length - (len(prompt) - 1), config.row_targets or config.row_length)
    if len(a) + len(b) > room:
        # The shorter one keeps what it has as long as it takes no more than its half.
        keep_a = max(room // 2, room - len(b))
        keep_b = max(room - room // 2, room - len(a))
        for response, keep in ((a, keep_a), (b, keep_b)):
            counts.cut_responses += len(response) > keep
            counts.cut_tokens += max(len(response) - keep, 0)
        a, b = a[:keep_a], b[:keep_b]
    return prompt, a, b


def _groups(texts: Iterable[str], size: int) -> Iterator[list[str]]:
    iterator = iter(texts)
    while group := list(islice(iterator, size)):
        yield group
