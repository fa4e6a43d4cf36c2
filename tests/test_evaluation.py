"""Numbers about pairs: values worked out by hand or published, and properties of any pairs."""

import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gram_jax.evaluation import (
    accuracy,
    by_subset,
    gain,
    longer_wins,
    reliability,
    summarise_pairs,
    wilson_interval,
    win_probability,
)

margins = st.lists(
    st.one_of(st.just(0.0), st.floats(-1e6, 1e6, allow_nan=False)), min_size=1, max_size=40
)


def test_a_tie_counts_one_half():
    result = accuracy([1.0, -1.0, 0.0, 2.0])
    assert (result.value, result.n, result.ties) == (0.625, 4, 1)


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [
        # Newcombe 1998, table I (method 3, the score interval without continuity correction).
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (20, 20, 0.8389, 1.0),
    ],
)
def test_the_wilson_interval_is_the_published_one(right, n, low, high):
    assert wilson_interval(right, n) == pytest.approx((low, high), abs=5e-5)


@given(margins)
def test_the_interval_holds_the_accuracy_within_zero_and_one(margin):
    result = accuracy(margin)
    assert 0.0 <= result.low <= result.value <= result.high <= 1.0


@given(margins)
def test_swapping_chosen_and_rejected_mirrors_the_accuracy(margin):
    straight, swapped = accuracy(margin), accuracy([-m for m in margin])
    assert straight.value + swapped.value == pytest.approx(1.0)
    assert straight.low + swapped.high == pytest.approx(1.0)


def test_longer_wins_leaves_equal_lengths_out():
    result = longer_wins([5, 3, 7, 4], [2, 9, 7, 1])
    assert result is not None
    assert (result.value, result.n, result.ties) == (pytest.approx(2 / 3), 3, 0)
    assert longer_wins([3, 4], [3, 4]) is None


def test_win_probability_is_the_sigmoid_of_the_scaled_margin_at_any_size():
    with np.errstate(all="raise", under="ignore"):
        p = win_probability([0.0, 1.0, -1.0, 1e9, -1e9], beta=2.0)
    s = 1 / (1 + math.exp(-2.0))
    assert p == pytest.approx([0.5, s, 1 - s, 1.0, 0.0])


def test_reliability_of_three_pairs_worked_out_by_hand():
    # Two bins, [.5, .75) and [.75, 1]. Confidences .6 (right), .7 (wrong: p = .3), .9 (right).
    # Bin 1: mean confidence .65, accuracy .5, gap .15; bin 2: .9, 1, gap .1.
    # ECE = 2/3 .15 + 1/3 .1.
    result = reliability([0.6, 0.3, 0.9], bins=2)
    assert result.count.tolist() == [2, 1]
    assert result.confidence == pytest.approx([0.65, 0.9])
    assert result.accuracy == pytest.approx([0.5, 1.0])
    assert result.ece == pytest.approx(2 / 3 * 0.15 + 1 / 3 * 0.1)


def test_reliability_counts_an_even_chance_as_half_right_and_leaves_empty_bins_nan():
    result = reliability([0.5, 0.5])
    assert result.count.tolist() == [2] + [0] * 14
    assert (result.confidence[0], result.accuracy[0], result.ece) == (0.5, 0.5, 0.0)
    assert np.isnan(result.accuracy[1:]).all()
    assert np.isnan(result.confidence[1:]).all()


@given(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=60), st.integers(1, 20))
def test_reliability_places_every_pair_in_one_bin(p, bins):
    result = reliability(p, bins)
    assert result.count.sum() == len(p)
    assert 0.0 <= result.ece <= 1.0
    filled = result.count > 0
    assert (result.confidence[filled] >= result.edges[:-1][filled] - 1e-12).all()
    assert (result.confidence[filled] <= result.edges[1:][filled] + 1e-12).all()


def test_calibrated_probabilities_have_a_small_error_and_overconfident_ones_a_large_one():
    rng = np.random.default_rng(0)
    truth = rng.uniform(0, 1, 40_000)
    # A pair is shown with the better response first only with probability p.
    p = np.where(rng.uniform(size=truth.size) < truth, truth, 1 - truth)
    assert reliability(p).ece < 0.02
    assert reliability(np.where(p > 0.5, 0.999, 0.001)).ece > 0.2


def test_a_summary_worked_out_by_hand():
    summary = summarise_pairs(
        margin=[2.0, -1.0, 0.0, 1.0],
        chosen_length=[10, 4, 5, 6],
        rejected_length=[5, 8, 5, 9],
        p=[0.8, 0.4, 0.5, 0.7],
    )
    assert (summary.n, summary.ties, summary.accuracy.value) == (4, 1, 0.625)
    assert summary.margin_mean == 0.5
    assert summary.margin_std == pytest.approx(math.sqrt(1.25))
    assert summary.longer_wins is not None
    assert summary.shorter_chosen is not None
    assert (summary.longer_wins.value, summary.longer_wins.n) == (pytest.approx(1 / 3), 3)
    # Chosen is shorter in the second pair (wrong) and in the fourth (right).
    assert (summary.shorter_chosen.value, summary.shorter_chosen.n) == (0.5, 2)
    # Length differences 5, -4, 0, -3 about their mean -0.5, margins about 0.5.
    assert summary.length_correlation == pytest.approx(12 / math.sqrt(5 * 49))
    assert summary.nll == pytest.approx(-math.log(0.8 * 0.4 * 0.5 * 0.7) / 4)
    assert summary.brier == pytest.approx((0.04 + 0.36 + 0.25 + 0.09) / 4)
    assert summary.ece is not None


def test_what_the_pairs_cannot_say_is_none_and_the_summary_is_valid_json():
    summary = summarise_pairs([1.0, 1.0], [3, 3], [3, 3])
    assert summary.longer_wins is None
    assert summary.shorter_chosen is None
    assert summary.length_correlation is None
    assert summary.nll is summary.brier is summary.ece is None
    assert json.loads(json.dumps(dataclasses.asdict(summary), allow_nan=False))["n"] == 2


def test_a_probability_that_underflowed_leaves_the_nll_finite():
    nll = summarise_pairs([-1.0], [1], [1], p=[0.0]).nll
    assert nll == pytest.approx(87.3, abs=0.1)


def test_the_correlation_is_exact_for_margins_of_any_size():
    for scale in (1e-200, 1.0, 1e100):
        summary = summarise_pairs([1 * scale, 2 * scale, 3 * scale], [1, 2, 3], [0, 0, 0])
        assert summary.length_correlation == pytest.approx(1.0)


def test_micro_counts_pairs_and_macro_counts_subsets():
    result = by_subset(["b", "b", "b", "a"], [1.0, 1.0, 1.0, -1.0], [1] * 4, [2] * 4, [0.9] * 4)
    assert list(result.subsets) == ["b", "a"]
    assert result.subsets["b"].accuracy.value == 1.0
    assert result.subsets["a"].n == 1
    assert (result.micro.accuracy.value, result.macro) == (0.75, 0.5)


def test_gain_is_the_difference_of_the_accuracies():
    # Ten pairs: four improve, one worsens. Bonett and Price: p12 = 5/12, p21 = 2/12.
    before = np.array([-1, -1, -1, -1, 1, 1, 1, 1, 1, -1.0])
    after = np.array([1, 1, 1, 1, -1, 1, 1, 1, 1, -1.0])
    result = gain(before, after)
    assert (result.value, result.n, result.improved, result.worsened) == (0.3, 10, 4, 1)
    half = 1.959964 * math.sqrt((5 / 12 + 2 / 12 - (3 / 12) ** 2) / 12)
    assert (result.low, result.high) == pytest.approx((3 / 12 - half, 3 / 12 + half), abs=1e-6)


@given(st.data())
def test_the_gain_of_any_two_models_lies_in_its_interval(data):
    before = data.draw(margins)
    after = data.draw(st.lists(st.floats(-5, 5), min_size=len(before), max_size=len(before)))
    result = gain(before, after)
    assert result.value == pytest.approx(accuracy(after).value - accuracy(before).value)
    assert -1.0 <= result.low <= result.value + 1e-12
    assert result.value - 1e-12 <= result.high <= 1.0
    assert gain(before, before).value == 0.0


def test_the_gain_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(1)
    truth, trials, covered = 0.08, 1500, 0
    for _ in range(trials):
        change = rng.choice([1.0, -1.0, 0.0], p=[0.10, 0.02, 0.88], size=80)
        result = gain(np.where(change > 0, -1.0, 1.0), np.where(change < 0, -1.0, 1.0))
        covered += result.low <= truth <= result.high
    assert 0.93 <= covered / trials <= 0.99


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_an_error_that_names_its_index(bad):
    with pytest.raises(ValueError, match=r"margin\[2\] is -?(nan|inf)"):
        summarise_pairs([1.0, 2.0, bad], [1] * 3, [1] * 3)
    with pytest.raises(ValueError, match=r"p\[0\] is -?(nan|inf)"):
        reliability([bad, 0.5])
    with pytest.raises(ValueError, match=r"after_margin\[1\]"):
        gain([1.0, 1.0], [1.0, bad])


def test_impossible_input_is_an_error_that_says_what_is_wrong():
    with pytest.raises(ValueError, match=r"p\[1\] is 1.5 \(and 1 more\): a probability"):
        reliability([0.5, 1.5, -2.0])
    with pytest.raises(ValueError, match=r"rejected_length\[0\] is -1"):
        longer_wins([1], [-1])
    with pytest.raises(ValueError, match="margin has 2 entries and chosen_length has 3"):
        summarise_pairs([1.0, 2.0], [1] * 3, [1] * 3)
    with pytest.raises(ValueError, match="subset has 1 labels for 2 pairs"):
        by_subset(["a"], [1.0, 2.0], [1, 1], [1, 1])
    with pytest.raises(ValueError, match=r"one dimension.*\(1, 2\)"):
        accuracy([[1.0, 2.0]])
    with pytest.raises(ValueError, match="no pairs"):
        accuracy([])
