"""The losses are their equations: values, slopes, minima, and what must not matter."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch

from gram_jax.config import ObjectiveConfig
from gram_jax.logprobs import next_token_sums
from gram_jax.objectives import (
    best_difference,
    objective,
    pairwise_loss,
    preference_loss,
    smoothed,
    smoothing_floor,
)
from gram_jax.packing import pack
from gram_jax.readouts import Read, Readout, SequenceScores, TokenLogprobs, likelihood
from gram_jax.rows import Batch, RowShape, stack_rows

EPSILONS = [0.0, 0.05, 0.1, 0.3]
GRID = np.linspace(-30, 30, 601).astype(np.float32)
SEQUENCES, PAIRS = 6, 4


def loss_of(difference, e):
    return pairwise_loss(jnp.asarray(difference), smoothed(jnp.float32(1.0), e))


def log_sigmoid(x):
    return -np.logaddexp(0, -np.asarray(x, np.float64))


@pytest.mark.parametrize("e", EPSILONS)
def test_the_loss_is_minus_log_sigmoid_plus_e_times_the_difference(e):
    expected = -log_sigmoid(GRID) + e * GRID.astype(np.float64)
    np.testing.assert_allclose(loss_of(GRID, e), expected, rtol=1e-5, atol=1e-5)
    by_definition = -(1 - e) * log_sigmoid(GRID) - e * log_sigmoid(-GRID)
    np.testing.assert_allclose(expected, by_definition, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("e", EPSILONS)
def test_its_slope_is_sigmoid_minus_one_plus_e(e):
    slope = jax.vmap(jax.grad(functools.partial(loss_of, e=e)))(jnp.asarray(GRID))
    expected = 1 / (1 + np.exp(-GRID.astype(np.float64))) - (1 - e)
    np.testing.assert_allclose(slope, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("e", "place"), [(0.05, 2.944), (0.1, 2.197), (0.3, 0.847)])
def test_its_only_minimum_is_where_the_odds_are_those_of_the_labels(e, place):
    assert best_difference(e) == pytest.approx(math.log((1 - e) / e))
    assert best_difference(e) == pytest.approx(place, abs=5e-4)
    slope = jax.grad(functools.partial(loss_of, e=e))
    assert slope(best_difference(e)) == pytest.approx(0, abs=1e-6)
    slopes = jax.vmap(slope)(jnp.linspace(-10, 10, 201))
    assert (np.diff(slopes) > 0).all()  # convex, so there is no other
    assert loss_of(best_difference(e), e) == pytest.approx(smoothing_floor(e), abs=1e-6)
    assert loss_of(GRID, e).min() >= smoothing_floor(e) - 1e-6


def test_the_floor_is_the_entropy_of_the_labels():
    for e in (0.05, 0.1, 0.3):
        entropy = torch.distributions.Bernoulli(torch.tensor(e, dtype=torch.float64)).entropy()
        assert smoothing_floor(e) == pytest.approx(entropy.item(), rel=1e-6)
    assert smoothing_floor(0.0) == 0
    assert best_difference(0.0) == math.inf


def test_smoothing_leaves_ties_alone_and_mirrors_the_labels():
    targets = jnp.array([0.0, 0.25, 0.5, 1.0])
    np.testing.assert_allclose(smoothed(targets, 0.1), [0.1, 0.3, 0.5, 0.9], rtol=1e-6)
    np.testing.assert_array_equal(smoothed(targets, 0.0), targets)
    # A tie costs the same whichever response is ahead, and least when neither is.
    tie = pairwise_loss(jnp.asarray(GRID), jnp.float32(0.5))
    np.testing.assert_allclose(tie, tie[::-1], rtol=1e-5)
    assert GRID[np.argmin(tie)] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("a", [0.0, 0.1, 0.2, 0.6])
def test_label_smoothing_in_pytorch_is_twice_ours(a):
    scores = np.random.default_rng(0).normal(size=(50, 2)).astype(np.float32) * 4
    theirs = torch.nn.functional.cross_entropy(
        torch.tensor(scores),
        torch.zeros(50, dtype=torch.long),
        label_smoothing=a,
        reduction="none",
    )
    ours = loss_of(scores[:, 0] - scores[:, 1], a / 2)
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-5, atol=1e-6)


# Preference rows: packed by the same code as in training, scored by numbers drawn here.


@pytest.fixture(scope="module")
def batch():
    rows = list(pack(tiny.preferences(0, 12), RowShape(96, 64, SEQUENCES, PAIRS)))
    assert len(rows) > 2
    found = stack_rows([row.batch for row in rows])
    found.pair_weight = np.where(found.pair_weight != 0, 1.0, 0.0).astype(np.float32)
    found.pair_target = np.where(found.pair_weight != 0, 1.0, 0.0).astype(np.float32)
    return found


def changed(batch, **fields):
    return Batch(**{**vars(batch), **fields})


@pytest.fixture(scope="module")
def logprob(batch):
    """Log-probs of the target tokens."""
    return -np.random.default_rng(1).random(batch.targets.shape).astype(np.float32) * 3


def config(name="smoothed_pairwise", **options):
    return ObjectiveConfig(name=name, **options)


@functools.partial(jax.jit, static_argnames="options")
def run(logprob, batch, options):
    scores = likelihood(logprob, batch.sequence_ids, SEQUENCES)
    total, denominator, metrics = preference_loss(
        Read(scores, TokenLogprobs(logprob, logprob), None), batch, config(**dict(options))
    )
    return total, {"denominator": denominator, **metrics}


def loss(logprob, batch, **options):
    total, metrics = run(logprob, batch, tuple(sorted(options.items())))
    assert total == metrics["loss"]
    return {name: float(value) for name, value in metrics.items()}


def gradient(logprob, batch, **options):
    options = tuple(sorted(options.items()))
    return jax.grad(lambda x: run(x, batch, options)[0])(jnp.asarray(logprob))


def by_hand(logprob, batch, average="sum"):
    """{(row, pair): (s_a, s_b)} in float64, from the batch's arrays; nothing has score 0."""
    found = {}
    for b, p in zip(*np.nonzero(batch.pair_weight), strict=True):
        scores = []
        for number in (batch.pair_a[b, p], batch.pair_b[b, p]):
            tokens = logprob[b, batch.sequence_ids[b] == number].astype(np.float64)
            scores.append((getattr(tokens, average)()) if number else 0.0)
        found[b, p] = tuple(scores)
    return found


@pytest.mark.parametrize("average", ["sum", "mean"])
@pytest.mark.parametrize("beta", [1.0, 0.25])
def test_the_pairwise_loss_of_rows_is_that_of_their_pairs(batch, logprob, average, beta):
    e = 0.05
    differences = [beta * (a - b) for a, b in by_hand(logprob, batch, average).values()]
    expected = sum(-log_sigmoid(d) + e * d for d in differences)
    found = loss(logprob, batch, average=average, beta=beta)
    assert found["loss"] == pytest.approx(expected, rel=1e-5)
    assert found["ranking_loss"] == pytest.approx(expected, rel=1e-5)
    assert found["denominator"] == found["pairs"] == len(differences)
    assert found["margin"] == pytest.approx(sum(differences), rel=1e-4, abs=1e-4)
    assert found["accuracy"] == sum(d > 0 for d in differences)


def test_smoothed_ce_is_the_next_token_loss_with_weights_1_minus_e_and_e(batch, logprob):
    e = 0.1
    weights = np.zeros_like(batch.weights)
    for b, p in zip(*np.nonzero(batch.pair_weight), strict=True):
        weights[b] += (1 - e) * (batch.sequence_ids[b] == batch.pair_a[b, p])
        weights[b] += e * (batch.sequence_ids[b] == batch.pair_b[b, p])
    plain = jax.value_and_grad(lambda x: next_token_sums(x, x, jnp.asarray(weights))[0])
    value, slope = plain(jnp.asarray(logprob))
    options = {"name": "smoothed_ce", "label_smoothing": e}
    assert loss(logprob, batch, **options)["loss"] == pytest.approx(float(value), rel=1e-5)
    np.testing.assert_allclose(gradient(logprob, batch, **options), slope, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("e", [0.0, 0.05, 0.3])
def test_smoothed_ce_is_the_ranking_loss_and_minus_log_of_both_probabilities(batch, logprob, e):
    scores = np.array(list(by_hand(logprob, batch).values()))
    difference = scores[:, 0] - scores[:, 1]
    ranking = -log_sigmoid(difference) + e * difference
    both_likely = -np.logaddexp(scores[:, 0], scores[:, 1])
    found = loss(logprob, batch, name="smoothed_ce", label_smoothing=e)
    assert found["loss"] == pytest.approx((ranking + both_likely).sum(), rel=1e-5)
    assert found["ranking_loss"] == pytest.approx(ranking.sum(), rel=1e-5)


def test_smoothed_ce_pushes_both_responses_whatever_their_difference(batch, logprob):
    e, pushes = 0.1, []
    for scale in (1.0, 0.01):  # differences of other sizes
        slope = gradient(scale * logprob, batch, name="smoothed_ce", label_smoothing=e)
        pushes.append(np.asarray(slope))
    np.testing.assert_array_equal(*pushes)
    b, p = np.argwhere(batch.pair_weight != 0)[0]
    one_pair = changed(batch, pair_weight=np.zeros_like(batch.pair_weight))
    one_pair.pair_weight[b, p] = 1.0
    slope = np.asarray(gradient(logprob, one_pair, name="smoothed_ce", label_smoothing=e))
    for number, push in ((batch.pair_a[b, p], -(1 - e)), (batch.pair_b[b, p], -e)):
        np.testing.assert_allclose(slope[b, batch.sequence_ids[b] == number], push, rtol=1e-6)


def test_a_margin_is_subtracted_from_the_difference(batch, logprob):
    margin = np.where(batch.pair_weight != 0, 1.5, 0).astype(np.float32)
    ahead = np.array([2.0 * (a - b) for a, b in by_hand(logprob, batch).values()])
    found = loss(logprob, changed(batch, pair_margin=margin), label_smoothing=0.0, beta=2.0)
    # In log-odds: beta does not scale it.
    assert found["loss"] == pytest.approx(-log_sigmoid(ahead - 1.5).sum(), rel=1e-5)
    # What is told right does not depend on by how much it should be.
    assert ((ahead > 0) & (ahead < 1.5)).any()
    assert found["accuracy"] == (ahead > 0).sum()
    assert found["margin"] == pytest.approx(ahead.sum(), rel=1e-5)
    plain = loss(logprob, batch, name="smoothed_ce")
    assert loss(logprob, changed(batch, pair_margin=margin), name="smoothed_ce") == plain | {
        "ranking_loss": pytest.approx(
            (-log_sigmoid(ahead / 2 - 1.5) + 0.05 * (ahead / 2 - 1.5)).sum(), rel=1e-5
        )
    }


@pytest.mark.parametrize("average", ["sum", "mean"])
def test_a_reference_shifts_the_difference_and_nothing_else(batch, logprob, average):
    reference = -np.random.default_rng(2).random((len(batch.tokens), SEQUENCES)).astype(np.float32)
    own, differences = by_hand(logprob, batch, average), []
    for (b, p), (score_a, score_b) in own.items():
        sides = []
        for score, number in ((score_a, batch.pair_a[b, p]), (score_b, batch.pair_b[b, p])):
            count = (batch.sequence_ids[b] == number).sum() if average == "mean" else 1
            sides.append(score - reference[b, number - 1] / count)
        differences.append(sides[0] - sides[1])
    found = loss(logprob, changed(batch, reference=reference), average=average)
    expected = sum(-log_sigmoid(d) + 0.05 * d for d in differences)
    assert found["loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("average", ["sum", "mean"])
def test_a_reference_of_the_models_own_scores_leaves_no_difference(batch, logprob, average):
    own = np.asarray(likelihood(logprob, batch.sequence_ids, SEQUENCES).score)
    found = loss(logprob, changed(batch, reference=own), average=average)
    assert found["loss"] == pytest.approx(found["pairs"] * math.log(2), rel=1e-6)
    assert found["margin"] == 0
    assert found["accuracy"] == found["pairs"] / 2


@pytest.mark.parametrize("name", ["smoothed_pairwise", "smoothed_ce"])
def test_chosen_ce_adds_the_mean_cross_entropy_of_the_better_response(batch, logprob, name):
    worse_first = batch.pair_target.copy()
    worse_first[0, 0] = 0.0  # here b is the better one
    batch = changed(batch, pair_target=worse_first)
    expected = 0.0
    for place, (score_a, score_b) in by_hand(logprob, batch, "mean").items():
        expected -= score_b if place == (0, 0) else score_a
    without, with_it = (loss(logprob, batch, name=name, chosen_ce=g)["loss"] for g in (0.0, 0.7))
    assert with_it - without == pytest.approx(0.7 * expected, rel=1e-4)


def test_pair_weights_multiply_loss_and_denominator(batch, logprob):
    weights = np.where(batch.pair_weight != 0, np.random.default_rng(3).random(PAIRS), 0)
    weights = weights.astype(np.float32)
    expected = sum(
        weights[place] * (-log_sigmoid(a - b) + 0.05 * (a - b))
        for place, (a, b) in by_hand(logprob, batch).items()
    )
    found = loss(logprob, changed(batch, pair_weight=weights))
    assert found["loss"] == pytest.approx(expected, rel=1e-5)
    assert found["denominator"] == pytest.approx(weights.sum(), rel=1e-6)
    assert found["pairs"] == (batch.pair_weight != 0).sum()


def test_a_pair_with_nothing_compares_with_zero(batch, logprob):
    nothing = changed(batch, pair_b=np.zeros_like(batch.pair_b))
    differences = [a for a, _ in by_hand(logprob, nothing).values()]
    expected = sum(-log_sigmoid(d) + 0.05 * d for d in differences)
    assert loss(logprob, nothing)["loss"] == pytest.approx(expected, rel=1e-5)
    assert loss(logprob, nothing)["margin"] == pytest.approx(sum(differences), rel=1e-5)


@pytest.mark.parametrize("name", ["smoothed_pairwise", "smoothed_ce"])
def test_what_stands_in_unused_slots_does_not_matter(batch, logprob, name):
    unused, empty = batch.weights == 0, batch.pair_weight == 0
    assert unused.any()
    assert empty.any()
    poisoned = changed(
        batch,
        pair_target=np.where(empty, np.nan, batch.pair_target),
        pair_margin=np.where(empty, np.nan, batch.pair_margin),
        pair_a=np.where(empty, 3, batch.pair_a),
    )
    spoiled = np.where(unused, np.nan, logprob)
    for options in ({"name": name}, {"name": name, "chosen_ce": 0.5, "average": "mean"}):
        assert loss(spoiled, poisoned, **options) == loss(logprob, batch, **options)
        slope = gradient(spoiled, poisoned, **options)
        np.testing.assert_array_equal(slope, gradient(logprob, batch, **options))


def test_next_token_ignores_unused_slots_and_weighs_the_others(batch, logprob):
    weights = (batch.weights * 0.5).astype(np.float32)
    spoiled = np.where(weights == 0, np.nan, logprob)
    total, nll = next_token_sums(spoiled, spoiled, weights, 0.1)
    live = logprob[weights != 0].astype(np.float64)
    assert float(total) == pytest.approx(0.5 * (-live + 0.1 * live**2).sum(), rel=1e-5)
    assert float(nll) == pytest.approx(-0.5 * live.sum(), rel=1e-5)
    slope = jax.grad(lambda x: next_token_sums(x, x, weights, 0.1)[0])(jnp.asarray(spoiled))
    assert np.isfinite(slope).all()


def test_the_z_loss_is_z_times_the_squared_log_normaliser(logprob):
    logz = np.random.default_rng(4).normal(size=logprob.shape).astype(np.float32) * 5
    weights = np.ones_like(logprob)
    total, without = next_token_sums(logprob, logz, weights, 1e-2)
    expected = -logprob.astype(np.float64).sum() + 1e-2 * (logz.astype(np.float64) ** 2).sum()
    assert float(total) == pytest.approx(expected, rel=1e-5)
    assert float(without) == pytest.approx(-logprob.sum(), rel=1e-5)


def test_accuracy_and_margin_count_ties_as_half():
    #  a ahead of b, labelled so; behind; equal; a tie by label; b labelled better and ahead
    scores = np.array([[-1.0, -2.0, -1.0]], np.float32)
    batch = {
        "pair_a": np.array([[1, 2, 1, 1, 2, 0]]),
        "pair_b": np.array([[2, 1, 3, 2, 1, 0]]),
        "pair_target": np.array([[1.0, 1.0, 1.0, 0.5, 0.0, 0.0]], np.float32),
        "pair_weight": np.array([[1.0, 1.0, 1.0, 1.0, 1.0, 0.0]], np.float32),
        "pair_margin": np.zeros((1, 6), np.float32),
    }
    unread = dict.fromkeys(Batch.__dataclass_fields__)
    counts = np.ones((1, 3), np.int32)
    _, denominator, metrics = preference_loss(
        Read(SequenceScores(scores, counts), None, None), Batch(**unread | batch), config()
    )
    assert denominator == metrics["pairs"] == 5
    assert metrics["accuracy"] == 1 + 0 + 0.5 + 0.5 + 1
    assert metrics["margin"] == 1 - 1 + 0 + 0 + 1


def test_the_objective_of_a_model_is_these_losses_on_its_log_probs():
    """One small forward pass: the sums are over the right slots of the right rows."""
    model = tiny.decoder()
    rows = list(pack(tiny.preferences(6, 4), RowShape(64, 48, SEQUENCES, PAIRS)))
    batch = stack_rows([row.batch for row in rows][:2])

    @functools.partial(jax.jit, static_argnames="name")
    def run_model(model, batch, name):
        return objective(
            model,
            batch,
            config(name, z_loss=1e-3),
            None if name == "next_token" else Readout("likelihood", SEQUENCES),
        )

    total, (denominator, metrics) = run_model(model, batch, "next_token")
    assert denominator == batch.weights.sum()
    assert metrics["tokens"] == (batch.segment_ids != 0).sum()
    assert metrics["loss"] == total > metrics["nll"] > 0
    total, (denominator, metrics) = run_model(model, batch, "smoothed_pairwise")
    assert denominator == pytest.approx(batch.pair_weight.sum())
    assert metrics["tokens"] == (batch.segment_ids != 0).sum()
    assert np.isfinite(total)
