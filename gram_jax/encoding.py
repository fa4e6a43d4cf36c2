"""From a prompt and responses to the sequences of token ids that a reward model reads.

A likelihood and a head read a response after its prompt: one sequence per response. A judge reads
judge prompts: two sequences per comparison, one for each order. What sequences have in common
stands in front of them once; `BlockBuilder` brings sequences with the same beginning
together, so that it is computed once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from gram_jax.data.judge import JudgeTemplate, response_text
from gram_jax.data.judge_prompts import encode_comparisons
from gram_jax.data.prompts import ExampleError, encode_candidates
from gram_jax.data.sources import Prompt, Response
from gram_jax.data.tokenizer import Tokenizer
from gram_jax.rows import Example, IntArray


class Cut(NamedTuple):
    """How many tokens were cut: from the prompt's left, from each response's right."""

    prompt: int
    responses: tuple[int, ...]

    def __bool__(self) -> bool:
        return bool(self.prompt or any(self.responses))


class Encoded(NamedTuple):
    """What a reward model reads to answer a question.

    Attributes:
      sequences: (prompt, continuation), ids. Likelihood and head: one per response. Judge: two per
        comparison, the one that shows its first response first, then the other.
      num_tokens: of each response; with its end token, unless for a judge.
      cut: what did not fit. Where comparisons cut differently, the most.
    """

    sequences: list[tuple[IntArray, IntArray]]
    num_tokens: tuple[int, ...]
    cut: Cut


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Encoder:
    """How questions become sequences.

    Attributes:
      reading: "likelihood", "judge" or "head".
      max_length: most tokens of a sequence with its prompt.
      too_long: "error" stops at a longer one, "truncate" cuts it.
      add_eos: the end token is part of a response.
      template: the judge's.
    """

    tokenizer: Tokenizer
    reading: str
    max_length: int
    too_long: str = "error"
    add_eos: bool = True
    template: JudgeTemplate | None = None

    def encode(
        self, prompt: Prompt, responses: Sequence[Response], pairs: Sequence[tuple[int, int]]
    ) -> Encoded:
        """Token ids; ``pairs`` are the comparisons of a judge, and nothing to other readings.

        Raises:
          ExampleError: what is wrong with which response, or with the prompt.
          UserError: the tokenizer, its chat template or the judge template cannot do with it.
        """
        if self.reading == "judge":
            return self._comparisons(prompt, responses, pairs)
        ids, encoded = encode_candidates(
            prompt, list(responses), self.tokenizer, add_eos=self.add_eos
        )
        longest = max(range(len(encoded)), key=lambda i: len(encoded[i]))
        length = len(ids) + len(encoded[longest])
        if length > self.max_length and self.too_long == "error":
            raise ExampleError(
                f"prompt ({len(ids)} tokens) and response ({len(encoded[longest])} tokens) are"
                f" {length} tokens, more than max_length={self.max_length}; raise --max_length"
                " (and --row_length), or cut with --too_long=truncate",
                field="response",
                index=longest,
            )
        ids, encoded, cut = fit(ids, encoded, self.max_length, self.tokenizer.prefix_ids)
        return Encoded([(ids, response) for response in encoded], tuple(map(len, encoded)), cut)

    def _comparisons(
        self, prompt: Prompt, responses: Sequence[Response], pairs: Sequence[tuple[int, int]]
    ) -> Encoded:
        assert self.template is not None
        found = encode_comparisons(
            self.template,
            prompt,
            responses,
            pairs,
            self.tokenizer,
            max_length=self.max_length,
            too_long=self.too_long,
        )
        sequences = [(one.prefix, rest) for one in found for rest in (one.forward, one.backward)]
        lost = [0] * len(responses)
        for (a, b), one in zip(pairs, found, strict=True):
            lost[a] = max(lost[a], one.lost.response_a)
            lost[b] = max(lost[b], one.lost.response_b)
        texts = [response_text(response) for response in responses]
        sizes = map(len, self.tokenizer.encode_responses(texts, add_eos=False))
        cut = Cut(max((one.lost.question for one in found), default=0), tuple(lost))
        return Encoded(sequences, tuple(n - k for n, k in zip(sizes, lost, strict=True)), cut)


def fit(
    prompt: IntArray, responses: Sequence[IntArray], max_length: int, prefix: Sequence[int]
) -> tuple[IntArray, list[IntArray], Cut]:
    """Cuts what is too long: first the prompt from its left, then responses from their right.

    All candidates keep the same prompt, cut as the longest response needs it. The prompt keeps
    ``prefix`` (the BOS, if it starts with one) and at least its last token. A response that is too
    long even so loses its end, and its end token with it.

    Args:
      prompt: [n] ids.
      responses: ids of each response.
      max_length: most tokens of the prompt and one response; at least len(prefix) + 2.
      prefix: ids that the tokenizer puts before every prompt.
    """
    longest = max(map(len, responses))
    if len(prompt) + longest <= max_length:
        return prompt, list(responses), Cut(0, (0,) * len(responses))
    head = len(prefix) if list(prompt[: len(prefix)]) == list(prefix) else 0
    head = min(head, len(prompt) - 1)
    keep = min(max(max_length - longest, head + 1), len(prompt))
    short_prompt = np.concatenate((prompt[:head], prompt[len(prompt) - (keep - head) :]))
    short = [response[: max_length - keep] for response in responses]
    cuts = tuple(len(a) - len(b) for a, b in zip(responses, short, strict=True))
    return short_prompt, short, Cut(len(prompt) - keep, cuts)


class BlockBuilder:
    """Groups sequences by prompt; examples stand in order of first appearance.

    Attributes:
      tokens: of prompt + continuation, over all sequences.
      placed: of the examples: each prompt and each distinct continuation once.
    """

    def __init__(self) -> None:
        self.tokens = self.placed = 0
        self._keys: dict[bytes, int] = {}
        self._prompts: list[IntArray] = []
        self._sequences: list[list[IntArray]] = []
        self._places: dict[tuple[int, bytes], int] = {}

    def add(self, sequences: Sequence[tuple[IntArray, IntArray]]) -> list[tuple[int, int]]:
        """Returns the place of each: (example's key, number of its continuation)."""
        return [self._add(prompt, sequence) for prompt, sequence in sequences]

    def _add(self, prompt: IntArray, sequence: IntArray) -> tuple[int, int]:
        key = self._keys.setdefault(prompt.tobytes(), len(self._prompts))
        if key == len(self._prompts):
            self._prompts.append(prompt)
            self._sequences.append([])
            self.placed += len(prompt) - 1
        known = self._sequences[key]
        place = self._places.setdefault((key, sequence.tobytes()), len(known))
        if place == len(known):
            known.append(sequence)
            self.placed += len(sequence)
        self.tokens += len(prompt) + len(sequence)
        return key, place

    def examples(self) -> list[Example]:
        groups = zip(self._prompts, self._sequences, strict=True)
        return [
            Example(prompt, tuple(sequences), key=key)
            for key, (prompt, sequences) in enumerate(groups)
        ]
