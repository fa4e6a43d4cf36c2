"""Rankings and ratings against known strengths, and against another computation."""

import math

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from strength_judge import StrengthJudge, StrengthScorer

from gram_jax.errors import UserError
from gram_jax.ranking import (
    PRIOR,
    bradley_terry,
    by_reward,
    check_method,
    comparisons,
    rank,
)
from gram_jax.scorer import Question, QuestionError, Verdict


def sig(x):
    return 1 / (1 + np.exp(-x))


def question(*strengths, prompt="Which?"):
    return Question(prompt, [str(strength) for strength in strengths])


def ranking(scorer, strengths, method="", **options):
    (ranked,) = rank(scorer, [question(*strengths)], method, **options)
    return ranked.ranking


def soft_wins(rng, n):
    upper = np.triu(rng.uniform(size=(n, n)), 1)
    return upper + np.tril(1 - upper.T, -1)


def ratings_by_iteration(wins, prior):
    """Hunter's MM iterations (2004, eq. 3) on strengths exp(r), until they stand still."""
    n = len(wins)
    wins = np.where(np.eye(n), 0, wins + prior / 2)
    games, strength = wins + wins.T, np.ones(n)
    for _ in range(100_000):
        rate = games / (strength[:, None] + strength[None, :])
        new = wins.sum(1) / rate.sum(1)
        new /= np.exp(np.log(new).mean())
        moved = np.abs(np.log(new / strength)).max()
        strength = new
        if moved < 1e-13:
            break
    return np.log(strength)


@pytest.mark.parametrize("n", [2, 3, 5, 12])
def test_ratings_are_those_of_another_computation(n):
    rng = np.random.default_rng(n)
    for _ in range(5):
        wins = soft_wins(rng, n)
        np.testing.assert_allclose(
            bradley_terry(wins), ratings_by_iteration(wins, PRIOR), atol=1e-9
        )
    # Several comparisons of some pairs, none of others.
    wins = rng.integers(0, 3, (n, n)).astype(float)
    np.testing.assert_allclose(bradley_terry(wins, 0.1), ratings_by_iteration(wins, 0.1), atol=1e-9)


@pytest.mark.parametrize("n", [1, 2, 7, 40])
def test_without_noise_ratings_are_the_true_strengths(n):
    strengths = 2 * np.random.default_rng(n).normal(size=n)
    strengths -= strengths.mean()
    wins = sig(strengths[:, None] - strengths[None, :])
    np.testing.assert_allclose(bradley_terry(wins, 1e-10), strengths, atol=1e-7)


def test_a_winner_of_all_has_a_finite_rating():
    for n in (2, 3, 30):
        r = bradley_terry(np.triu(np.ones((n, n)), 1))
        assert np.all(np.diff(r) < 0)
        assert abs(r.sum()) < 1e-9
        # The ratings are where the expected wins are the wins.
        p = sig(r[:, None] - r[None, :])
        expected = ((1 + PRIOR) * p - PRIOR / 2).sum(1) - (1 + PRIOR) * 0.5 + PRIOR / 2
        np.testing.assert_allclose(expected, np.arange(n)[::-1], atol=1e-9)
    # Two: odds of (1 + PRIOR / 2) to PRIOR / 2.
    r = bradley_terry([[0, 1], [0, 0]])
    np.testing.assert_allclose(r[0] - r[1], math.log(1.0005 / 0.0005), rtol=1e-9)


def test_responses_that_never_met_are_rated_through_the_ties_of_the_prior():
    r = bradley_terry([[0, 9, 0, 0], [1, 0, 0, 0], [0, 0, 0, 9], [0, 0, 1, 0]])
    np.testing.assert_allclose(r[:2], r[2:], atol=1e-9)
    np.testing.assert_allclose(r[0] - r[1], math.log(9), atol=1e-3)


@pytest.mark.parametrize(
    ("wins", "prior", "message"),
    [
        ([[0, 1]], 1.0, r"got shape \(1, 2\)"),
        ([], 1.0, r"got shape \(0,\)"),
        ([[0, -1], [1, 0]], 1.0, "not negative"),
        ([[0, math.nan], [1, 0]], 1.0, "finite"),
        ([[0, 1], [0, 0]], 0.0, "prior must be positive"),
    ],
)
def test_wins_that_are_none_are_refused(wins, prior, message):
    with pytest.raises(ValueError, match=message):
        bradley_terry(wins, prior)


DISTINCT = st.lists(st.integers(-40, 40), min_size=1, max_size=7, unique=True)


@settings(max_examples=50, deadline=None)
@given(tenths=DISTINCT, bias=st.floats(-3, 3))
def test_all_methods_agree_on_a_transitive_judge(tenths, bias):
    strengths = [x / 10 for x in tenths]
    order = sorted(range(len(strengths)), key=lambda i: -strengths[i])
    judge, n = StrengthJudge(bias), len(strengths)
    full = ranking(judge, strengths, "round_robin")
    assert list(full.order) == order
    assert full.comparisons == n * (n - 1) // 2
    best = ranking(judge, strengths, "keep_best")
    assert (best.order, best.comparisons) == ((order[0],), n - 1)
    against = ranking(judge, strengths, "reference", references=[0])
    assert (list(against.order), against.comparisons) == (order, n - 1)


@settings(max_examples=50, deadline=None)
@given(data=st.data(), tenths=DISTINCT)
def test_permuting_responses_permutes_ratings(data, tenths):
    class Inconsistent(StrengthJudge):
        """Its two orders are two opinions, and it goes in circles."""

        def score(self, questions):
            for question in questions:
                texts, pairs = question.responses, question.pairs
                opinions = np.array(
                    [[math.sin(7 * float(texts[a]) + 3 * float(texts[b])) for a, b in order]
                     for order in (pairs, [(j, i) for i, j in pairs])]
                )  # fmt: skip
                sizes = np.ones(len(texts), int)
                yield Verdict(None, sizes, 3 * opinions[0], 3 * opinions[1], truncated=False)

    strengths = [x / 10 for x in tenths]
    places = data.draw(st.permutations(range(len(strengths))))
    found = ranking(Inconsistent(), strengths, "round_robin")
    moved = ranking(Inconsistent(), [strengths[i] for i in places], "round_robin")
    np.testing.assert_allclose(moved.rewards, [found.rewards[i] for i in places], atol=2e-6)


def test_round_robin_recovers_strengths_up_to_their_mean_and_the_prior():
    found = ranking(StrengthJudge(1.5), [0.0, 1.0, -0.5])
    # A favour for the first shown does not cancel exactly: it draws p towards a half.
    p = (sig(1.0 + 1.5) + sig(1.0 - 1.5)) / 2
    two = ranking(StrengthJudge(1.5), [1.0, 0.0])
    np.testing.assert_allclose(two.rewards[0] - two.rewards[1], math.log(p / (1 - p)), atol=1e-3)
    np.testing.assert_allclose(sum(found.rewards), 0, atol=1e-5)
    found = ranking(StrengthJudge(), [0.0, 1.0, -0.5])
    np.testing.assert_allclose(found.rewards, np.array([0.0, 1.0, -0.5]) - 1 / 6, atol=2e-3)


def test_keep_best_rates_those_that_met_the_best():
    # 0 beats 1, 2 beats 0, 2 beats 3: 1 never met 2.
    found = ranking(StrengthJudge(), [1.0, 0.0, 3.0, 2.0], "keep_best")
    assert found.best == 2
    assert found.rewards[1] is None
    np.testing.assert_allclose(
        [found.rewards[i] for i in (0, 2, 3)], [sig(-2.0), 0.5, sig(-1.0)], rtol=1e-12
    )


def test_a_reference_is_one_of_the_responses_or_another_one():
    judge = StrengthJudge()
    inside, outside = rank(
        judge, [question(1.0, 0.0, 2.0), question(1.0, -1.0)], "reference", references=[1, "0.5"]
    )
    np.testing.assert_allclose(inside.ranking.rewards, [sig(1.0), 0.5, sig(2.0)])
    np.testing.assert_allclose(outside.ranking.rewards, [sig(0.5), sig(-1.5)])
    assert inside.ranking.order == (2, 0, 1)
    assert outside.ranking.order == (0, 1)
    assert (inside.ranking.comparisons, outside.ranking.comparisons) == (2, 2)
    # A model of rewards takes the difference, with its beta.
    (found,) = rank(StrengthScorer(), [question(1.0, -1.0)], "reference", references=["0.5"])
    np.testing.assert_allclose(found.ranking.rewards, [sig(2 * 0.5), sig(-2 * 1.5)])
    with pytest.raises(ValueError, match="reference 2 is not one of 2"):
        rank(judge, [question(1.0, 0.0)], "reference", references=[2])
    with pytest.raises(ValueError, match="one reference per question"):
        rank(judge, [question(1.0, 0.0)], "reference")


@pytest.mark.parametrize("kind", ["likelihood", "head"])
def test_rewards_are_sorted_without_comparing(kind):
    found = ranking(StrengthScorer(kind), [-3.5, 2.0, -1.0])
    assert found == by_reward([-3.5, 2.0, -1.0])
    assert (found.order, found.best, found.comparisons) == ((1, 2, 0), 1, 0)


def test_ties_stand_in_the_order_of_input():
    assert by_reward([1.0, 2.0, 1.0, 2.0]).order == (1, 3, 0, 2)
    for method in ("round_robin", "reference"):
        found = ranking(StrengthJudge(0.7), [1.0, 2.0, 1.0, 2.0], method, references=[0])
        assert found.order == (1, 3, 0, 2)
    assert ranking(StrengthJudge(0.7), [1.0, 2.0, 1.0, 2.0], "keep_best").best == 1
    # So sure of what it sees first that both orders contradict each other.
    blind = StrengthJudge(favours_first=50.0)
    assert ranking(blind, [1.0, 3.0, 2.0], "round_robin").order == (0, 1, 2)
    assert ranking(blind, [1.0, 3.0, 2.0], "keep_best").best == 0


def test_rounding_does_not_break_ties():
    # Such differences come from the place in a batch; they always speak for the later response.
    strengths = [1.0 + 1e-8 * i for i in range(5)]
    found = ranking(StrengthJudge(), strengths, "round_robin")
    assert (found.order, found.rewards) == ((0, 1, 2, 3, 4), (0.0,) * 5)
    assert ranking(StrengthJudge(), strengths, "keep_best").best == 0


def test_a_single_response_needs_no_comparison():
    judge = StrengthJudge()
    for method, reward in (("round_robin", 0.0), ("keep_best", 0.5), ("reference", 0.5)):
        found = ranking(judge, [4.0], method, references=[0])
        assert (found.rewards, found.order, found.comparisons) == ((reward,), (0,), 0)
    assert judge.rounds == []


def test_questions_go_through_their_rounds_together():
    judge, told = StrengthJudge(), []
    asked = [question(1, 2, 3), question(2, 1), question(5), question(4, 3, 2, 1)]
    rank(judge, asked, "keep_best", done=told.append)
    assert judge.rounds == [3, 2, 1]
    assert told == [1] * 6
    judge, told = StrengthJudge(), []
    found = rank(judge, asked, "round_robin", done=told.append)
    assert judge.rounds == [3]
    assert told == [3, 1, 6]
    assert [each.ranking.best for each in found] == [2, 0, 0, 0]
    assert [each.num_tokens for each in found] == [(1, 1, 1), (1, 1), (0,), (1, 1, 1, 1)]


def test_what_was_truncated_is_said():
    asked = [question(1, 2, prompt="long"), question(1, 2)]
    assert [each.truncated for each in rank(StrengthJudge(), asked)] == [True, False]
    # In the first of two rounds only.
    (found,) = rank(StrengthJudge(), [question("1 long", 2, 3)], "keep_best")
    assert found.truncated


@pytest.mark.parametrize("scorer", [StrengthJudge(), StrengthScorer()])
def test_a_score_that_is_no_number_is_refused(scorer):
    with pytest.raises(QuestionError, match="not finite") as caught:
        rank(scorer, [question(1.0, 2.0), question(1.0, math.nan)])
    assert caught.value.question == 1


def test_a_question_that_fails_in_a_later_round_keeps_its_place():
    with pytest.raises(QuestionError) as caught:
        rank(StrengthJudge(), [question(1, 2), question(1, 2, math.nan)], "keep_best")
    assert caught.value.question == 1


@pytest.mark.parametrize(
    ("method", "kind", "message"),
    [
        ("best", "judge", "method='best' must be one of scalar, reference, keep_best, round_robin"),
        ("scalar", "judge", "a judge compares and has no reward for a single response"),
        ("round_robin", "likelihood", "a likelihood gives every response a reward"),
        ("keep_best", "head", "use scalar"),
    ],
)
def test_a_method_that_does_not_go_with_the_reward_is_refused(method, kind, message):
    with pytest.raises(UserError, match=message):
        check_method(method, kind)


def test_methods_cost_what_they_make():
    for n in range(1, 9):
        assert comparisons("scalar", n) == 0
        for method in ("reference", "keep_best", "round_robin"):
            made = ranking(StrengthJudge(), range(n), method, references=[0]).comparisons
            assert comparisons(method, n, reference_is_one=True) == made
    (ranked,) = rank(StrengthJudge(), [question(1, 2)], "reference", references=["3"])
    assert ranked.ranking.comparisons == comparisons("reference", 2) == 2
