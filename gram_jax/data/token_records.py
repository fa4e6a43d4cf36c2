"""What rows of data become before they are packed: token ids by prompt, and what was counted."""

from __future__ import annotations

import dataclasses
import hashlib

from gram_jax.pair import Pair
from gram_jax.rows import IntArray


@dataclasses.dataclass(slots=True)
class ExampleCounts:
    """What became of the rows that were read."""

    rows: int = 0
    bad_rows: int = 0  # put aside, with on_bad_row=quarantine
    examples: int = 0
    tokens: int = 0  # of documents; of prompts and responses before anything is cut or shared
    split_documents: int = 0  # documents that were longer than a row
    cut_prompts: int = 0
    cut_responses: int = 0
    cut_tokens: int = 0
    dropped_rows: int = 0  # too long, with too_long=drop; texts of one token, without BOS and EOS
    shared_responses: int = 0  # occurrences of a response that is already there for its prompt
    repeated_pairs: int = 0  # pairs that stand in the data more than once; all are kept
    dropped_pairs: int = 0  # pairs whose responses became equal when they were cut
    ties: int = 0  # pairs in the data of which neither side is better
    other_part: int = 0  # rows whose prompt is for validation; or for training, in validation
    overlapping_rows: int = 0  # rows whose prompt is in `exclude`; left out or not, as asked
    overlapping_texts: int = 0  # other rows with as many words in a row as a text of `exclude`
    near_duplicates: int = 0  # rows left out as nearly the same as an earlier one
    undrawn_pairs: int = 0  # pairs left out of the draw of max_pairs
    unpaired_left_out: int = 0  # prompts whose labelled responses are all good, or all bad

    def text(self) -> str:
        """One line: every count that is not zero."""
        counts = dataclasses.asdict(self).items()
        return ", ".join(f"{name.replace('_', ' ')} {n:,}" for name, n in counts if n)

    def add(self, other: ExampleCounts) -> None:
        for field in dataclasses.fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))


@dataclasses.dataclass(slots=True, eq=False)
class TokenRecord:
    """A prompt, responses, and comparisons among them, as token ids.

    ``key`` (64 bits) is equal for records that belong together: those of one document, or of one
    prompt. ``reference`` holds the responses' log-probs under a reference model. A response that
    was labelled by itself has a pair without ``b``, whose target is 1 (good) or 0. ``draws``, where
    pairs are drawn, holds the number of each in the draw; both orders of a comparison have one.
    """

    key: int
    prompt: IntArray
    responses: tuple[IntArray, ...]
    pairs: tuple[Pair, ...] = ()
    reference: tuple[float, ...] | None = None
    draws: tuple[int, ...] = ()


def record_key(content: bytes) -> int:
    """64 bits that are equal for equal contents."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")
