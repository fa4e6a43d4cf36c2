"""From checks of trained policies to comparisons at equal KL.

The KL of a policy from its start grows with training, and a reward can look better than another
only because its policy went further. So policies are compared where their KL is the same: a value
at a KL is interpolated linearly, in KL, between the two checks around the place where the run first
reaches it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from experiments.rlhf_results import Run
from gram_jax.evaluation import Floats


class Place(NamedTuple):
    """Where a run reaches a KL: between two checks, ``weight`` of the way to the second."""

    before: int
    after: int
    weight: float

    def of(self, values: ArrayLike) -> Floats:
        """The values [checks, ...] there."""
        v = np.asarray(values, np.float64)
        return np.asarray((1 - self.weight) * v[self.before] + self.weight * v[self.after])


def wins(policy: ArrayLike, start: ArrayLike) -> Floats:
    """How often the policy's sample is better than the start's, [P]; ties count one half.

    Args:
      policy, start: [P, S] and [P, S'], gold of samples; each is compared with each.
    """
    a, b = np.asarray(policy, np.float64), np.asarray(start, np.float64)
    above = (a[:, :, None] > b[:, None, :]) + 0.5 * (a[:, :, None] == b[:, None, :])
    return np.asarray(above.mean(axis=(1, 2)))


def common_kl(runs: Sequence[ArrayLike]) -> float:
    """The largest KL that all runs reach, each given by its KL at each check."""
    return float(min(np.max(np.asarray(kl, np.float64)) for kl in runs))


def place_at(kl: ArrayLike, wanted: float) -> Place:
    """Where a run with this KL at each check first reaches ``wanted``.

    Raises:
      ValueError: it does not.
    """
    k = np.asarray(kl, np.float64)
    reached = np.flatnonzero(k >= wanted)
    if not reached.size:
        raise ValueError(f"a KL of {wanted} is not reached; the largest is {k.max()}")
    after = int(reached[0])
    if after == 0:
        return Place(0, 0, 0.0)
    weight = (wanted - k[after - 1]) / (k[after] - k[after - 1])
    return Place(after - 1, after, float(weight))


def kl_of(run: Run) -> Floats:
    """Of the policy from its start at each check, [checks], nats."""
    return np.array([np.mean(check.kl) for check in run.checks])


def gold_gains(run: Run) -> Floats:
    """Of mean gold over the start at each check, [checks]."""
    means = np.array([np.mean(check.gold) for check in run.checks])
    return np.asarray(means - means[0])


def equal_gains(run: Run) -> Floats:
    """Of mean chrF at equal length over the start at each check, [checks]."""
    means = np.array([np.mean(check.equal) for check in run.checks])
    return np.asarray(means - means[0])


def proxy_gains(run: Run) -> Floats:
    """Of the reward trained on over the start, [checks], in standard deviations of the start's.

    The deviation is that among samples of one prompt, which is all that GRPO sees.
    """
    start = np.array(run.checks[0].proxy)
    deviation = float(np.sqrt(start.var(axis=1, ddof=1).mean()))
    means = np.array([np.mean(check.proxy) for check in run.checks])
    return np.asarray((means - means[0]) / max(deviation, 1e-9))
