"""The row: the one layout of tokens that pretraining, fine-tuning and scoring share.

A row holds several examples side by side. An example is a prompt and the responses that continue
it; the prompt is computed once for all of them. With ``prompt = p_0 .. p_n`` and a response
``y_0 .. y_m`` the row holds

    prefix   p_0 .. p_{n-1}             branch 0, positions 0 .. n-1
    branch   p_n, y_0 .. y_{m-1}        branch k, positions n .. n+m, one such run per response

so the hidden state of every branch token predicts one token of the response. A query sees a key iff
the key is not later in the row, belongs to the same segment, and lies in the prefix or in the
query's own branch. A document of plain text is an example whose prompt is one token.

A judge and a reward head read the hidden state of a sequence's *last* token. Rows for them hold
that token too (the branch ends with y_m), and say where it stands (``readout_index``); they need
target slots only where a loss on tokens is added. A judge's sequence is a whole judge prompt: what
it shares with others up to the first response is the prefix, the rest is a branch.

Letters: B rows, T tokens, M targets, S sequences, P pairs per row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, cast

import jax
import numpy as np
import numpy.typing as npt

from gram_jax.pair import Pair

IntArray = npt.NDArray[np.int32]


@dataclasses.dataclass(frozen=True, slots=True)
class RowShape:
    """Static sizes of a row: T tokens, M targets, S sequences and P pairs (both 0 in text rows).

    With ``readouts``, branches hold the last token of their response, and its place is kept. M may
    then be 0: no target slots.
    """

    tokens: int
    targets: int
    sequences: int = 0
    pairs: int = 0
    readouts: bool = False

    def places(self, response: IntArray) -> int:
        """Places that the branch of a response takes."""
        return len(response) + self.readouts

    @property
    def branch_room(self) -> int:
        """Places for the branches of a row."""
        return self.targets or self.tokens


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Example:
    """A tokenised prompt, the responses that continue it, and the pairs among them.

    ``prompt`` and each response are int32 vectors of at least one token. ``reference`` holds one
    log-prob per response under a frozen reference model. ``key`` is the caller's name for it.
    """

    prompt: IntArray
    responses: tuple[IntArray, ...]
    pairs: tuple[Pair, ...] = ()
    reference: tuple[float, ...] | None = None
    key: int = 0

    def num_tokens(self, shape: RowShape) -> int:
        """Places it takes in a row of this shape: the prefix once, then each branch."""
        return len(self.prompt) - 1 + sum(map(shape.places, self.responses))

    def least_tokens(self, shape: RowShape) -> int:
        """Places that a row must have for its longest response."""
        return len(self.prompt) - 1 + max(map(shape.places, self.responses))


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Part:
    """The share of an example that goes into one row: some responses and the pairs among them."""

    example: Example
    responses: tuple[int, ...]
    pairs: tuple[Pair, ...]  # a and b index example.responses
    tokens: int
    targets: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(kw_only=True)
class Batch:
    """B rows (or one row, without the leading axis); fields that a stage does not need are None."""

    tokens: Any  # [B, T] int32: input ids
    positions: Any  # [B, T] int32: for RoPE and windows; restart per example
    segment_ids: Any  # [B, T] int32: example number within the row, 0 = padding
    branch_ids: Any  # [B, T] int32: 0 = shared prefix, k >= 1 = k-th continuation; None: text,
    # where every segment is one run
    target_index: Any = None  # [B, M] int32: place whose hidden state predicts the target
    targets: Any = None  # [B, M] int32: id to predict
    weights: Any = None  # [B, M] float32: loss weight, 0 = unused slot
    readout_index: Any = None  # [B, S] int32: place of each sequence's last token
    sequence_ids: Any = None  # [B, M] int32: sequence the target belongs to, 1..S, 0 = none
    pair_a: Any = None  # [B, P] int32: sequence number, 0 = none
    pair_b: Any = None  # [B, P] int32: 0 = a is compared with nothing, whose score is 0
    pair_target: Any = None  # [B, P] float32: probability that a is better
    pair_weight: Any = None  # [B, P] float32: 0 = unused slot
    pair_margin: Any = None  # [B, P] float32
    reference: Any = None  # [B, S] float32: log-probs under a frozen reference model


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class PackedRow:
    """One row (numpy, no leading axis) and where each of its sequences comes from."""

    batch: Batch
    origins: tuple[tuple[int, int], ...]  # of sequence s: (example key, response), at s - 1


def empty_row(shape: RowShape, *, reference: bool = False) -> Batch:
    """A row of padding, as numpy arrays without the leading axis."""
    t, m, s, p = shape.tokens, shape.targets, shape.sequences, shape.pairs
    row = Batch(
        tokens=np.zeros(t, np.int32),
        positions=np.zeros(t, np.int32),
        segment_ids=np.zeros(t, np.int32),
        branch_ids=np.zeros(t, np.int32),
    )
    if m:
        row.target_index = np.zeros(m, np.int32)
        row.targets = np.zeros(m, np.int32)
        row.weights = np.zeros(m, np.float32)
    if m and s:
        row.sequence_ids = np.zeros(m, np.int32)
    if shape.readouts:
        row.readout_index = np.zeros(s, np.int32)
    if p:
        row.pair_a = np.zeros(p, np.int32)
        row.pair_b = np.zeros(p, np.int32)
        row.pair_target = np.zeros(p, np.float32)
        row.pair_weight = np.zeros(p, np.float32)
        row.pair_margin = np.zeros(p, np.float32)
    if reference:
        row.reference = np.zeros(s, np.float32)
    return row


def build_row(parts: Sequence[Part], shape: RowShape) -> PackedRow:
    """Lays parts side by side in one row, prefix first, then branch after branch."""
    row = empty_row(shape, reference=any(part.example.reference is not None for part in parts))
    origins: list[tuple[int, int]] = []
    at = slot = pair_slot = 0
    for segment, part in enumerate(parts, start=1):
        example = part.example
        prefix = len(example.prompt) - 1
        start = at
        row.tokens[at : at + prefix] = example.prompt[:-1]
        row.positions[at : at + prefix] = np.arange(prefix)
        at += prefix
        numbers: dict[int, int] = {}
        for branch, index in enumerate(part.responses, start=1):
            response = example.responses[index]
            n, places = len(response), shape.places(response)
            row.tokens[at] = example.prompt[-1]
            row.tokens[at + 1 : at + places] = response[: places - 1]
            row.positions[at : at + places] = prefix + np.arange(places)
            row.branch_ids[at : at + places] = branch
            origins.append((example.key, index))
            numbers[index] = len(origins)
            if shape.targets:
                row.target_index[slot : slot + n] = at + np.arange(n)
                row.targets[slot : slot + n] = response
                row.weights[slot : slot + n] = 1.0
                slot += n
            if row.sequence_ids is not None:
                row.sequence_ids[slot - n : slot] = numbers[index]
            if example.reference is not None:
                row.reference[numbers[index] - 1] = example.reference[index]
            at += places
            if row.readout_index is not None:
                row.readout_index[numbers[index] - 1] = at - 1
        row.segment_ids[start:at] = segment
        for pair in part.pairs:
            row.pair_a[pair_slot] = numbers[pair.a]
            row.pair_b[pair_slot] = 0 if pair.b is None else numbers[pair.b]
            row.pair_target[pair_slot] = pair.target
            row.pair_weight[pair_slot] = pair.weight
            row.pair_margin[pair_slot] = pair.margin
            pair_slot += 1
    return PackedRow(row, tuple(origins))


def stack_rows(rows: Sequence[Batch]) -> Batch:
    """Stacks rows into a batch with a leading axis."""
    return cast(Batch, jax.tree.map(lambda *leaves: np.stack(leaves), *rows))


def check_batch(batch: Batch, vocab_size: int) -> None:
    """Checks every invariant of the layout; for tests and, on request, for live data.

    Raises:
      ValueError: names the row, the field and what is wrong.
    """
    for b in range(batch.tokens.shape[0]):
        row = jax.tree.map(lambda leaf, b=b: np.asarray(leaf[b]), batch)
        for message in _problems(row, vocab_size):
            raise ValueError(f"row {b}: {message}")


def _problems(row: Batch, vocab_size: int) -> Iterator[str]:
    """The rules that a row breaks, in words."""
    segment, position = row.segment_ids, row.positions
    branch = (segment != 0).astype(np.int32) if row.branch_ids is None else row.branch_ids
    used = int((segment != 0).sum())
    if row.tokens.min(initial=0) < 0 or row.tokens.max(initial=0) >= vocab_size:
        yield f"tokens has ids outside [0, {vocab_size})"
    if (segment[:used] == 0).any() or (np.diff(segment[:used]) < 0).any():
        yield "segment_ids must count 1, 2, ... and padding must come last"
    for number in range(1, int(segment.max(initial=0)) + 1):
        inside = np.flatnonzero(segment == number)
        if len(inside) == 0:
            yield f"segment_ids skips {number}"
            continue
        b, p = branch[inside], position[inside]
        if (np.diff(b, prepend=0) < 0).any() or (np.diff(b, prepend=0) > 1).any() or b[-1] == 0:
            yield f"segment {number}: branch_ids must run 0.., 1.., 2.. and end in a branch"
        prefix = int((b == 0).sum())
        if (p[:prefix] != np.arange(prefix)).any():
            yield f"segment {number}: positions of the prefix must count from 0"
        for k in range(1, int(b[-1]) + 1):
            run = p[b == k]
            if (run != prefix + np.arange(len(run))).any():
                yield f"segment {number} branch {k}: positions must go on from the prefix"
    if row.weights is not None:
        yield from _target_problems(row, vocab_size, used)
    top = 0 if row.sequence_ids is None else int(row.sequence_ids.max(initial=0))
    if row.readout_index is not None:
        yield from _readout_problems(row, used)
        top = max(top, int((row.readout_index != 0).sum()))
    if row.pair_a is not None:
        pairs = row.pair_weight != 0
        for name, side in (("pair_a", row.pair_a), ("pair_b", row.pair_b)):
            if (side[pairs] < 0).any() or (side > top).any():
                yield f"{name} names a sequence that is not in the row"
        if ((row.pair_target < 0) | (row.pair_target > 1)).any():
            yield "pair_target must be in [0, 1]"


def _target_problems(row: Batch, vocab_size: int, used: int) -> Iterator[str]:
    if row.targets.min(initial=0) < 0 or row.targets.max(initial=0) >= vocab_size:
        yield f"targets has ids outside [0, {vocab_size})"
    live = row.weights != 0
    index = row.target_index[live]
    if (index >= used).any() or (index < 0).any():
        yield "target_index points into the padding"
    if len(np.unique(index)) != len(index):
        yield "target_index: one place predicts two targets"
    if (row.branch_ids[index] == 0).any():
        yield "target_index points into a shared prefix"
    if row.sequence_ids is not None:
        if ((row.sequence_ids != 0) != live).any():
            yield "sequence_ids and weights disagree on which slots are used"
        inner = np.flatnonzero((np.diff(row.sequence_ids) == 0) & (row.sequence_ids[1:] != 0))
        if (row.tokens[row.target_index[inner + 1]] != row.targets[inner]).any():
            yield "targets: the token after a target is not that target"


def _readout_problems(row: Batch, used: int) -> Iterator[str]:
    index = row.readout_index[row.readout_index != 0]
    if (index >= used).any() or (index < 0).any():
        yield "readout_index points into the padding"
        return
    # Branches of one example, and examples, follow one another: a branch ends where either changes.
    ends = np.flatnonzero(
        (np.diff(row.branch_ids[:used], append=-1) != 0)
        | (np.diff(row.segment_ids[:used], append=-1) != 0)
    )
    ends = ends[row.branch_ids[ends] != 0]
    if not np.array_equal(index, ends):
        yield "readout_index must name the last place of each branch, in order"
