"""What benchmarks share: questions with a known better response, answers, official sums."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from gram_jax.data.sources import (
    Prompt,
    Response,
    checked_response,
    require_prompt,
    require_response,
    require_text,
)
from gram_jax.errors import DataError
from gram_jax.evaluation import Floats, win_probability
from gram_jax.ranking import bradley_terry
from gram_jax.scorer import Verdict, judge_probability

Pair: TypeAlias = tuple[int, int]
Record: TypeAlias = dict[str, Any]


class Item(NamedTuple):
    """A prompt with responses of which some are known to be better than others.

    Attributes:
      benchmark: the name of its `Benchmark`.
      subset: "" if the row names none.
      id: the row's own, or its line.
      pairs: places (better, worse) in ``responses``: what is measured.
      file, line: where the row stands.
      fields: where in the row the prompt and each response are, for messages.
      equals: pairs of responses that are equally good. A judge compares them too, where a
        benchmark needs a rating of every response.
    """

    benchmark: str
    subset: str
    id: str
    prompt: Prompt
    responses: tuple[Response, ...]
    pairs: tuple[Pair, ...]
    file: str
    line: int
    fields: tuple[str, ...]
    equals: tuple[Pair, ...] = ()


class Answer(NamedTuple):
    """What a reward model says to an item.

    Attributes:
      margin: [pairs], reward(better) - reward(worse); of a judge the mean over both orders of the
        log-odds that the better one is better. Above zero is right.
      p: [pairs], probability that the better one is better.
      orders: [2, pairs], log-odds that the better one is better, when it is shown first and when it
        is shown second; None unless of a judge.
    """

    item: Item
    verdict: Verdict
    margin: Floats
    p: Floats
    orders: Floats | None

    def ratings(self) -> Floats:
        """A number per response, [n]: its reward, or its Bradley-Terry rating by a judge that
        compared each with each.
        """
        if self.verdict.rewards is not None:
            return self.verdict.rewards
        n = len(self.item.responses)
        first, second = np.array(self.item.pairs + self.item.equals).T
        forward, backward = comparisons_of(self.verdict)
        wins = np.zeros((n, n))
        wins[first, second] = judge_probability(forward, backward)
        wins[second, first] = 1.0 - wins[first, second]
        return bradley_terry(wins)

    def verdicts(self) -> Floats:
        """[2, pairs] as ``orders``; of a model that does not see an order, the margin twice."""
        return np.stack((self.margin, self.margin)) if self.orders is None else self.orders


def comparisons_of(verdict: Verdict) -> tuple[Floats, Floats]:
    """A judge's z_A - z_B with the first of each pair shown first, and with it shown second."""
    assert verdict.forward is not None and verdict.backward is not None
    return verdict.forward, verdict.backward


def answer(item: Item, verdict: Verdict, beta: float) -> Answer:
    """Margins and probabilities of the item's pairs; ``beta`` is log-odds per unit of reward."""
    n = len(item.pairs)
    if verdict.rewards is None:
        forward, backward = (s[:n] for s in comparisons_of(verdict))
        orders = np.stack((forward, -backward))
        return Answer(
            item, verdict, orders.mean(axis=0), judge_probability(forward, backward), orders
        )
    better, worse = np.array(item.pairs).T
    margin = verdict.rewards[better] - verdict.rewards[worse]
    return Answer(item, verdict, margin, win_probability(margin, beta), None)


class Row(NamedTuple):
    """A record and where it stands; its methods check a field.

    Every one of them raises a DataError that names file, line and field.
    """

    record: Record
    file: str
    line: int

    def error(self, field: str, reason: str) -> DataError:
        return DataError(reason, file=self.file, line=self.line, field=field)

    def text(self, field: str, *, allow_empty: bool = False) -> str:
        return require_text(
            self.record, field, file=self.file, line=self.line, allow_empty=allow_empty
        )

    def prompt(self, field: str = "prompt") -> Prompt:
        return require_prompt(self.record, field, file=self.file, line=self.line)

    def response(self, field: str, prompt: Prompt) -> Response:
        return require_response(self.record, field, prompt, file=self.file, line=self.line)

    def responses(
        self, field: str, prompt: Prompt, *, least: int, most: float = math.inf
    ) -> tuple[Response, ...]:
        """A list of ``least`` to ``most`` responses."""
        values = self.record.get(field)
        if not isinstance(values, list) or not least <= len(values) <= most:
            count = f"{least}" if most == least else f"at least {least}"
            raise self.error(field, f"must be a list of {count} response{'s' * (least > 1)}")
        return tuple(
            checked_response(value, f"{field}[{i}]", prompt, file=self.file, line=self.line)
            for i, value in enumerate(values)
        )

    def known(self, field: str, names: Collection[str]) -> str:
        """A text that must be one of ``names``."""
        value = self.text(field)
        if value not in names:
            raise self.error(field, f"{value!r} is none of {', '.join(names)}")
        return value

    def id(self, field: str = "id") -> str:
        value = self.record.get(field)
        return str(self.line) if value is None else str(value)


def places_in(field: str, values: Sequence[Any]) -> list[str]:
    """Names of the places in a list."""
    return [f"{field}[{i}]" for i in range(len(values))]


def words_of_path(file: str) -> list[str]:
    """Words, in small letters, of a file's name and then of its folder's."""
    path = Path(file)
    names = path.name.partition(".")[0], path.parent.name
    return [word for name in names for word in re.split(r"[^a-z]+", name.lower()) if word]


class Sum(NamedTuple):
    """One number of a benchmark; None where what it needs is missing."""

    name: str
    value: float | None
    n: int


class Official(NamedTuple):
    """The numbers that a benchmark publishes.

    Attributes:
      title: of the benchmark.
      sums: its numbers, the headline last.
      missing: subsets without any item; what they enter into is None.
      differs: subsets with another number of items than published, in words.
    """

    title: str
    sums: tuple[Sum, ...]
    missing: tuple[str, ...]
    differs: tuple[str, ...]


class Benchmark(NamedTuple):
    """A family of data with its columns and its sums.

    Attributes:
      name: as in --benchmark.
      title: as people write it.
      columns: what its records have, for messages.
      recognises: whether a record is one of it.
      read: the record as an item.
      official: its sums over all answers; None of plain preferences.
    """

    name: str
    title: str
    columns: str
    recognises: Callable[[Record], bool]
    read: Callable[[Row], Item]
    official: Callable[[Sequence[Answer]], Official] | None


def subsets_of(answers: Sequence[Answer]) -> dict[str, list[Answer]]:
    """Answers by subset, in order of first appearance."""
    found: dict[str, list[Answer]] = {}
    for one in answers:
        found.setdefault(one.item.subset, []).append(one)
    return found


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def mean_of(values: Mapping[str, float], names: Collection[str]) -> float | None:
    """The mean over names, each counted once; None if one is missing."""
    return weighted_mean(values, dict.fromkeys(names, 1.0))


def weighted_mean(values: Mapping[str, float], weights: Mapping[str, float]) -> float | None:
    """sum w v / sum w over the names in ``weights``; None if one is missing."""
    if not weights.keys() <= values.keys():
        return None
    return sum(w * values[name] for name, w in weights.items()) / sum(weights.values())


def missing_and_differing(
    found: Mapping[str, Sequence[Answer]], published: Mapping[str, int]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """`Official.missing` and `Official.differs`, by the published number of items per subset."""
    missing = tuple(name for name in published if name not in found)
    differs = tuple(
        f"{name} {len(found[name]):,} (published {count:,})"
        for name, count in published.items()
        if name in found and len(found[name]) != count
    )
    return missing, differs


def share_right(answers: Sequence[Answer], tie: float) -> float:
    """Share of pairs with a margin above zero; a margin of zero counts ``tie``."""
    margin = np.concatenate([one.margin for one in answers])
    return float(np.where(margin == 0, tie, margin > 0).mean())
