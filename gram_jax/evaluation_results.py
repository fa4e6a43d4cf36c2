"""The numbers of an evaluation: per subset and over all, official sums, and a row per pair."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gram_jax.benchmarks import BENCHMARKS, Answer, Official
from gram_jax.bootstrap import Interval, clustered_accuracy, macro_mean
from gram_jax.evaluation import Floats, PairSummary, Reliability, reliability, summarise_pairs
from gram_jax.evaluation_input import EvaluationInput
from gram_jax.judging import JudgeSummary, summarise_judge
from gram_jax.scoring_state import short

ALL = "(all)"
"""Over the pairs of all subsets."""

OUTCOMES = {1.0: "right", 0.5: "tie", 0.0: "wrong"}


@dataclasses.dataclass(frozen=True, slots=True)
class PairTable:
    """Pairs side by side, n of them in the order of the items.

    Attributes:
      subset, prompt: [n] what the pair is reported under; a name for its prompt.
      margin, p: [n] see `gram_jax.benchmarks.Answer`.
      chosen_length, rejected_length: [n] tokens.
      orders: [2, n], of a judge; else None.
    """

    subset: NDArray[np.str_]
    prompt: NDArray[np.str_]
    margin: Floats
    p: Floats
    chosen_length: NDArray[np.int64]
    rejected_length: NDArray[np.int64]
    orders: Floats | None

    def outcome(self) -> Floats:
        """1 right, 0.5 tie, 0 wrong, [n]."""
        return 0.5 * (1.0 + np.sign(self.margin))

    def of(self, subset: str) -> PairTable:
        """The pairs of one subset, or of all."""
        if subset == ALL:
            return self
        where = self.subset == subset
        return PairTable(
            subset=self.subset[where],
            prompt=self.prompt[where],
            margin=self.margin[where],
            p=self.p[where],
            chosen_length=self.chosen_length[where],
            rejected_length=self.rejected_length[where],
            orders=None if self.orders is None else self.orders[:, where],
        )


@dataclasses.dataclass(frozen=True, slots=True)
class RewardSummary:
    """Of the rewards of n responses; the std divides by n."""

    n: int
    mean: float
    std: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True, slots=True)
class SubsetResult:
    """What is said of a subset.

    Attributes:
      prompts: how many different ones there are.
      pairs: the numbers of its pairs.
      interval: of the accuracy: ``wilson``, or ``bootstrap`` where pairs share prompts.
      rewards: over its responses; None of a judge.
      judge: None unless of a judge.
    """

    prompts: int
    pairs: PairSummary
    interval: str
    rewards: RewardSummary | None
    judge: JudgeSummary | None


@dataclasses.dataclass(frozen=True, slots=True)
class Results:
    """All numbers that follow from the answers.

    Attributes:
      subsets: by name, in order of first appearance, `ALL` last.
      macro: mean of the subsets' accuracies; None of a single one.
      official: of each benchmark that has sums.
      reliability: over all pairs.
    """

    subsets: dict[str, SubsetResult]
    macro: Interval | None
    official: list[Official]
    reliability: Reliability


@dataclasses.dataclass(frozen=True, slots=True)
class Facts:
    """What was done.

    Attributes:
      checkpoint, kind, beta: of the reward model.
      settings: all that decides its numbers.
      items, responses, pairs: counts.
      ties: pairs whose margin is exactly zero.
      truncated: items of which something was cut to fit.
      repeated, identical, contrary: see `EvaluationInput`.
      sequences: that the model had to read; a judge reads two per comparison.
      tokens: computed, padding left out; a prompt counts once for all that share it.
      padding: share of the computed places that held no token; None where that is not known.
      seconds: of answering, compilation left out.
      compile_seconds: of compiling, or of loading what was compiled before.
      seed: of the bootstrap.
    """

    checkpoint: str
    kind: str
    beta: float
    settings: dict[str, Any]
    items: int
    responses: int
    pairs: int
    ties: int
    truncated: int
    repeated: int
    identical: int
    contrary: int
    sequences: int
    tokens: int
    padding: float | None
    seconds: float
    compile_seconds: float
    seed: int


def table_of(given: EvaluationInput, answers: Sequence[Answer]) -> PairTable:
    """The pairs of all items."""
    counts = [len(item.pairs) for item in given.items]
    chosen, rejected = [], []
    for one in answers:
        better, worse = np.array(one.item.pairs).T
        chosen.append(one.verdict.num_tokens[better])
        rejected.append(one.verdict.num_tokens[worse])
    orders = [one.orders for one in answers if one.orders is not None]
    return PairTable(
        subset=np.repeat(given.subsets, counts),
        prompt=np.repeat([str(item.prompt) for item in given.items], counts),
        margin=np.concatenate([one.margin for one in answers]),
        p=np.concatenate([one.p for one in answers]),
        chosen_length=np.concatenate(chosen),
        rejected_length=np.concatenate(rejected),
        orders=np.concatenate(orders, axis=1) if orders else None,
    )


def results_of(
    given: EvaluationInput, answers: Sequence[Answer], table: PairTable, *, seed: int
) -> Results:
    """All numbers; ``seed`` is of the bootstrap."""
    names = list(dict.fromkeys(given.subsets))
    subsets = {
        name: _subset_result(table.of(name), _rewards(given, answers, name), seed)
        for name in (*names, ALL)
    }
    macro = None
    if len(names) > 1:
        macro = macro_mean(table.outcome(), table.subset.tolist(), table.prompt.tolist(), seed=seed)
    official = []
    for benchmark in BENCHMARKS.values():
        those = [one for one in answers if one.item.benchmark == benchmark.name]
        if those and benchmark.official:
            official.append(benchmark.official(those))
    return Results(subsets, macro, official, reliability(table.p))


def _subset_result(table: PairTable, rewards: RewardSummary | None, seed: int) -> SubsetResult:
    pairs = summarise_pairs(table.margin, table.chosen_length, table.rejected_length, table.p)
    prompts = len(set(table.prompt.tolist()))
    interval = "wilson"
    if prompts < pairs.n:
        interval = "bootstrap"
        found = clustered_accuracy(table.outcome(), table.prompt.tolist(), seed=seed)
        accuracy = dataclasses.replace(pairs.accuracy, low=found.low, high=found.high)
        pairs = dataclasses.replace(pairs, accuracy=accuracy)
    judge = None if table.orders is None else summarise_judge(table.orders)
    return SubsetResult(prompts, pairs, interval, rewards, judge)


def _rewards(
    given: EvaluationInput, answers: Sequence[Answer], subset: str
) -> RewardSummary | None:
    found = [
        one.verdict.rewards
        for one, name in zip(answers, given.subsets, strict=True)
        if one.verdict.rewards is not None and subset in (name, ALL)
    ]
    if not found:
        return None
    r = np.concatenate(found)
    return RewardSummary(len(r), float(r.mean()), float(r.std()), float(r.min()), float(r.max()))


def result_rows(given: EvaluationInput, answers: Sequence[Answer]) -> Iterator[dict[str, Any]]:
    """The rows of results.jsonl, one per pair, in order."""
    for number, one in enumerate(answers):
        item = one.item
        for k, (better, worse) in enumerate(item.pairs):
            row: dict[str, Any] = {
                "id": item.id,
                "file": item.file,
                "line": item.line,
                "benchmark": item.benchmark,
                "subset": given.subsets[number],
                "pair": given.keys[number][k],
                "prompt": item.prompt,
                "better": better,
                "worse": worse,
            }
            if one.orders is None:
                assert one.verdict.rewards is not None
                row["rewards"] = [short(one.verdict.rewards[i]) for i in (better, worse)]
            else:
                row["log_odds"] = [short(s) for s in one.orders[:, k]]
            row |= {
                "margin": float(one.margin[k]),
                "p": short(one.p[k]),
                "outcome": OUTCOMES[0.5 * (1.0 + np.sign(one.margin[k]))],
                "num_tokens": [int(one.verdict.num_tokens[i]) for i in (better, worse)],
                "truncated": one.verdict.truncated,
            }
            yield row
