"""Best of N, computed from one larger set of samples, without drawing any.

Of n samples of a prompt, N are drawn without replacement and the one with the highest reward is
kept. The i-th lowest of the n (i = 1 .. n) is the one that is kept in C(i-1, N-1) of the C(n, N)
draws, so the expected gold of the kept one is

  sum over i of gold_(i) C(i-1, N-1) / C(n, N),

which is an unbiased estimate of what best of N gives for fresh samples. Samples of equal reward
share their mean gold, as if a coin decided.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from gram_jax.evaluation import Floats


def best_of_n(reward: ArrayLike, gold: ArrayLike, sizes: Sequence[int]) -> Floats:
    """Expected gold of the best of N by reward, for each N in ``sizes``; [len(sizes)].

    Args:
      reward, gold: [n], of the samples of one prompt.
      sizes: from 1 to n.

    Raises:
      ValueError: the arrays differ in length, or a size is out of range.
    """
    r, g = np.asarray(reward, np.float64), np.asarray(gold, np.float64)
    if r.ndim != 1 or r.shape != g.shape or not r.size:
        raise ValueError(f"reward {r.shape} and gold {g.shape} must be [n], one number a sample")
    if not all(1 <= size <= r.size for size in sizes):
        raise ValueError(f"sizes {list(sizes)} must be from 1 to {r.size}")
    order = np.argsort(r, kind="stable")
    _, group = np.unique(r[order], return_inverse=True)
    of_group = np.bincount(group, weights=g[order]) / np.bincount(group)
    shared = of_group[group]
    found = []
    for size in sizes:
        # Integers of any length until the one division: no rounding of huge binomials.
        draws = math.comb(r.size, size)
        chance = [math.comb(i, size - 1) / draws for i in range(r.size)]
        found.append(float(np.dot(chance, shared)))
    return np.array(found)


def best_of_n_kl(size: int) -> float:
    """log N - (N - 1) / N nats: the most that best of N differs from a single sample in KL."""
    return math.log(size) - (size - 1) / size


def rank_correlation(reward: ArrayLike, gold: ArrayLike) -> float | None:
    """Spearman's correlation over the samples of a prompt; None where one of them is constant."""
    a, b = (_ranks(np.asarray(values, np.float64)) for values in (reward, gold))
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return float(np.corrcoef(a, b)[0, 1])


def partial_correlation(ab: float, ac: float, bc: float) -> float | None:
    """Of a and b where c is held fixed, from the three correlations; None where c decides one."""
    rest = (1 - ac**2) * (1 - bc**2)
    return (ab - ac * bc) / math.sqrt(rest) if rest > 1e-9 else None


def _ranks(values: Floats) -> Floats:
    """Ranks from 0, equal values sharing the mean of theirs."""
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return ((last - counts + last - 1) / 2)[group]
