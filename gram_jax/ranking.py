"""Best of N, full rankings and rewards, from scores or from pairwise comparisons.

A likelihood or a head gives every response a number of its own, and responses are sorted by it
(``scalar``). A judge only compares, so it takes a plan of which responses to compare:

  reference    each with one reference response; the reward is p(it beats the reference)
  keep_best    the best so far with the next one; finds the best, not the order of the others
  round_robin  each with each; the reward is a Bradley-Terry rating

A plan for n responses is a generator: it yields the pairs (i, j) that it wants compared, is sent
p(i is better than j) of each, and returns a `Ranking`. Plans know nothing of models, and `rank`
nothing of plans: it takes all questions through their rounds together, so that the scorer gets as
many comparisons at once as there are.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gram_jax.data.sources import Response
from gram_jax.errors import UserError
from gram_jax.evaluation import win_probability
from gram_jax.scorer import Question, QuestionError, Verdict, judge_probability

Floats: TypeAlias = NDArray[np.float64]
Pair: TypeAlias = tuple[int, int]

PAIRWISE = ("reference", "keep_best", "round_robin")
METHODS = ("scalar", *PAIRWISE)

PRIOR = 1e-3
"""Ties that `bradley_terry` adds between each two responses. Of two responses, one that wins with
p = 1 is then rated 7.6 above the other, one that wins with p = 0.95 by 2.935 instead of 2.944."""

_TIE = 1e-6
"""Differences of p and of ratings that float32 scores and the solver do not resolve."""

NOT_FINITE = (
    "the model gives a score that is not finite; its weights may be damaged, or too large for the"
    " compute dtype"
)
"""Why such a question has no answer."""


class Ranking(NamedTuple):
    """What is known of n responses.

    Attributes:
      rewards: [n], higher is better, to be compared within the question only; None for a response
        that `keep_best` did not rate.
      order: places of the responses, best first, equal rewards in order of input; (best,) of
        `keep_best`.
      comparisons: how many were made.
    """

    rewards: tuple[float | None, ...]
    order: tuple[int, ...]
    comparisons: int

    @property
    def best(self) -> int:
        return self.order[0]


class Ranked(NamedTuple):
    """A `Ranking`, and what was seen on the way.

    Attributes:
      num_tokens: [n], of each response; 0 of a single one that nothing had to be asked about.
      truncated: something was cut to fit.
    """

    ranking: Ranking
    num_tokens: tuple[int, ...]
    truncated: bool


class Comparer(Protocol):
    """A reward model, as `gram_jax.scorer.Scorer` is one.

    Attributes:
      kind: ``likelihood``, ``judge`` or ``head``.
      beta: turns differences of rewards into log-odds.
    """

    @property
    def kind(self) -> str: ...
    @property
    def beta(self) -> float: ...
    def score(self, questions: Iterable[Question]) -> Iterator[Verdict]:
        """One verdict per question, in order."""
        ...


Plan: TypeAlias = Generator[Sequence[Pair], Floats, Ranking]


def bradley_terry(wins: ArrayLike, prior: float = PRIOR) -> Floats:
    """Ratings r [n] in log-odds, sum 0, with p(i beats j) = sig(r_i - r_j) (Bradley, Terry 1952).

    They minimise - sum over i != j of (wins_ij + prior / 2) log sig(r_i - r_j), which is convex and
    has one minimum, whatever the wins are: maximum likelihood, with a few ties added.

    Args:
      wins: [n, n], how often i beat j; fractions count (a comparison that i wins with p is p for i
        and 1 - p for j), zeros stand where two were not compared. The diagonal is not read.
      prior: ties added between each two; positive.

    Raises:
      ValueError: wins is not square, or holds a number that is negative or not finite.
    """
    # Takes a while to import, and only strengths need it.
    from scipy.optimize import minimize
    from scipy.special import expit

    w = np.array(wins, dtype=np.float64)
    if w.ndim != 2 or w.shape[0] != w.shape[1] or not w.size:
        raise ValueError(f"wins must be [n, n], one row a response; got shape {w.shape}")
    np.fill_diagonal(w, 0.0)
    if not np.all(np.isfinite(w)) or w.min() < 0:
        raise ValueError("wins must be finite and not negative")
    if not prior > 0:
        raise ValueError(f"prior must be positive, got {prior}: without it a winner of all is inf")
    w += prior / 2 * (1 - np.eye(len(w)))
    games = w + w.T

    # (sum r)^2 / 2 is added to all three: it fixes the sum and changes no difference.
    def loss(r: Floats) -> float:
        return float((w * np.logaddexp(0.0, r[None, :] - r[:, None])).sum() + r.sum() ** 2 / 2)

    def gradient(r: Floats) -> Floats:
        expected = games * expit(r[:, None] - r[None, :])
        return (expected - w).sum(axis=1) + r.sum()

    def hessian(r: Floats) -> Floats:
        p = expit(r[:, None] - r[None, :])
        curvature = games * p * p.T
        return np.diag(curvature.sum(axis=1)) - curvature + 1.0

    found = minimize(
        loss, np.zeros(len(w)), jac=gradient, hess=hessian, method="trust-exact",
        options={"gtol": 1e-6 * prior},
    )  # fmt: skip
    # At the bottom the loss no longer changes in float64, which the trust region takes for failure;
    # Newton's step looks at the gradient only.
    r = found.x - np.linalg.solve(hessian(found.x), gradient(found.x))
    return r - r.mean()


def by_reward(rewards: Sequence[float], comparisons: int = 0) -> Ranking:
    """Rewards [n], sorted; ``comparisons`` is what they cost."""
    order = sorted(range(len(rewards)), key=lambda i: -rewards[i])
    return Ranking(tuple(map(float, rewards)), tuple(order), comparisons)


def against_reference(n: int, reference: int) -> Plan:
    """The reward is p(a response beats the reference one), 0.5 for the reference itself."""
    others = [i for i in range(n) if i != reference]
    rewards = np.full(n, 0.5)
    if others:
        rewards[others] = yield [(i, reference) for i in others]
    return by_reward(rewards.tolist(), len(others))


def keep_best(n: int) -> Plan:
    """The best so far meets the next one, n - 1 times; in a tie the earlier one stays.

    The reward is p(a response beats the best), 0.5 for the best itself, and None for those that
    never met it: they lost to another one.
    """
    best = 0
    rewards = {best: 0.5}
    for challenger in range(1, n):
        p = float((yield [(best, challenger)])[0])
        if p < 0.5 - _TIE:
            rewards = {best: p, challenger: 0.5}
            best = challenger
        else:
            rewards[challenger] = min(1 - p, 0.5)
    return Ranking(tuple(rewards.get(i) for i in range(n)), (best,), n - 1)


def round_robin(n: int) -> Plan:
    """Each meets each; the reward is the Bradley-Terry rating, in log-odds, of sum 0."""
    pairs = [(i, j) for i in range(n) for j in range(i + 1, n)]
    wins = np.zeros((n, n))
    if pairs:
        first, second = np.array(pairs).T
        p = yield pairs
        wins[first, second], wins[second, first] = p, 1 - p
    ratings = np.round(bradley_terry(wins), 6) + 0.0  # -0.0 would be written as such
    return by_reward(ratings.tolist(), len(pairs))


def comparisons(method: str, n: int, *, reference_is_one: bool = False) -> int:
    """What a method costs for n responses; ``reference_is_one`` of them, or another response."""
    return {
        "scalar": 0,
        "reference": n - reference_is_one,
        "keep_best": n - 1,
        "round_robin": n * (n - 1) // 2,
    }[method]


def check_method(method: str, kind: str) -> str:
    """The method to use with a kind of reward; "" is the one that rates and orders all responses.

    Raises:
      UserError: the kind cannot do it, or there is a better way.
    """
    if method and method not in METHODS:
        raise UserError(f"method={method!r} must be one of {', '.join(METHODS)}")
    if kind == "judge":
        if method == "scalar":
            raise UserError(
                f"method=scalar: a judge compares and has no reward for a single response; use one"
                f" of {', '.join(PAIRWISE)}"
            )
        return method or "round_robin"
    if method in ("keep_best", "round_robin"):
        raise UserError(
            f"method={method}: a {kind} gives every response a reward without comparing; use scalar"
        )
    return method or "scalar"


def rank(
    scorer: Comparer,
    questions: Sequence[Question],
    method: str = "",
    *,
    references: Sequence[Response | int] | None = None,
    done: Callable[[int], None] | None = None,
) -> list[Ranked]:
    """Ranks the responses of each question.

    Args:
      scorer: the reward model.
      questions: prompts with at least one response each; their ``pairs`` are not read. Those of a
        call go through their rounds together: the more, the fuller the batches.
      method: one of `METHODS`; "" is ``round_robin`` for a judge, else ``scalar``.
      references: for ``reference``, one per question: the place of one of the responses, or another
        response to the same prompt, which is compared with and not rated.
      done: is told after each answer how many comparisons it was, or responses where the reward
        needs none.

    Raises:
      UserError: the method does not go with the kind of reward.
      QuestionError: a question cannot be answered, or its answer is not finite. Its field may also
        be ``reference``.
    """
    method = check_method(method, scorer.kind)
    if method == "scalar":
        return [_by_score(k, v, done) for k, v in enumerate(scorer.score(questions))]
    if method == "reference":
        if references is None or len(references) != len(questions):
            raise ValueError("method 'reference' takes one reference per question")
        contests = [_Contest.reference(*each) for each in zip(questions, references, strict=True)]
    else:
        plan = keep_best if method == "keep_best" else round_robin
        contests = [_Contest(q, plan(len(q.responses))) for q in questions]
    while open_ := [(k, contest) for k, contest in enumerate(contests) if contest.pairs]:
        verdicts = scorer.score([contest.question() for _, contest in open_])
        try:
            for place, ((_, contest), verdict) in enumerate(zip(open_, verdicts, strict=True)):
                made = contest.hear(verdict, scorer.beta, place)
                if done is not None:
                    done(made)
        except QuestionError as error:
            raise open_[error.question][1].error(open_[error.question][0], error) from None
    return [contest.ranked() for contest in contests]


class _Contest:
    """A question on its way through a plan.

    Attributes:
      pairs: the comparisons that the plan waits for; empty at its end.
    """

    def __init__(self, question: Question, plan: Plan, rated: int | None = None) -> None:
        self._question, self._plan = question, plan
        self._rated = len(question.responses) if rated is None else rated
        self._num_tokens = [0] * len(question.responses)
        self._truncated = False
        self._result: Ranking | None = None
        self.pairs: Sequence[Pair] = ()
        self._advance(None)

    @classmethod
    def reference(cls, question: Question, reference: Response | int) -> _Contest:
        n = len(question.responses)
        if not isinstance(reference, int):
            question = question._replace(responses=[*question.responses, reference])
            return cls(question, against_reference(n + 1, n), rated=n)
        if not 0 <= reference < n:
            raise ValueError(f"reference {reference} is not one of {n} responses")
        return cls(question, against_reference(n, reference))

    def question(self) -> Question:
        """What the plan asks now, with the responses that it asks about."""
        place = {i: at for at, i in enumerate(self._asked())}
        responses = [self._question.responses[i] for i in place]
        return Question(
            self._question.prompt, responses, [(place[i], place[j]) for i, j in self.pairs]
        )

    def hear(self, verdict: Verdict, beta: float, number: int) -> int:
        """Passes the answer on to the plan; returns how many comparisons it was."""
        asked, made = self._asked(), len(self.pairs)
        for at, i in enumerate(asked):
            self._num_tokens[i] = int(verdict.num_tokens[at])
        self._truncated |= verdict.truncated
        if not all(map(_finite, (verdict.rewards, verdict.forward, verdict.backward))):
            raise QuestionError(number, NOT_FINITE)
        if verdict.rewards is None:
            assert verdict.forward is not None and verdict.backward is not None
            p = judge_probability(verdict.forward, verdict.backward)
        else:
            place = {i: at for at, i in enumerate(asked)}
            first, second = ([place[pair[side]] for pair in self.pairs] for side in (0, 1))
            p = win_probability(verdict.rewards[first] - verdict.rewards[second], beta)
        self._advance(p)
        return made

    def error(self, number: int, error: QuestionError) -> QuestionError:
        """The error in what was asked now, as one in the whole question."""
        field, place = error.field, 0
        if field == "response":
            place = self._asked()[error.index]
            field = "response" if place < self._rated else "reference"
        return QuestionError(number, error.reason, field, place)

    def ranked(self) -> Ranked:
        assert self._result is not None
        found = self._result
        if self._rated < len(found.rewards):  # all but the last one, the reference
            order = tuple(i for i in found.order if i < self._rated)
            found = found._replace(rewards=found.rewards[: self._rated], order=order)
        return Ranked(found, tuple(self._num_tokens[: self._rated]), self._truncated)

    def _asked(self) -> list[int]:
        return sorted({i for pair in self.pairs for i in pair})

    def _advance(self, p: Floats | None) -> None:
        try:
            self.pairs = next(self._plan) if p is None else self._plan.send(p)
        except StopIteration as end:
            self.pairs, self._result = (), end.value


def _by_score(number: int, verdict: Verdict, done: Callable[[int], None] | None) -> Ranked:
    assert verdict.rewards is not None
    if not _finite(verdict.rewards):
        raise QuestionError(number, NOT_FINITE)
    if done is not None:
        done(len(verdict.rewards))
    tokens = tuple(map(int, verdict.num_tokens))
    return Ranked(by_reward(verdict.rewards.tolist()), tokens, verdict.truncated)


def _finite(scores: Floats | None) -> bool:
    return scores is None or bool(np.all(np.isfinite(scores)))
