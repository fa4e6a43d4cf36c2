"""What is computed in each benchmark: prompts and responses of real text, as texts and as ids.

gram_jax is given the texts, as its users give them, so its time includes tokenisation. The peer is
given the ids, so that both compute the same tokens.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.corpus import documents, preference_rows
from gram_jax.data.tokenizer import Tokenizer
from gram_jax.encoding import Encoder

LONGEST = 2048
"""Most tokens of a prompt with its response; longer ones are passed over, not cut."""


class Asked(NamedTuple):
    """A question: a prompt and its responses; a judge compares the first two.

    Attributes:
      sequences: (ids of the prompt, ids of the response): one per response, or one per order.
    """

    prompt: str
    responses: list[str]
    sequences: list[tuple[list[int], list[int]]]


def save(path: Path, asked: list[Asked]) -> None:
    """Writes questions for `load`."""
    path.write_text(json.dumps(asked), encoding="utf-8")


def load(path: Path) -> list[Asked]:
    """The questions of a file."""
    return [Asked(*fields) for fields in json.loads(path.read_text("utf-8"))]


def num_tokens(asked: list[Asked]) -> int:
    """Tokens of prompt + response over all sequences: what has to be scored, without padding."""
    return sum(len(prompt) + len(rest) for one in asked for prompt, rest in one.sequences)


def separate_pairs(
    data: Path, encoder: Encoder, tokens: int, longest: int = LONGEST
) -> list[Asked]:
    """Pairs of a prompt and its response until there are so many tokens; no prompt comes twice.

    Pairs of more than ``longest`` tokens are passed over.
    """
    seen: set[str] = set()
    asked: list[Asked] = []
    left = tokens
    for row in preference_rows(data):
        if row["prompt"] in seen:
            continue
        seen.add(row["prompt"])
        one = _ask(encoder, row["prompt"], [row["chosen"]])
        size = num_tokens([one])
        if size > min(left, longest):
            continue
        asked.append(one)
        left -= size
        if left < tokens // 100:
            break
    return asked


def best_of(
    data: Path, encoder: Encoder, prompts: int, *, prompt: int, responses: int, response: int
) -> list[Asked]:
    """Prompts of ``prompt`` tokens with responses of 0.5 to 1.5 times ``response`` tokens."""
    pieces, rng = Pieces(data, encoder.tokenizer), random.Random(0)
    return [
        _ask(
            encoder,
            pieces.text(prompt - 1),  # and BOS
            [pieces.text(length - 1) for length in _lengths(rng, response, responses)],  # and EOS
        )
        for _ in range(prompts)
    ]


def pairs_of_ids(
    data: Path, tokenizer: Tokenizer, count: int, *, prompt: int, response: int
) -> list[list[list[int]]]:
    """[prompt, chosen, rejected] as ids, of lengths as in `best_of`, exactly."""
    pieces, rng = Pieces(data, tokenizer), random.Random(0)
    return [
        [pieces.ids(prompt), *(pieces.ids(length) for length in _lengths(rng, response, 2))]
        for _ in range(count)
    ]


def comparisons(
    data: Path, encoder: Encoder, count: int, *, question: int, response: int
) -> list[Asked]:
    """Questions of ``question`` tokens with two responses of about ``response`` tokens each."""
    pieces, rng = Pieces(data, encoder.tokenizer), random.Random(0)
    return [
        _ask(
            encoder,
            pieces.text(question),
            [pieces.text(length) for length in _lengths(rng, response, 2)],
        )
        for _ in range(count)
    ]


class Pieces:
    """Pieces of documents, each once, cut to a number of tokens."""

    def __init__(self, data: Path, tokenizer: Tokenizer):
        self._texts, self._tokenizer = documents(data), tokenizer
        self._ids: list[int] = []

    def ids(self, count: int) -> list[int]:
        """The next ``count`` ids, of one document; what is left of a shorter one is passed over."""
        while len(self._ids) < count:
            self._ids = self._tokenizer.encode_response(next(self._texts), add_eos=False)
        piece, self._ids = self._ids[:count], self._ids[count:]
        return piece

    def text(self, count: int) -> str:
        """The next ``count`` tokens as text (which may be a token more, where a cut falls so)."""
        return self._tokenizer.decode(self.ids(count))


def _ask(encoder: Encoder, prompt: str, responses: list[str]) -> Asked:
    encoded = encoder.encode(prompt, responses, [(0, 1)] if encoder.reading == "judge" else [])
    sequences = [(one.tolist(), rest.tolist()) for one, rest in encoded.sequences]
    return Asked(prompt, responses, sequences)


def _lengths(rng: random.Random, mean: int, count: int) -> list[int]:
    """An even number of lengths, of 0.5 to 1.5 times ``mean``, whose mean it is."""
    half = [rng.randint(mean - mean // 2, mean) for _ in range(count // 2)]
    lengths = [*half, *(2 * mean - length for length in half)]
    rng.shuffle(lengths)
    return lengths


def rows_of_text(data: Path, tokenizer: Tokenizer, count: int, length: int) -> Iterator[list[int]]:
    """``count`` documents cut to ``length`` ids."""
    pieces = Pieces(data, tokenizer)
    return (pieces.ids(length) for _ in range(count))


def padded_places(lengths: Sequence[int], batch_tokens: int) -> int:
    """Places of batches of at most so many tokens, sorted by length and padded to the longest."""
    total, longest, count = 0, 0, 0
    for length in sorted(lengths, reverse=True):
        if count and (count + 1) * longest > batch_tokens:
            total, count = total + count * longest, 0
        if not count:
            longest = length
        count += 1
    return total + count * longest
