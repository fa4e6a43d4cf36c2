"""Numbers about preference pairs, from margins that have already been computed.

A pair has a margin = reward(chosen) - reward(rejected); it is judged right if the margin is above
zero, and a margin of exactly zero is a tie, which counts one half. Everything here is NumPy over
arrays of length n, one entry a pair; `p` is the probability that the chosen response is better,
sig(beta * margin) for pairwise models.

A summary holds None, never NaN, for what its pairs cannot say (a correlation over equal lengths, a
calibration without probabilities), so that `dataclasses.asdict` of it is valid JSON.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

# The 97.5 % quantile of the standard normal: every interval here is a 95 % one.
Z = 1.959963984540054

# A probability of exactly zero is float32 underflow of a sigmoid, not certainty: it costs 87 nats
# rather than infinity.
SMALLEST_P = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Share of n pairs that are right, ties counted one half; [low, high] is 95 % (Wilson)."""

    value: float
    low: float
    high: float
    n: int
    ties: int


@dataclass(frozen=True, slots=True)
class Reliability:
    """Calibration by bins of confidence.

    Attributes:
      edges: [bins + 1] from 0.5 to 1; a bin holds its lower edge, the last one both.
      confidence: [bins] mean confidence of the pairs in the bin, NaN where it is empty.
      accuracy: [bins] share of them that are right, NaN where it is empty.
      count: [bins] how many pairs there are in the bin.
      ece: expected calibration error, sum of count / n * |accuracy - confidence|.
    """

    edges: Floats
    confidence: Floats
    accuracy: Floats
    count: NDArray[np.int64]
    ece: float


@dataclass(frozen=True, slots=True)
class PairSummary:
    """What n pairs say about a reward model.

    Attributes:
      n: pairs.
      ties: pairs whose margin is exactly zero.
      accuracy: ties counted one half.
      margin_mean, margin_std: of reward(chosen) - reward(rejected); the std divides by n.
      longer_wins: accuracy of preferring the longer response, over the pairs of unequal length;
        None without any.
      shorter_chosen: the model's accuracy where the chosen response is the shorter one; None
        without any.
      length_correlation: Pearson correlation of the margin with chosen length - rejected length;
        None where either does not vary.
      nll, brier, ece: of `p`, the probability that chosen is better; None without it. NLL in nats.
    """

    n: int
    ties: int
    accuracy: Accuracy
    margin_mean: float
    margin_std: float
    longer_wins: Accuracy | None
    shorter_chosen: Accuracy | None
    length_correlation: float | None
    nll: float | None
    brier: float | None
    ece: float | None


@dataclass(frozen=True, slots=True)
class SubsetSummary:
    """Summaries by subset and over all of them.

    Attributes:
      subsets: by label, in order of first appearance.
      micro: over all pairs, each counted once.
      macro: mean of the subsets' accuracies, each subset counted once.
    """

    subsets: dict[str, PairSummary]
    micro: PairSummary
    macro: float


@dataclass(frozen=True, slots=True)
class Gain:
    """Accuracy after less accuracy before on the same n pairs, with its 95 % interval [low, high].

    `improved` and `worsened` count the pairs whose outcome (right, tie, wrong) went up or down.
    """

    value: float
    low: float
    high: float
    n: int
    improved: int
    worsened: int


def win_probability(margin: ArrayLike, beta: float) -> Floats:
    """sig(beta * margin), [n], without overflow for margins of any size."""
    scaled = beta * _finite("margin", margin)
    small = np.exp(-np.abs(scaled))
    return np.where(scaled >= 0, 1.0 / (1.0 + small), small / (1.0 + small))


def accuracy(margin: ArrayLike) -> Accuracy:
    """Accuracy over margin [n]: above zero is right, exactly zero counts one half.

    Raises ValueError if there are no pairs, or a margin is not finite.
    """
    return _accuracy_of_outcomes(_outcomes(_finite("margin", margin)))


def longer_wins(chosen_length: ArrayLike, rejected_length: ArrayLike) -> Accuracy | None:
    """Accuracy of the rule "the longer response is better", the baseline any reward model has to
    beat.

    Pairs of equal length are left out, since the rule says nothing about them; `n` is how many
    remain, and None is returned where none does.
    """
    difference = _length_difference(chosen_length, rejected_length)
    unequal = difference[difference != 0]
    return _accuracy_of_outcomes(_outcomes(unequal)) if unequal.size else None


def reliability(p: ArrayLike, bins: int = 15) -> Reliability:
    """Calibration of p [n], the probability that chosen is better, in equal-width bins of
    confidence.

    The confidence of a pair is max(p, 1 - p), in [0.5, 1]; it is right if p > 0.5, half right at p
    = 0.5. (Guo et al. 2017, "On Calibration of Modern Neural Networks", eq. 3.)
    """
    p_n = _probabilities(p)
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    confidence = np.maximum(p_n, 1.0 - p_n)
    right = _outcomes(p_n - 0.5)
    bin_of = np.minimum(((confidence - 0.5) * 2.0 * bins).astype(np.int64), bins - 1)
    count = np.bincount(bin_of, minlength=bins)
    confidence_sum = np.bincount(bin_of, weights=confidence, minlength=bins)
    right_sum = np.bincount(bin_of, weights=right, minlength=bins)
    divisor = np.where(count > 0, count, np.nan)
    return Reliability(
        edges=np.linspace(0.5, 1.0, bins + 1),
        confidence=confidence_sum / divisor,
        accuracy=right_sum / divisor,
        count=count.astype(np.int64),
        ece=float(np.abs(right_sum - confidence_sum).sum() / p_n.size),
    )


def summarise_pairs(
    margin: ArrayLike,
    chosen_length: ArrayLike,
    rejected_length: ArrayLike,
    p: ArrayLike | None = None,
    *,
    bins: int = 15,
) -> PairSummary:
    """All the numbers of `PairSummary`, from arrays [n].

    Raises ValueError, naming the array and the index, for a value that is NaN or infinite, a
    negative length or a probability outside [0, 1]; and for arrays of different lengths or without
    pairs.
    """
    margin_n = _finite("margin", margin)
    difference = _length_difference(chosen_length, rejected_length)
    _same_length(margin=margin_n, chosen_length=difference)
    overall = accuracy(margin_n)
    shorter = margin_n[difference < 0]
    nll = brier = ece = None
    if p is not None:
        p_n = _probabilities(p)
        _same_length(margin=margin_n, p=p_n)
        nll = float(-np.log(np.maximum(p_n, SMALLEST_P)).mean())
        brier = float(((1.0 - p_n) ** 2).mean())
        ece = reliability(p_n, bins).ece
    return PairSummary(
        n=overall.n,
        ties=overall.ties,
        accuracy=overall,
        margin_mean=float(margin_n.mean()),
        margin_std=float(margin_n.std()),
        longer_wins=longer_wins(chosen_length, rejected_length),
        shorter_chosen=accuracy(shorter) if shorter.size else None,
        length_correlation=_correlation(margin_n, difference),
        nll=nll,
        brier=brier,
        ece=ece,
    )


def by_subset(
    subset: Sequence[object],
    margin: ArrayLike,
    chosen_length: ArrayLike,
    rejected_length: ArrayLike,
    p: ArrayLike | None = None,
    *,
    bins: int = 15,
) -> SubsetSummary:
    """`summarise_pairs` for each label in subset [n] and over all pairs."""
    micro = summarise_pairs(margin, chosen_length, rejected_length, p, bins=bins)
    if len(subset) != micro.n:
        raise ValueError(f"subset has {len(subset)} labels for {micro.n} pairs")
    margin_n, chosen_n, rejected_n = map(np.asarray, (margin, chosen_length, rejected_length))
    p_n = None if p is None else np.asarray(p)
    members: dict[str, list[int]] = {}
    for index, label in enumerate(subset):
        members.setdefault(str(label), []).append(index)
    subsets = {
        label: summarise_pairs(
            margin_n[rows],
            chosen_n[rows],
            rejected_n[rows],
            None if p_n is None else p_n[rows],
            bins=bins,
        )
        for label, rows in members.items()
    }
    macro = sum(summary.accuracy.value for summary in subsets.values()) / len(subsets)
    return SubsetSummary(subsets=subsets, micro=micro, macro=macro)


def gain(before_margin: ArrayLike, after_margin: ArrayLike) -> Gain:
    """Accuracy after less accuracy before, for two models on the same pairs in the same order, [n]
    each.

    The interval is the adjusted Wald interval for paired proportions (Bonett and Price 2012,
    "Adjusted Wald Confidence Interval for a Difference of Binomial Proportions Based on Paired
    Data"): the normal interval of the differences after one pair that improved and one that
    worsened are added. It keeps its coverage where few pairs change, where the plain one shrinks to
    a point. Ties give differences of one half.
    """
    before, after = _finite("before_margin", before_margin), _finite("after_margin", after_margin)
    _same_length(before_margin=before, after_margin=after)
    if not before.size:
        raise ValueError("gain of no pairs")
    difference = _outcomes(after) - _outcomes(before)
    n = difference.size
    centre = float(difference.sum()) / (n + 2)
    variance = (float((difference**2).sum()) + 2.0) / (n + 2) - centre**2
    half_width = Z * math.sqrt(variance / (n + 2))
    return Gain(
        value=float(difference.mean()),
        low=max(-1.0, centre - half_width),
        high=min(1.0, centre + half_width),
        n=n,
        improved=int((difference > 0).sum()),
        worsened=int((difference < 0).sum()),
    )


def wilson_interval(successes: float, n: int) -> tuple[float, float]:
    """The 95 % score interval of successes / n (Wilson 1927); successes may be fractional, half for
    a tie.

    A half vote varies less than a whole one, so with ties the interval is slightly wide, never too
    narrow.
    """
    share = successes / n
    centre = (share + Z**2 / (2 * n)) / (1 + Z**2 / n)
    spread = share * (1 - share) / n + Z**2 / (4 * n**2)
    half_width = Z / (1 + Z**2 / n) * math.sqrt(spread)
    # The exact ends at 0 and n successes are 0 and 1, which rounding would miss.
    low = 0.0 if successes == 0 else centre - half_width
    high = 1.0 if successes == n else centre + half_width
    return low, high


def _accuracy_of_outcomes(outcome: Floats) -> Accuracy:
    """outcome [n] in {0, 0.5, 1} -> Accuracy."""
    if not outcome.size:
        raise ValueError("accuracy of no pairs")
    low, high = wilson_interval(float(outcome.sum()), outcome.size)
    ties = int((outcome == 0.5).sum())
    return Accuracy(value=float(outcome.mean()), low=low, high=high, n=outcome.size, ties=ties)


def _outcomes(margin: Floats) -> Floats:
    """1 for a margin above zero, 0 below, 0.5 at zero, [n]."""
    return 0.5 * (1.0 + np.sign(margin))


def _correlation(x: Floats, y: Floats) -> float | None:
    """Pearson correlation of x and y, [n] each, or None where one of them is constant."""
    if np.all(x == x[0]) or np.all(y == y[0]):
        return None
    # Scaled to at most 1 in size first, so that the squares of tiny or huge margins stay in range.
    x, y = (v / np.abs(v).max() for v in (x - x.mean(), y - y.mean()))
    return float(np.clip((x * y).sum() / math.sqrt((x**2).sum() * (y**2).sum()), -1.0, 1.0))


def _length_difference(chosen_length: ArrayLike, rejected_length: ArrayLike) -> Floats:
    """chosen - rejected length, [n]."""
    chosen, rejected = (
        _finite("chosen_length", chosen_length),
        _finite("rejected_length", rejected_length),
    )
    _same_length(chosen_length=chosen, rejected_length=rejected)
    for name, lengths in (("chosen_length", chosen), ("rejected_length", rejected)):
        _reject(name, lengths, lengths < 0, "a length cannot be negative")
    return chosen - rejected


def _probabilities(p: ArrayLike) -> Floats:
    p_n = _finite("p", p)
    _reject("p", p_n, (p_n < 0) | (p_n > 1), "a probability lies in [0, 1]")
    if not p_n.size:
        raise ValueError("calibration of no pairs")
    return p_n


def _finite(name: str, values: ArrayLike) -> Floats:
    """values as float64 [n]; ValueError names the first index that is NaN or infinite."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1:
        raise ValueError(
            f"{name} must have one dimension, one entry a pair; got shape {array.shape}"
        )
    _reject(name, array, ~np.isfinite(array), "a number has to be finite")
    return array


def _reject(name: str, values: Floats, bad: NDArray[Any], reason: str) -> None:
    """ValueError that names the first index where `bad` holds, and counts the others."""
    if bad.any():
        first, others = int(np.argmax(bad)), int(bad.sum()) - 1
        more = f" (and {others} more)" if others else ""
        raise ValueError(f"{name}[{first}] is {values[first]}{more}: {reason}")


def _same_length(**arrays: Floats) -> None:
    (name_a, a), (name_b, b) = arrays.items()
    if a.size != b.size:
        raise ValueError(
            f"{name_a} has {a.size} entries and {name_b} has {b.size}: one a pair is needed"
        )
