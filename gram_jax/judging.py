"""What both orders of its pairs say about a judge: is it consistent, and what does it favour."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from gram_jax.evaluation import accuracy, win_probability


@dataclass(frozen=True, slots=True)
class JudgeSummary:
    """Of n pairs, each judged in both orders.

    Attributes:
      consistency: share of pairs with the same verdict in both orders.
      mean_first: mean over pairs and orders of p(the response shown first is better), p(A); 0.5
        for a judge that does not care for position.
      first_wins: share of all verdicts that prefer the response shown first, 0.5 for no verdict.
      undecided: share of pairs whose orders cancel out exactly.
      accuracy_first, accuracy_second: accuracy of the verdicts where the better response is shown
        first, and where it is shown second; ties count one half.
    """

    consistency: float
    mean_first: float
    first_wins: float
    undecided: float
    accuracy_first: float
    accuracy_second: float


def summarise_judge(orders: ArrayLike) -> JudgeSummary:
    """The numbers of `JudgeSummary`.

    Args:
      orders: [2, n], log-odds that the better response is better, when it is shown first and when
        it is shown second.
    """
    first, second = np.asarray(orders, dtype=np.float64)
    shown_first = np.stack((first, -second))
    return JudgeSummary(
        consistency=float((np.sign(first) == np.sign(second)).mean()),
        mean_first=float(np.mean([win_probability(s, 1.0).mean() for s in shown_first])),
        first_wins=float((0.5 * (1.0 + np.sign(shown_first))).mean()),
        undecided=float((first + second == 0).mean()),
        accuracy_first=accuracy(first).value,
        accuracy_second=accuracy(second).value,
    )
