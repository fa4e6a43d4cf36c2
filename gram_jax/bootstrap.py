"""Intervals by resampling prompts: several pairs that share a prompt are not independent.

The clusters, all pairs of one prompt, are drawn with replacement, as many as there are (Efron and
Tibshirani 1993, chapters 8 and 13). Intervals are the 2.5 % and 97.5 % quantiles of what the draws
give; a seed makes them repeatable.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

from gram_jax.evaluation import Floats, wilson_interval

DRAWS = 2000
"""The ends of an interval then vary by about a thirtieth of its width from seed to seed."""

_CELLS = 1 << 22  # counts held at once


class Interval(NamedTuple):
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float


def clustered_mean(
    values: Floats, clusters: Sequence[Hashable], *, seed: int, draws: int = DRAWS
) -> Interval:
    """The mean of values [n] over pairs, each drawn with its cluster.

    Raises ValueError if there are no values, or not one cluster each.
    """
    value = float(np.mean(values)) if len(values) else np.nan
    return _interval(value, resampled_means(values, clusters, seed=seed, draws=draws))


def clustered_accuracy(
    outcomes: Floats, clusters: Sequence[Hashable], *, seed: int, draws: int = DRAWS
) -> Interval:
    """`clustered_mean` of outcomes in [0, 1].

    Where all clusters have the same mean, resampling sees no variation; then the interval is
    Wilson's for as many independent pairs as there are clusters.
    """
    found = clustered_mean(outcomes, clusters, seed=seed, draws=draws)
    if found.low < found.high:
        return found
    n = len(set(clusters))
    low, high = wilson_interval(found.value * n, n)
    return Interval(found.value, min(low, found.value), max(high, found.value))


def macro_mean(
    values: Floats,
    subsets: Sequence[Hashable],
    clusters: Sequence[Hashable],
    *,
    seed: int,
    draws: int = DRAWS,
) -> Interval:
    """The mean over subsets of their means, [n] each; clusters are drawn within each subset."""
    members: dict[Hashable, list[int]] = {}
    for index, subset in enumerate(subsets):
        members.setdefault(subset, []).append(index)
    means, total = [], np.zeros(draws)
    for number, rows in enumerate(members.values()):
        inner = [clusters[i] for i in rows]
        # A seed of its own, so that subsets of one size do not move together.
        total += resampled_means(values[rows], inner, seed=seed, stream=number, draws=draws)
        means.append(float(values[rows].mean()))
    return _interval(sum(means) / len(means), total / len(means))


def resampled_means(
    values: Floats,
    clusters: Sequence[Hashable],
    *,
    seed: int,
    stream: int = 0,
    draws: int = DRAWS,
) -> Floats:
    """The mean of the values in each of the draws, [draws].

    Args:
      values: [n].
      clusters: [n], what each value belongs to.
      seed, stream: name the draws.
    """
    if len(values) != len(clusters) or not len(values):
        raise ValueError(f"{len(values)} values need as many clusters, and at least one")
    numbers: dict[Hashable, int] = {}
    index = np.array([numbers.setdefault(cluster, len(numbers)) for cluster in clusters])
    n = len(numbers)
    sums = np.bincount(index, weights=values, minlength=n)
    sizes = np.bincount(index, minlength=n).astype(np.float64)
    rng = np.random.default_rng([seed, stream])
    found = []
    chance = np.full(n, 1.0 / n)
    for start in range(0, draws, step := max(_CELLS // n, 1)):
        counts = rng.multinomial(n, chance, size=min(step, draws - start)).astype(np.float64)
        found.append((counts @ sums) / (counts @ sizes))
    return np.concatenate(found)


def _interval(value: float, resampled: Floats) -> Interval:
    low, high = np.quantile(resampled, (0.025, 0.975))
    # Rounding may put an end a hair inside the value.
    return Interval(value, min(float(low), value), max(float(high), value))
