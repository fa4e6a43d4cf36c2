"""What both orders say about a judge, worked out by hand."""

import numpy as np
import pytest

from gram_jax.judging import summarise_judge


def sig(x):
    return 1 / (1 + np.exp(-x))


def test_a_summary_worked_out_by_hand():
    # Log-odds for the better one, shown first and shown second.
    first, second = [2.0, 1.0, -1.0, 0.0], [1.0, -1.0, -3.0, 1.0]
    found = summarise_judge([first, second])
    # The same verdict: pairs 1 and 3. Pair 2 cancels out.
    assert (found.consistency, found.undecided) == (0.5, 0.25)
    # p(A) is p(better) where it is first, and p(worse) where it is second.
    assert found.mean_first == pytest.approx(
        (sum(sig(s) for s in first) + sum(sig(-s) for s in second)) / 8
    )
    # The first is preferred in 2 of 4 verdicts with one for neither, then in 2 of 4.
    assert found.first_wins == pytest.approx((2.5 + 2) / 8)
    assert found.accuracy_first == pytest.approx(2.5 / 4)
    assert found.accuracy_second == pytest.approx(2 / 4)


def test_a_judge_that_does_not_care_for_position_has_a_mean_of_one_half():
    rng = np.random.default_rng(0)
    right = rng.normal(size=50)
    found = summarise_judge([right, right])
    assert found.consistency == 1.0
    assert found.mean_first == pytest.approx(0.5)
    assert found.first_wins == pytest.approx(0.5)
    always_first = summarise_judge([np.full(5, 9.0), np.full(5, -9.0)])
    assert (always_first.consistency, always_first.first_wins) == (0.0, 1.0)
    assert always_first.undecided == 1.0
