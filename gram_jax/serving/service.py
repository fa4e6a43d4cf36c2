"""What all routes share: the engine, the limits, and questions whose faults are named by field."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import gram_jax
from gram_jax.data.sources import Response
from gram_jax.encoding import Encoded
from gram_jax.scorer import Question, QuestionError
from gram_jax.serving.engine import Answer, Engine, NotFiniteError
from gram_jax.serving.errors import RequestError
from gram_jax.serving.limits import Admission, Limits


class Asked(NamedTuple):
    """A question, and where in the request its parts stand.

    Attributes:
      fields: of each response.
      prompt_field: of the prompt.
    """

    question: Question
    fields: Sequence[str]
    prompt_field: str = "prompt"

    def fault(self, error: QuestionError) -> RequestError:
        """What is wrong with this question, as it is told to the client."""
        if isinstance(error, NotFiniteError):
            return RequestError("not_finite", error.reason, field=self._whole())
        field = {"prompt": self.prompt_field, "": None}.get(error.field)
        if error.field == "response":
            field = self.fields[error.index]
        return RequestError("invalid", error.reason, field=field)

    def _whole(self) -> str | None:
        """The field that holds all responses; None where that is the request."""
        first, *others = self.fields
        item, dot, _ = first.partition(".")
        if dot or not others:
            return item
        name, bracket, _ = first.partition("[")
        return name if bracket else None


class Service:
    """A reward model as its routes see it.

    Attributes:
      engine, limits, admission: see their classes.
      name: of the checkpoint, the last part of its path.
      unsplit: texts that came without a prompt of their own.
    """

    def __init__(self, engine: Engine, limits: Limits, checkpoint: str) -> None:
        self.engine, self.limits = engine, limits
        self.admission = Admission(limits)
        self.name = Path(checkpoint).resolve().name
        self.unsplit = 0

    @property
    def kind(self) -> str:
        """One of `gram_jax.scorer.READINGS`."""
        return self.engine.scorer.kind

    @property
    def beta(self) -> float:
        """Log-odds per unit of a difference of rewards."""
        return self.engine.scorer.beta

    def state(self) -> str:
        """What `/ready` says: ``starting``, ``ready``, ``stopping`` or ``failed``."""
        if self.engine.batcher.failure is not None:
            return "failed"
        if self.admission.stopping:
            return "stopping"
        return "ready" if self.engine.batcher.ready else "starting"

    def seconds_waiting(self) -> float:
        """In how many seconds what waits will be done, about."""
        return self.engine.batcher.seconds_waiting()

    def model(self) -> dict[str, Any]:
        """What `/gram/v1/model` says."""
        scorer = self.engine.scorer
        return {
            "checkpoint": self.name,
            "reading": self.kind,
            "average": scorer.settings.average,
            "beta": self.beta,
            "max_length": scorer.settings.max_length,
            "dtype": scorer.identity()["dtype"],
            "version": gram_jax.__version__,
            "limits": {
                "body_bytes": self.limits.body_bytes,
                "candidates": self.limits.candidates,
                "items": self.limits.items,
            },
        }

    def encode(self, asked: Asked) -> Encoded:
        """What the model reads for a question.

        Raises:
          RequestError: names the field of the fault.
        """
        try:
            return self.engine.scorer.encode(asked.question)
        except QuestionError as error:
            raise asked.fault(error) from None

    async def compute(self, encoded: Sequence[Encoded], fields: Sequence[str]) -> list[Answer]:
        """One answer for each of what is encoded, which stands in the request at ``fields``.

        Raises:
          RequestError: the model has no finite score.
        """
        try:
            return await self.engine.compute(encoded)
        except QuestionError as error:
            field = fields[error.question]
            raise RequestError("not_finite", error.reason, field=field) from None

    async def ask(self, asked: Sequence[Asked]) -> list[Answer]:
        """One answer per question.

        Raises:
          RequestError: names the field of the first fault.
        """
        try:
            return await self.engine.ask([one.question for one in asked])
        except QuestionError as error:
            raise asked[error.question].fault(error) from None

    def token_texts(self, answer: Answer) -> list[list[dict[str, Any]]]:
        """Each response's tokens with their log-probs; takes a while for long ones."""
        assert answer.token_logprobs is not None
        tokenizer = self.engine.scorer.encoder.tokenizer
        special = set(tokenizer.special_ids)
        found = []
        responses = [ids.tolist() for _, ids in answer.encoded.sequences]
        for ids, logprobs in zip(responses, answer.token_logprobs, strict=True):
            pieces = tokenizer.pieces(ids)
            found.append(
                [
                    {"text": text, "logprob": number(logprob)}
                    | ({"special": True} if token in special else {})
                    for token, text, logprob in zip(ids, pieces, logprobs, strict=True)
                ]
            )
        return found


def number(value: float) -> float:
    """The decimal with the fewest digits that is the same float32, as files of scores have it."""
    return float(str(np.float32(value)))


def responses_at(responses: Sequence[Response], field: str) -> list[str]:
    """Names of the places of a list's responses."""
    return [f"{field}[{i}]" for i in range(len(responses))]
