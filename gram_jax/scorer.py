"""What is asked about a prompt's responses, and what a reward model answers."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh
from numpy.typing import NDArray

from gram_jax.data.prompts import encode_candidates
from gram_jax.data.sources import Prompt, Response
from gram_jax.errors import UserError
from gram_jax.packing import PackCounts, pack
from gram_jax.rows import Example
from gram_jax.scoring import EngineCounts, Scored, score_batches, scoring_shape
from gram_jax.scoring_input import fit
from gram_jax.scoring_job import Loaded

_WINDOW = 1024  # questions that are packed together


class Question(NamedTuple):
    """A prompt and n responses to it.

    Attributes:
      pairs: the comparisons wanted, as places (i, j) in ``responses``; read by a judge only.
    """

    prompt: Prompt
    responses: Sequence[Response]
    pairs: Sequence[tuple[int, int]] = ()


class Verdict(NamedTuple):
    """The answer to a `Question`.

    Attributes:
      rewards: [n], the log-probs or the head's numbers; None of a judge.
      num_tokens: int [n], of each response, its end token included.
      forward: [pairs], z_A - z_B with i shown first; None unless of a judge.
      backward: [pairs], the same with j shown first.
      truncated: something was cut to fit.
    """

    rewards: NDArray[np.float64] | None
    num_tokens: NDArray[np.int64]
    forward: NDArray[np.float64] | None
    backward: NDArray[np.float64] | None
    truncated: bool


class QuestionError(UserError):
    """A question that cannot be answered; ``question`` is its place in what was asked."""

    def __init__(self, question: int, reason: str) -> None:
        self.question, self.reason = question, reason
        super().__init__(reason)


@dataclasses.dataclass(slots=True, kw_only=True)
class LikelihoodScorer:
    """Rewards that are the log-probs of responses, or their means per token.

    Attributes:
      loaded: the model and its tokenizer.
      average: ``sum`` or ``mean``.
      beta: turns differences of rewards into log-odds.
      row_length: tokens of a row, in which short sequences lie side by side.
      max_length: most tokens of a prompt and one response; at most ``row_length``.
      too_long: ``error`` stops at a longer one, ``truncate`` cuts it.
      batch_rows: rows computed at once.
      mesh: what the model is spread over, or None for one device.
      packed, engine: filled with what was computed.
    """

    loaded: Loaded
    average: str
    beta: float
    row_length: int
    max_length: int
    too_long: str
    batch_rows: int
    mesh: Mesh | None = None
    packed: PackCounts = dataclasses.field(default_factory=PackCounts)
    engine: EngineCounts = dataclasses.field(default_factory=EngineCounts)

    @property
    def kind(self) -> str:
        return "likelihood"

    def score(self, questions: Iterable[Question]) -> Iterator[Verdict]:
        """One verdict per question, in order; questions are read as they are needed.

        Raises:
          QuestionError: the tokenizer cannot do with a question, or it is too long.
        """
        waiting: dict[int, _Waiting] = {}

        def examples() -> Iterator[Example]:
            for key, question in enumerate(questions):
                example, truncated = self._example(key, question)
                waiting[key] = _Waiting([len(r) for r in example.responses], truncated)
                yield example

        following = 0
        for score in self._scores(examples()):
            waiting[score.key].rewards[score.response] = score.score
            while (first := waiting.get(following)) is not None and first.complete:
                del waiting[following]
                following += 1
                yield self._verdict(first)

    def _scores(self, examples: Iterator[Example]) -> Iterator[Scored]:
        shape = scoring_shape(self.row_length)
        windows = iter(lambda: list(itertools.islice(examples, _WINDOW)), [])
        rows = (row for window in windows for row in pack(window, shape, counts=self.packed))
        batches = iter(lambda: list(itertools.islice(rows, self.batch_rows)), [])
        for scores in score_batches(
            self.loaded.model, batches, shape, self.batch_rows, mesh=self.mesh, counts=self.engine
        ):
            yield from scores

    def _example(self, key: int, question: Question) -> tuple[Example, bool]:
        """The question as token ids, and whether something was cut."""
        tokenizer = self.loaded.tokenizer
        try:
            prompt, responses = encode_candidates(
                question.prompt, list(question.responses), tokenizer
            )
        except UserError as error:
            raise QuestionError(key, str(error)) from None
        longest = max(map(len, responses))
        if len(prompt) + longest > self.max_length and self.too_long == "error":
            raise QuestionError(
                key,
                f"prompt ({len(prompt)} tokens) and a response ({longest} tokens) are"
                f" {len(prompt) + longest} tokens, more than max_length={self.max_length}; raise"
                " --max_length, or cut with --too_long=truncate",
            )
        prompt, responses, cut = fit(prompt, responses, self.max_length, tokenizer.prefix_ids)
        return Example(prompt, tuple(responses), key=key), bool(cut)

    def _verdict(self, done: _Waiting) -> Verdict:
        num_tokens = np.array(done.num_tokens)
        rewards = np.array([done.rewards[i] for i in range(len(num_tokens))])
        if self.average == "mean":
            rewards = rewards / num_tokens
        return Verdict(rewards, num_tokens, None, None, done.truncated)


@dataclasses.dataclass(slots=True)
class _Waiting:
    """A question on its way; ``rewards`` by response, as they come."""

    num_tokens: list[int]
    truncated: bool
    rewards: dict[int, float] = dataclasses.field(default_factory=dict)

    @property
    def complete(self) -> bool:
        return len(self.rewards) == len(self.num_tokens)
