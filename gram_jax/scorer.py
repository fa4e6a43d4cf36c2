"""A reward model ready for use: questions in, verdicts out, packed and batched together.

One engine for all that compares responses. A question is a prompt with responses; a likelihood and
a head give each response a number, a judge compares two at a time, in both orders.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jax.sharding import Mesh
from numpy.typing import NDArray

from gram_jax.config import ModelConfig
from gram_jax.data.judge import JudgeTemplate, label_ids
from gram_jax.data.prompts import ExampleError
from gram_jax.data.sources import Prompt, Response
from gram_jax.data.tokenizer import Tokenizer
from gram_jax.encoding import BlockBuilder, Encoded, Encoder
from gram_jax.errors import UserError
from gram_jax.evaluation import win_probability
from gram_jax.mesh import check_divides, row_parts, row_shards
from gram_jax.models.decoder import Decoder, compute_dtype
from gram_jax.packing import PackCounts
from gram_jax.readouts import Readout
from gram_jax.scoring import EngineCounts, RowBatch, Running, batch_shapes, score_batches

READINGS = ("likelihood", "judge", "head")
"""What a reward can be."""

# Where attention costs only what a row's sequences see of each other, longer rows are fuller ones.
_ROW_LENGTH = {"cpu": 8192}
_ROW_LENGTH_ACCELERATOR = 2048
# Tokens of a batch per device: enough to keep it busy, few enough for its memory.
_BATCH_TOKENS = {"cpu": 8192}
_BATCH_TOKENS_ACCELERATOR = 16384
_WINDOW_BATCHES = 128
"""Batches of the questions that are packed together; the last one is partly padding."""
_WINDOW_QUESTIONS = 8192


def default_batch_rows(row_length: int, shards: int, platform: str) -> int:
    """Rows computed at once on this many devices that rows are split over."""
    tokens = _BATCH_TOKENS.get(platform, _BATCH_TOKENS_ACCELERATOR)
    return max(tokens // row_length, 1) * shards


class Loaded(Protocol):
    """What a checkpoint gives: the model, its tokenizer, and a name for the numbers they make."""

    @property
    def model(self) -> Decoder: ...
    @property
    def tokenizer(self) -> Tokenizer: ...
    @property
    def fingerprint(self) -> str: ...


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
      num_tokens: int [n], of each response; its end token included, unless of a judge.
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
    """A question that cannot be answered.

    Attributes:
      question: its place in what was asked.
      reason: what is wrong.
      field: ``prompt`` or ``response``; "" where neither is to blame.
      index: which response.
    """

    def __init__(self, question: int, reason: str, field: str = "", index: int = 0) -> None:
        self.question, self.reason, self.field, self.index = question, reason, field, index
        super().__init__(reason)


def judge_probability(
    forward: NDArray[np.float64], backward: NDArray[np.float64]
) -> NDArray[np.float64]:
    """p(i is better than j), the mean over both orders of the probability of i's label.

    p = (sig(s_ij) + sig(-s_ji)) / 2, where s is z_A - z_B of the order; p_ij + p_ji = 1. The
    softmax is over the two labels within an order, never over the two orders.
    """
    return 0.5 * (win_probability(forward, 1.0) + win_probability(-backward, 1.0))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RewardSettings:
    """How a reward is read. 0 = chosen from the model and the device.

    Attributes:
      reading: one of `READINGS`.
      average: a likelihood is the log-prob of a response (sum), or that over its tokens (mean).
      beta: log-odds per unit of reward; a judge's is 1.
      row_length: tokens of a row, in which short sequences lie side by side.
      max_length: most tokens of a sequence: a prompt and one response, or a judge prompt.
      too_long: ``error`` stops at a longer one, ``truncate`` cuts it and says so.
      batch_rows: rows computed at once.
      add_eos: the end token is part of a response.
      template: the judge's.
    """

    reading: str = "likelihood"
    average: str = "sum"
    beta: float = 1.0
    row_length: int = 0
    max_length: int = 0
    too_long: str = "error"
    batch_rows: int = 0
    add_eos: bool = True
    template: JudgeTemplate | None = None

    def resolved(
        self, model: ModelConfig, tokenizer: Tokenizer, mesh: Mesh | None
    ) -> RewardSettings:
        """The same settings with every 0 replaced.

        Raises:
          UserError: a setting that this model, or another setting, does not allow.
        """
        for name, choices in (
            ("reading", READINGS),
            ("average", ("sum", "mean")),
            ("too_long", ("error", "truncate")),
        ):
            if getattr(self, name) not in choices:
                value = getattr(self, name)
                raise UserError(f"{name}={value!r} must be one of {', '.join(choices)}")
        if not self.beta > 0:
            raise UserError(f"beta={self.beta} must be positive")
        longest = model.max_position
        row_length = self.row_length
        if not row_length:
            usual = _ROW_LENGTH.get(jax.default_backend(), _ROW_LENGTH_ACCELERATOR)
            row_length = max(usual, self.max_length)
            row_length += -row_length % row_parts(mesh)
        max_length = self.max_length or min(row_length, longest)
        if not len(tokenizer.prefix_ids) + 2 <= max_length <= min(row_length, longest):
            raise UserError(
                f"max_length={max_length} must be at least {len(tokenizer.prefix_ids) + 2}, and at"
                f" most row_length={row_length} and the model's {longest} positions"
            )
        shards = row_shards(mesh)
        batch_rows = self.batch_rows or default_batch_rows(
            row_length, shards, jax.default_backend()
        )
        if batch_rows < 1:
            raise UserError(f"batch_rows={batch_rows} must be positive")
        if mesh is not None:
            check_divides(mesh, model, batch_rows, row_length)
        template = self.template
        if self.reading == "judge" and template is None:
            template = JudgeTemplate.load()
        return dataclasses.replace(
            self,
            row_length=row_length,
            max_length=max_length,
            batch_rows=batch_rows,
            template=template,
        )


class Scorer:
    """A reward model that answers questions.

    Attributes:
      settings: how rewards are read, with nothing left to choose.
      encoder, shapes, readout: what the settings mean for this model; shapes of batches, the usual
        one last.
      packed, engine: filled with what is computed.
    """

    def __init__(self, loaded: Loaded, settings: RewardSettings, mesh: Mesh | None = None):
        """Raises UserError if the settings do not go with the model."""
        self._model, self._mesh, tokenizer = loaded.model, mesh, loaded.tokenizer
        self._fingerprint = loaded.fingerprint
        self.settings = s = settings.resolved(loaded.model.config, tokenizer, mesh)
        if s.reading == "head" and not hasattr(loaded.model, "head"):
            raise UserError(
                "this model has no reward head; --reward=head is for models of bradley_terry and"
                " sequence classifiers"
            )
        if s.reading == "likelihood":
            loaded.model.unembedding_vd()  # a classifier says that it has none
        labels = None
        if s.reading == "judge":
            assert s.template is not None
            labels = label_ids(s.template, tokenizer)
        self.encoder = Encoder(
            tokenizer=tokenizer,
            reading=s.reading,
            max_length=s.max_length,
            too_long=s.too_long,
            add_eos=s.add_eos,
            template=s.template,
        )
        self.shapes = batch_shapes(s.row_length, s.batch_rows, s.reading, mesh)
        self.readout = Readout(s.reading, self.shapes[-1].row.sequences, labels)
        self.packed, self.engine = PackCounts(), EngineCounts()

    @property
    def kind(self) -> str:
        """One of `READINGS`."""
        return self.settings.reading

    @property
    def vocab_size(self) -> int:
        """Token ids are below it."""
        return self._model.config.vocab_size

    @property
    def beta(self) -> float:
        """Log-odds per unit of a difference of rewards."""
        return 1.0 if self.kind == "judge" else self.settings.beta

    def identity(self) -> dict[str, Any]:
        """All that decides numbers beyond rounding, as plain values."""
        s = self.settings
        return {
            "checkpoint": self._fingerprint,
            "tokenizer": self.encoder.tokenizer.fingerprint(),
            "dtype": str(np.dtype(compute_dtype(self._model.compute))),
            "reward": s.reading,
            "average": s.average,
            "max_length": s.max_length,
            "too_long": s.too_long,
            "add_eos": s.add_eos,
            **({"template": s.template.fingerprint()} if s.template else {}),
        }

    def run(self, batches: Iterable[RowBatch], *, per_token: bool = False) -> Iterator[Any]:
        """`score_batches` of this model."""
        return score_batches(
            self._model,
            batches,
            readout=self.readout,
            mesh=self._mesh,
            per_token=per_token,
            counts=self.engine,
        )

    def score(self, questions: Iterable[Question]) -> Iterator[Verdict]:
        """One verdict per question, in order; questions are read as they are needed.

        Raises:
          QuestionError: the tokenizer cannot do with a question, or it is too long.
        """
        waiting: collections.deque[_Window] = collections.deque()

        def batches() -> Iterator[RowBatch]:
            for window in self._windows(questions):
                waiting.append(window)
                yield from window.running.batches

        for scores in self.run(batches()):
            while not waiting[0].running.missing:  # it has nothing to compute
                yield from self._finish(waiting.popleft())
            waiting[0].running.add(scores)
            if not waiting[0].running.missing:
                yield from self._finish(waiting.popleft())
        while waiting:
            yield from self._finish(waiting.popleft())

    def _finish(self, window: _Window) -> Iterator[Verdict]:
        self.packed.add(window.running.packed)
        yield from window.verdicts(self.settings)

    def _windows(self, questions: Iterable[Question]) -> Iterator[_Window]:
        tokens = _WINDOW_BATCHES * self.shapes[-1].places
        builder, asked, first = BlockBuilder(), list[_Asked](), True
        for number, question in enumerate(questions):
            encoded = self.encode(question, number)
            asked.append(_Asked(question, encoded, builder.add(encoded.sequences)))
            if builder.placed >= tokens or len(asked) >= _WINDOW_QUESTIONS:
                yield _Window(asked, Running(builder.examples(), self.shapes, first=first))
                builder, asked, first = BlockBuilder(), [], False
        if asked:
            yield _Window(asked, Running(builder.examples(), self.shapes, first=first))

    def encode(self, question: Question, number: int = 0) -> Encoded:
        """What the model reads to answer a question; ``number`` is its place, for the error.

        Raises:
          QuestionError: the tokenizer cannot do with it, or it is too long.
        """
        try:
            return self.encoder.encode(*question)
        except ExampleError as error:
            raise QuestionError(number, error.reason, error.field, error.index) from None
        except UserError as error:
            raise QuestionError(number, str(error)) from None


class _Asked(NamedTuple):
    """A question, what is read for it, and where the scores come from."""

    question: Question
    encoded: Encoded
    places: list[tuple[int, int]]


class _Window(NamedTuple):
    """Questions that are packed together."""

    asked: list[_Asked]
    running: Running

    def verdicts(self, settings: RewardSettings) -> Iterator[Verdict]:
        for _, encoded, places in self.asked:
            yield verdict(settings, encoded, [self.running[place].score for place in places])


def verdict(
    settings: RewardSettings, encoded: Encoded, sequence_scores: Sequence[float]
) -> Verdict:
    """The answer to a question, from the scores of its sequences in their order."""
    scores = np.array(sequence_scores, np.float64)
    num_tokens = np.array(encoded.num_tokens, np.int64)
    truncated = bool(encoded.cut)
    if settings.reading == "judge":
        return Verdict(None, num_tokens, scores[::2], scores[1::2], truncated)
    if settings.reading == "likelihood" and settings.average == "mean":
        scores = scores / num_tokens
    return Verdict(scores, num_tokens, None, None, truncated)
