"""Intervals by resampling: close to what theory says, wider where pairs share a prompt."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gram_jax.bootstrap import clustered_accuracy, clustered_mean, macro_mean, resampled_means
from gram_jax.evaluation import wilson_interval

outcomes = st.lists(
    st.tuples(st.sampled_from([0.0, 0.5, 1.0]), st.integers(0, 5)), min_size=1, max_size=30
)


def test_pairs_of_their_own_prompts_have_the_interval_of_independent_pairs():
    rng = np.random.default_rng(0)
    right = (rng.uniform(size=800) < 0.7).astype(float)
    found = clustered_accuracy(right, range(800), seed=1)
    assert (found.low, found.high) == pytest.approx(wilson_interval(right.sum(), 800), abs=0.004)


def test_repeating_each_pair_does_not_narrow_the_interval():
    rng = np.random.default_rng(0)
    right = (rng.uniform(size=200) < 0.7).astype(float)
    alone = clustered_mean(right, range(200), seed=1)
    nine = clustered_mean(np.repeat(right, 9), np.repeat(np.arange(200), 9).tolist(), seed=1)
    assert nine == pytest.approx(alone)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(3)
    covered, trials, prompts = 0, 300, 60
    clusters = np.repeat(np.arange(prompts), 4).tolist()
    for trial in range(trials):
        # Four pairs of a prompt are all easy or all hard: 0.9 or 0.5, 0.7 in the mean.
        p = np.repeat(rng.choice([0.5, 0.9], prompts), 4)
        found = clustered_mean(
            (rng.uniform(size=p.size) < p) * 1.0, clusters, seed=trial, draws=400
        )
        covered += found.low <= 0.7 <= found.high
    assert 0.91 <= covered / trials <= 0.98


@settings(max_examples=50)
@given(outcomes, st.integers(0, 3))
def test_the_value_is_the_mean_and_lies_in_the_interval(pairs, seed):
    values, clusters = np.array([v for v, _ in pairs]), [c for _, c in pairs]
    found = clustered_accuracy(values, clusters, seed=seed, draws=100)
    assert found.value == pytest.approx(values.mean())
    assert 0.0 <= found.low <= found.value <= found.high <= 1.0
    assert found == clustered_accuracy(values, clusters, seed=seed, draws=100)


def test_prompts_that_all_agree_leave_the_interval_of_so_many_independent_pairs():
    # Ten prompts with two pairs each, all right: not certainty, but Wilson's 10 of 10.
    found = clustered_accuracy(np.ones(20), [i // 2 for i in range(20)], seed=0)
    assert found.value == 1.0
    assert (found.low, found.high) == pytest.approx(wilson_interval(10, 10))


def test_seeds_name_draws():
    values, clusters = np.arange(10.0), list(range(10))
    first = resampled_means(values, clusters, seed=0)
    assert (resampled_means(values, clusters, seed=0) == first).all()
    assert (resampled_means(values, clusters, seed=1) != first).any()
    assert (resampled_means(values, clusters, seed=0, stream=1) != first).any()


def test_cutting_the_draws_into_blocks_keeps_their_number(monkeypatch):
    monkeypatch.setattr("gram_jax.bootstrap._CELLS", 70)
    found = resampled_means(np.ones(10), list(range(10)), seed=0, draws=100)
    assert found.tolist() == [1.0] * 100


def test_the_macro_mean_counts_each_subset_once():
    # 90 pairs that are all right, 10 of which half are: (1 + 0.5) / 2.
    values = np.array([1.0] * 90 + [1.0, 0.0] * 5)
    subsets = ["a"] * 90 + ["b"] * 10
    found = macro_mean(values, subsets, list(range(100)), seed=0)
    assert found.value == 0.75
    # Only b varies: half of the standard error of 5 of 10, 1.96 x 0.158 / 2.
    assert found.high - found.low == pytest.approx(2 * 1.96 * np.sqrt(0.025) / 2, rel=0.15)


def test_values_need_clusters():
    with pytest.raises(ValueError, match="2 values need as many clusters"):
        resampled_means(np.ones(2), ["a"], seed=0)
    with pytest.raises(ValueError, match="at least one"):
        clustered_mean(np.array([]), [], seed=0)
