"""The reward as a function of a batch of completions, as TRL and Tunix call it.

    from gram_jax.clients import reward_function

    trainer = trl.GRPOTrainer(..., reward_funcs=reward_function("runs/finetune"))
    trainer = trl.GRPOTrainer(..., reward_funcs=reward_function("http://localhost:8000"))

A likelihood and a head give each completion its reward. A judge compares: with the row's
``reference``, where the data have that column, else the completions to one prompt with each other.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from gram_jax.checkpoints import load_model
from gram_jax.clients.server import Server
from gram_jax.config import ComputeConfig
from gram_jax.data.formats import kind
from gram_jax.data.sources import Prompt, Response
from gram_jax.errors import UserError
from gram_jax.ranking import rank
from gram_jax.reward_model import check_reading, stored_settings
from gram_jax.scorer import Question, QuestionError, Scorer


class Rewards(Protocol):
    """What gives rewards: a model in this process, or a server.

    Attributes:
      kind: ``likelihood``, ``judge`` or ``head``.
    """

    @property
    def kind(self) -> str: ...
    def rewards(
        self, questions: Sequence[Question], references: Sequence[Response] | None
    ) -> list[list[float]]:
        """Of each question's responses: as `rank` by its default method, or by ``reference``.

        Raises:
          QuestionError: a question cannot be answered.
        """
        ...


def reward_function(
    source: str | Path,
    *,
    api_key: str | None = None,
    timeout: float = 180.0,
    dtype: str = "auto",
    **settings: Any,
) -> RewardFunction:
    """The reward of a CHECKPOINT folder, computed here, or of a server.

    Args:
      source: a folder, or the address of a `gram_jax.serve`, as in ``http://localhost:8000``.
      api_key: of the server, if it wants one.
      timeout: seconds that one call to a server may take, waiting for it to have room included.
      dtype: of matrix products here: ``auto``, ``float32`` or ``bfloat16``.
      settings: fields of `RewardSettings` that are to differ from what the CHECKPOINT says, as in
        ``too_long="truncate"``. A server has its own.

    Raises:
      UserError: there is no checkpoint or no server, or it cannot do what is asked.
    """
    if str(source).startswith(("http://", "https://")):
        if settings or dtype != "auto":
            names = ", ".join([*settings, *(["dtype"] if dtype != "auto" else [])])
            raise UserError(f"{names}: {source} is a server, which has settings of its own")
        return RewardFunction(Server(str(source), api_key=api_key, timeout=timeout))
    return RewardFunction(_Here(source, dtype, settings))


class RewardFunction:
    """Callable as ``f(prompts, completions, completion_ids, **columns) -> list[float | None]``.

    Attributes:
      kind: ``likelihood``, ``judge`` or ``head``.
    """

    def __init__(self, rewards: Rewards) -> None:
        self._rewards = rewards
        self.kind = rewards.kind
        self.__name__ = f"gram_jax_{rewards.kind}"  # trainers log it

    def __call__(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[Response],
        completion_ids: Any = None,
        **columns: Any,
    ) -> list[float | None]:
        """A reward for each completion; higher is better, among completions to one prompt.

        A completion that is blank is no answer: it gets the lowest reward that the others to its
        prompt got, and None where there are no others.

        Args:
          prompts: [n], text or chat messages; equal ones make a group.
          completions: [n], text, or a list with one assistant message where prompts are messages.
          completion_ids: not read; the reward model has a tokenizer of its own.
          columns: others of the data. A judge reads ``reference``: [n], a response to compare with.

        Raises:
          UserError: a completion cannot be scored, or a judge has nothing to compare it with.
        """
        if len(prompts) != len(completions):
            raise UserError(
                f"{len(prompts)} prompts and {len(completions)} completions: one prompt is needed"
                " for each completion"
            )
        references = columns.get("reference") if self.kind == "judge" else None
        groups = _groups(prompts, completions, references)
        if self.kind == "judge" and references is None:
            _check_company(groups)
        answered = [group for group in groups if group.places]
        questions = [
            Question(group.prompt, [completions[place] for place in group.places])
            for group in answered
        ]
        compared = None if references is None else [group.reference for group in answered]
        try:
            rewards = self._rewards.rewards(questions, compared)
        except QuestionError as error:
            raise UserError(_message(error, answered)) from None
        found: list[float | None] = [None] * len(completions)
        for group, values in zip(answered, rewards, strict=True):
            for place, value in zip(group.places, values, strict=True):
                found[place] = value
            for place in group.blank:
                found[place] = min(values)
        return found


class _Here:
    """A model in this process."""

    def __init__(self, checkpoint: str | Path, dtype: str, changes: dict[str, Any]) -> None:
        stored = stored_settings(checkpoint)
        known = {field.name for field in dataclasses.fields(stored)}
        if unknown := sorted(set(changes) - known):
            raise UserError(
                f"{', '.join(unknown)}: no such setting; there are {', '.join(sorted(known))}"
            )
        settings = dataclasses.replace(stored, **changes)
        check_reading(checkpoint, stored.reading, settings.reading)
        self._scorer = Scorer(load_model(checkpoint, ComputeConfig(dtype=dtype)), settings)
        self.kind = self._scorer.kind

    def rewards(
        self, questions: Sequence[Question], references: Sequence[Response] | None
    ) -> list[list[float]]:
        method = "" if references is None else "reference"
        ranked = rank(self._scorer, questions, method, references=references)
        # Only `keep_best` leaves responses without a reward.
        return [[float(r) for r in each.ranking.rewards if r is not None] for each in ranked]


class _Group(NamedTuple):
    """Completions to one prompt, and against one reference where there are references.

    Attributes:
      places: of the completions that say something.
      blank: places of the others.
    """

    prompt: Prompt
    reference: Response
    places: list[int]
    blank: list[int]


def _groups(
    prompts: Sequence[Prompt],
    completions: Sequence[Response],
    references: Sequence[Response] | None,
) -> list[_Group]:
    if references is not None and len(references) != len(prompts):
        raise UserError(f"{len(references)} references for {len(prompts)} prompts")
    groups: dict[str, _Group] = {}
    for place, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        _check_response(completion, f"completions[{place}]")
        reference = "" if references is None else references[place]
        if references is not None:
            if reference is not None:  # as columns have it where there is none
                _check_response(reference, f"reference[{place}]")
            if reference is None or _is_blank(reference):
                raise UserError(
                    f"reference[{place}]: is empty, and a judge compares the completion with it"
                )
        try:
            key = json.dumps([prompt, reference], sort_keys=True)
        except TypeError as error:
            raise UserError(f"prompts[{place}]: is neither text nor messages ({error})") from None
        group = groups.setdefault(key, _Group(prompt, reference, [], []))
        (group.blank if _is_blank(completion) else group.places).append(place)
    return list(groups.values())


def _check_response(value: Any, field: str) -> None:
    is_messages = isinstance(value, list) and all(isinstance(part, dict) for part in value)
    if not isinstance(value, str) and not is_messages:
        raise UserError(
            f"{field}: must be text or a list with one assistant message, not {kind(value)}"
        )


def _is_blank(completion: Response) -> bool:
    if isinstance(completion, str):
        return not completion.strip()
    if len(completion) != 1 or completion[0].get("tool_calls"):
        return False
    content = completion[0].get("content")
    return content is None or (isinstance(content, str) and not content.strip())


def _check_company(groups: Sequence[_Group]) -> None:
    for group in groups:
        places = [*group.places, *group.blank]
        if len(places) == 1:
            raise UserError(
                f"completions[{places[0]}]: is the only one to its prompt in this call, and a judge"
                " compares; give the data a column `reference`, or let each process have all"
                " completions to a prompt (docs/clients.md)"
            )


def _message(error: QuestionError, groups: Sequence[_Group]) -> str:
    group = groups[error.question]
    if error.field == "response" and error.index < len(group.places):
        return f"completions[{group.places[error.index]}]: {error.reason}"
    field = "reference" if error.field in ("response", "reference") else "prompts"
    return f"{field}[{group.places[0]}]: {error.reason}"
