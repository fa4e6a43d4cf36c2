"""From texts, responses and preferences to token examples; what is cut is cut by rule, and counted.

In two steps, so that many processes can share the work. `encode_rows` turns rows of a file
into token records, each by itself. `group_records` turns the records of a shard into
examples: rows of one prompt have the same key, so they meet there, wherever they stood.

Text: a document is BOS, its tokens, EOS. One longer than a row goes on in another record that
starts from the last token of the one before, so that every token is predicted once.

Responses and preferences: rows of one prompt become one example, so that the prompt is computed
once. A prompt that is too long keeps BOS and its end. Responses that do not fit beside it are cut
at their ends (of a pair, the longer one first) and lose their EOS with it; or, with
``too_long="drop"``, the row is left out.

Responses that were labelled one by one meet in the group of their prompt: each good one with each
bad one is a pair, all pairs of a prompt weigh as much as one. Any two must fit a row, so each gets
half of the room beside the prompt.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from gram_jax.config import DataConfig
from gram_jax.data.judge import JudgeTemplate
from gram_jax.data.judge_examples import encode_judged, encode_response_pairs
from gram_jax.data.prompts import ExampleError, encode_candidates
from gram_jax.data.sources import PreferenceRow, ResponsesRow, Row, TextRow, UnpairedRow
from gram_jax.data.token_records import ExampleCounts, TokenRecord, record_key
from gram_jax.data.tokenizer import Tokenizer
from gram_jax.errors import DataError, UserError
from gram_jax.pair import Pair
from gram_jax.rows import Example, IntArray, RowShape


@dataclasses.dataclass(frozen=True, slots=True)
class Layout:
    """What an objective needs of a row.

    Attributes:
      reading: what a sequence is scored by: "likelihood", "judge" or "head"; "text" where tokens
        are predicted and nothing is compared.
      targets: the responses' tokens are predicted.
      template: the judge's; also where stage 1 writes pairs of responses as the judge reads them.
      orders: of a judge's comparisons: "both", or one at "random".
    """

    reading: str
    targets: bool
    template: JudgeTemplate | None = None
    orders: str = "both"

    @property
    def pairs(self) -> bool:
        """Rows compare responses."""
        return self.reading != "text"

    @property
    def comparisons(self) -> int:
        """How often a pair of responses is compared: a judge sees it in both orders."""
        return 2 if self.reading == "judge" and self.orders == "both" else 1

    @property
    def readouts(self) -> bool:
        """A sequence is scored by the hidden state of its last token."""
        return self.reading in ("judge", "head")

    def key(self) -> dict[str, Any]:
        """All of it, as plain values: rows of another layout are other rows."""
        template = self.template.to_dict() if self.template else None
        return {"reading": self.reading, "targets": self.targets, "template": template,
                "orders": self.orders}  # fmt: skip


def row_shape(config: DataConfig, layout: Layout) -> RowShape:
    """The shape of the rows of a stage; next-token rows have no sequences and no pairs."""
    targets = (config.row_targets or config.row_length) if layout.targets else 0
    if not layout.pairs:
        return RowShape(config.row_length, targets)
    default = max(32, config.row_length // 16)
    return RowShape(
        config.row_length,
        targets,
        config.row_sequences or default,
        config.row_pairs or default,
        layout.readouts,
    )


def encode_rows(
    rows: Sequence[Row],
    config: DataConfig,
    layout: Layout,
    tokenizer: Tokenizer,
    counts: ExampleCounts,
    *,
    file: str,
    document: str,
) -> Iterator[list[TokenRecord] | DataError]:
    """For each row its token records, or what is wrong with it; rows are all of one kind.

    ``document`` names the rows' file among all files; with a row's line it makes the key of a text.
    """
    if rows and isinstance(rows[0], TextRow):
        texts = [row for row in rows if isinstance(row, TextRow)]
        yield from _encode_texts(texts, config, tokenizer, counts, document)
        return
    for row in rows:
        if isinstance(row, PreferenceRow):
            counts.ties += sum(pair.target == 0.5 for pair in row.pairs)
        try:
            if isinstance(row, PreferenceRow) and layout.reading == "judge":
                assert layout.template is not None
                yield encode_judged(row, config, layout.template, layout.orders, tokenizer, counts)
            elif isinstance(row, ResponsesRow) and layout.template is not None:
                yield list(encode_response_pairs(row, config, layout.template, tokenizer, counts))
            elif isinstance(row, PreferenceRow):
                yield _encode_preference(row, config, layout, tokenizer, counts, file)
            elif isinstance(row, ResponsesRow):
                yield _encode_responses(row, config, tokenizer, counts)
            elif isinstance(row, UnpairedRow):
                yield _encode_unpaired(row, config, layout, tokenizer, counts, file)
        except ExampleError as error:
            yield DataError(error.reason, file=file, line=row.line, field=error.field)
        except DataError as error:
            yield error
        except UserError as error:  # the tokenizer or its chat template cannot do with this row
            yield DataError(str(error), file=file, line=row.line)


def group_records(
    records: Iterable[TokenRecord], format: str, counts: ExampleCounts
) -> Iterator[Example]:
    """The examples of a shard; records of one prompt become one, in order of first appearance."""
    if format == "text":
        for number, record in enumerate(records):
            counts.examples += 1
            yield Example(record.prompt, record.responses, key=number)
        return
    grouped: dict[bytes, _Group] = {}
    for record in records:
        group = grouped.setdefault(record.prompt.tobytes(), _Group(record.prompt))
        if format == "unpaired":
            group.add_labelled(record, counts)
        elif record.pairs:
            group.add_pairs(record, counts)
        else:
            # Each occurrence is kept: one that the data has twice counts twice in the loss.
            group.responses += record.responses
    for key, group in enumerate(grouped.values()):
        if format == "unpaired" and not group.pair_up(counts):
            continue
        counts.examples += 1
        yield group.example(key)


def _encode_texts(
    rows: Sequence[TextRow],
    config: DataConfig,
    tokenizer: Tokenizer,
    counts: ExampleCounts,
    document: str,
) -> Iterator[list[TokenRecord]]:
    """Documents cut to at most a row's length.

    Where the tokenizer has no BOS, a document's first token is context only.
    """
    length = min(config.row_length, config.row_targets or config.row_length)
    starts = tokenizer.encode_prompts([""] * len(rows))
    bodies = tokenizer.encode_responses([row.text for row in rows], add_eos=config.add_eos)
    for row, start, body in zip(rows, starts, bodies, strict=True):
        ids = np.asarray(start + body, np.int32)
        counts.tokens += len(ids)
        first = max(len(start), 1)
        counts.split_documents += len(ids) - first > length
        counts.dropped_rows += len(ids) == first
        key = record_key(f"{document}:{row.line}".encode())
        yield [
            TokenRecord(
                key,
                ids[:begin] if begin == first else ids[begin - 1 : begin],
                (ids[begin : begin + length],),
            )
            for begin in range(first, len(ids), length)
        ]


def _encode_responses(
    row: ResponsesRow, config: DataConfig, tokenizer: Tokenizer, counts: ExampleCounts
) -> list[TokenRecord]:
    prompt, encoded = encode_candidates(
        row.prompt, list(row.responses), tokenizer, add_eos=config.add_eos
    )
    counts.tokens += len(prompt) + sum(map(len, encoded))
    fitted = _fit_prompt(prompt, config, tokenizer.prefix_ids)
    room = _room(fitted, config)
    kept = [response[:room] for response in encoded]
    if not _count_cuts((prompt, *encoded), (fitted, *kept), config, counts):
        return []
    return [TokenRecord(record_key(fitted.tobytes()), fitted, tuple(kept))]


def _encode_preference(
    row: PreferenceRow,
    config: DataConfig,
    layout: Layout,
    tokenizer: Tokenizer,
    counts: ExampleCounts,
    file: str,
) -> list[TokenRecord]:
    try:
        whole, encoded = encode_candidates(
            row.prompt, list(row.responses), tokenizer, add_eos=config.add_eos
        )
    except ExampleError as error:
        if error.field == "response":
            raise ExampleError(error.reason, field=row.fields[error.index]) from None
        raise
    counts.tokens += len(whole) + sum(map(len, encoded))
    prompt = _fit_prompt(whole, config, tokenizer.prefix_ids)
    room = _room(prompt, config) - 2 * layout.readouts
    kept = list(encoded)
    for pair in row.pairs:
        a, b = pair.members()
        kept[a], kept[b] = _fit_pair(kept[a], kept[b], room)
    before, after = (whole, *encoded), (prompt, *kept)
    _check_reference(row, before, after, config, file)
    if not _count_cuts(before, after, config, counts):
        return []
    pairs = tuple(pair for pair in row.pairs if not _equal(pair, kept))
    counts.dropped_pairs += len(row.pairs) - len(pairs)
    if not pairs:
        return []
    return [TokenRecord(record_key(prompt.tobytes()), prompt, tuple(kept), pairs, row.reference)]


def _encode_unpaired(
    row: UnpairedRow,
    config: DataConfig,
    layout: Layout,
    tokenizer: Tokenizer,
    counts: ExampleCounts,
    file: str,
) -> list[TokenRecord]:
    try:
        whole, (encoded,) = encode_candidates(
            row.prompt, [row.response], tokenizer, add_eos=config.add_eos
        )
    except ExampleError as error:
        if error.field == "response":
            raise ExampleError(error.reason, field="completion") from None
        raise
    counts.tokens += len(whole) + len(encoded)
    prompt = _fit_prompt(whole, config, tokenizer.prefix_ids)
    kept = encoded[: _room(prompt, config) // 2 - layout.readouts]
    before, after = (whole, encoded), (prompt, kept)
    _check_reference(row, before, after, config, file)
    if not _count_cuts(before, after, config, counts):
        return []
    label = Pair(0, None, float(row.good))
    reference = None if row.reference is None else (row.reference,)
    return [TokenRecord(record_key(prompt.tobytes()), prompt, (kept,), (label,), reference)]


def _check_reference(
    row: PreferenceRow | UnpairedRow,
    before: Sequence[IntArray],
    after: Sequence[IntArray],
    config: DataConfig,
    file: str,
) -> None:
    """Raises DataError where texts with log-probs of a reference model must be cut."""
    cut = sum(map(len, before)) - sum(map(len, after))
    if row.reference is not None and cut and config.too_long != "drop":
        raise DataError(
            f"{cut} tokens must be cut to fit a row, but the reference log-probs are of the whole"
            " texts; raise config.data.row_length (or max_prompt), set too_long=drop, or leave the"
            " row out",
            file=file,
            line=row.line,
            field=config.reference_field,
        )


def _equal(pair: Pair, responses: Sequence[IntArray]) -> bool:
    """Whether both sides became the same when they were cut."""
    return pair.b is not None and np.array_equal(responses[pair.a], responses[pair.b])


class _Group:
    """The responses of one prompt, and the pairs among them."""

    def __init__(self, prompt: IntArray):
        self.prompt = prompt
        self.responses: list[IntArray] = []
        self.references: list[float] = []
        self.pairs: list[Pair] = []
        self.has_reference = False
        self._places: dict[bytes, int] = {}
        self._labelled: tuple[list[int], list[int]] = ([], [])  # bad, good
        self._seen: set[Pair] = set()

    def add_pairs(self, record: TokenRecord, counts: ExampleCounts) -> None:
        places = [
            self._place(response, record.reference[i] if record.reference else 0.0, counts)
            for i, response in enumerate(record.responses)
        ]
        for pair in record.pairs:
            b = None if pair.b is None else places[pair.b]
            placed = dataclasses.replace(pair, a=places[pair.a], b=b)
            counts.repeated_pairs += placed in self._seen
            self._seen.add(placed)
            self.pairs.append(placed)
        self.has_reference = record.reference is not None

    def add_labelled(self, record: TokenRecord, counts: ExampleCounts) -> None:
        """Adds a response that was labelled by itself."""
        (response,), (label,) = record.responses, record.pairs
        place = self._place(response, record.reference[0] if record.reference else 0.0, counts)
        self._labelled[int(label.target)].append(place)
        self.has_reference = record.reference is not None

    def pair_up(self, counts: ExampleCounts) -> bool:
        """Makes pairs of the good and the bad responses; False if there are none."""
        bad, good = self._labelled
        pairs = [(a, b) for a in good for b in bad if a != b]
        counts.dropped_pairs += len(good) * len(bad) - len(pairs)
        counts.unpaired_left_out += not pairs
        self.pairs = [Pair(a, b, weight=1 / len(pairs)) for a, b in pairs]
        return bool(pairs)

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


def _fit_prompt(prompt: IntArray, config: DataConfig, prefix: Sequence[int]) -> IntArray:
    """Cuts a prompt from the left; it keeps ``prefix`` (BOS), as in scoring, and its end."""
    longest = config.max_prompt or config.row_length // 2
    if len(prompt) <= longest:
        return prompt
    head = len(prefix) if prompt[: len(prefix)].tolist() == list(prefix) else 0
    head = min(head, longest - 1)
    return np.concatenate((prompt[:head], prompt[len(prompt) - (longest - head) :]))


def _room(prompt: IntArray, config: DataConfig) -> int:
    """Places for responses beside a prompt."""
    return min(config.row_length - (len(prompt) - 1), config.row_targets or config.row_length)


def _fit_pair(a: IntArray, b: IntArray, room: int) -> tuple[IntArray, IntArray]:
    """Cuts two responses so that both fit; the shorter keeps all while that is at most its half."""
    if len(a) + len(b) <= room:
        return a, b
    return a[: max(room // 2, room - len(b))], b[: max(room - room // 2, room - len(a))]


def _count_cuts(
    before: Sequence[IntArray],
    after: Sequence[IntArray],
    config: DataConfig,
    counts: ExampleCounts,
) -> bool:
    """Counts what was cut of a prompt and its responses; False if the row is to be left out."""
    lost = [len(a) - len(b) for a, b in zip(before, after, strict=True)]
    if any(lost) and config.too_long == "drop":
        counts.dropped_rows += 1
        return False
    counts.cut_prompts += lost[0] > 0
    counts.cut_responses += sum(n > 0 for n in lost[1:])
    counts.cut_tokens += sum(lost)
    return True
