"""Questions in, answers out, for many callers: tokenised in threads, computed in batches."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import numpy as np

from gram_jax.encoding import Encoded
from gram_jax.ranking import NOT_FINITE
from gram_jax.scorer import Question, QuestionError, Scorer, Verdict, verdict
from gram_jax.scoring import FloatArray
from gram_jax.serving.batching import Batcher, Work

_T = TypeVar("_T")
_ENCODED_AT_ONCE = 16
"""Questions of a request that are tokenised before another request has its turn."""


class NotFiniteError(QuestionError):
    """The question is good; the model gives no number. Which response is to blame is not known."""


class Answer(NamedTuple):
    """A verdict, and what it was read from.

    Attributes:
      sums: log-prob of each response of a likelihood; None of others.
      token_logprobs: of each response of a likelihood, float32 [num_tokens]; None of others.
    """

    verdict: Verdict
    encoded: Encoded
    sums: list[float] | None
    token_logprobs: list[FloatArray] | None


class Engine:
    """A reward model that answers many callers.

    Attributes:
      scorer: the reward model.
      batcher: the thread that computes.
    """

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer
        self.batcher = Batcher(scorer)
        # Tokenisers let other threads run; templates do not.
        threads = max(1, min(4, (os.cpu_count() or 1) // 2))
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="tokenise")

    async def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """One answer per question, in order.

        When the caller is cancelled, what is not on the device by then is never computed.

        Raises:
          QuestionError: the first question that has no answer.
          Exception: whatever ended the device thread.
        """
        encoded: list[Encoded] = []
        while len(encoded) < len(questions):  # others have their turn in between
            first = len(encoded)
            some = questions[first : first + _ENCODED_AT_ONCE]
            encoded += await self.aside(self._encode, some, first)
        return await self.compute(encoded)

    async def compute(self, encoded: Sequence[Encoded]) -> list[Answer]:
        """`ask` for what is encoded already."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()

        def done(error: BaseException | None) -> None:
            loop.call_soon_threadsafe(_settle, future, error)

        work = Work(encoded, self.scorer.shapes[-1], done)
        if work.missing:
            self.batcher.add(work)
            try:
                await future
            except asyncio.CancelledError:
                self.batcher.drop(work)
                raise
        return [self._answer(work, number) for number in range(len(encoded))]

    async def aside(self, function: Callable[..., _T], *arguments: object) -> _T:
        """``function(*arguments)`` in another thread."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, function, *arguments)

    def _encode(self, questions: Sequence[Question], first: int) -> list[Encoded]:
        return [self.scorer.encode(question, k) for k, question in enumerate(questions, first)]

    def _answer(self, work: Work, number: int) -> Answer:
        encoded = work.encoded[number]
        scores = work.scores(number)
        numbers = [score.score for score in scores]
        found = verdict(self.scorer.settings, encoded, numbers)
        if not np.all(np.isfinite(numbers)):
            raise NotFiniteError(number, NOT_FINITE)
        if self.scorer.kind != "likelihood":
            return Answer(found, encoded, None, None)
        tokens = [s.token_logprobs for s in scores if s.token_logprobs is not None]
        return Answer(found, encoded, numbers, tokens)


def _settle(future: asyncio.Future[None], error: BaseException | None) -> None:
    if future.done():  # cancelled meanwhile
        return
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(DeviceError(repr(error)))


class DeviceError(Exception):
    """The thread that computes has ended, and with it the server."""
