"""Does a reward train a policy? The sums behind the tables, resumability, and a run with Tunix."""

import dataclasses
import itertools
import math
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments import rlhf, rlhf_report, rlhf_results
from experiments.rlhf_best_of_n import (
    best_of_n,
    best_of_n_kl,
    partial_correlation,
    rank_correlation,
)
from experiments.rlhf_curves import common_kl, kl_of, place_at, proxy_gains, wins
from experiments.rlhf_gold import Chrf, parameters, parameters_named
from experiments.rlhf_results import BEST, Best, Check, Run, is_done, run_path, write
from experiments.rlhf_settings import REWARDS, SMALL, Sizes, described, policy_seed
from gram_jax.errors import UserError

TEXTS = [
    "Return the sum of all values.",
    "Returns the sum over an axis.",
    "sum",
    "x",
    "The value\n  of the first parameter, or None.",
    "aaaa aaaa",
    "",
]


def slow_chrf(text, reference):
    """By lists instead of counts: each n-gram of the text takes one of the reference's away."""
    precisions, recalls = [], []
    text, reference = ("".join(c for c in t if not c.isspace()) for t in (text, reference))
    for n in range(1, 7):
        own = [text[i : i + n] for i in range(len(text) - n + 1)]
        wanted = [reference[i : i + n] for i in range(len(reference) - n + 1)]
        if own and wanted:
            left, shared = list(wanted), 0
            for gram in own:
                if gram in left:
                    left.remove(gram)
                    shared += 1
            precisions.append(shared / len(own))
            recalls.append(shared / len(wanted))
    if not any(precisions) or not any(recalls):
        return 0.0
    p, r = np.mean(precisions), np.mean(recalls)
    return 5 * p * r / (4 * p + r)


def test_chrf_of_a_text_with_itself_is_one():
    assert Chrf(TEXTS[0])(TEXTS[0]) == pytest.approx(1.0)


def test_chrf_by_hand():
    # "ab" in "abc": P 1 and 1; R 2/3 and 1/2; orders 3 to 6 are of no use to one of the two.
    recall = (2 / 3 + 1 / 2) / 2
    assert Chrf("abc")("ab") == pytest.approx(5 * recall / (4 + recall))
    # The other way round P and R change places, and recall counts twice.
    assert Chrf("ab")("abc") == pytest.approx(5 * recall / (4 * recall + 1))
    assert Chrf("abc")("xyz") == 0.0
    # Blanks are left out; an n-gram counts as often as it is in both: P 2/4, R 2/2; 1/3, 1/1.
    precision = (2 / 4 + 1 / 3) / 2
    assert Chrf("a a")("aa aa") == pytest.approx(5 * precision / (4 * precision + 1))


@pytest.mark.parametrize(("text", "reference"), itertools.product(TEXTS, TEXTS))
def test_chrf_equals_a_slow_one(text, reference):
    assert Chrf(reference)(text) == pytest.approx(slow_chrf(text, reference), abs=1e-12)


def test_chrf_equals_sacrebleu(monkeypatch):
    # It comes with lm-evaluation-harness (tests/clients/environments.sh huggingface).
    for path in Path(sys.prefix, "clients", "huggingface").glob("lib/*/site-packages"):
        monkeypatch.syspath_prepend(path)
    try:
        from sacrebleu.metrics import CHRF
    except ImportError:
        pytest.skip("sacrebleu is not installed here")
    metric = CHRF()
    for text, reference in itertools.product(TEXTS[:6], TEXTS[:6]):
        found = metric.sentence_score(text, [reference]).score / 100
        assert Chrf(reference)(text) == pytest.approx(found, abs=1e-9)


def test_chrf_at_equal_length_compares_beginnings():
    rule = Chrf("Return the sum of all values.")
    assert rule.at_equal_length("Return the sum") == pytest.approx(1.0)
    assert rule("Return the sum") < 0.7
    longer = "Return the sum of all values. And much else that is not to the point."
    assert rule.at_equal_length(longer) == pytest.approx(1.0)
    assert rule.at_equal_length("of all values.") == pytest.approx(
        slow_chrf("of all values.", "Return the sum")
    )
    assert rule.at_equal_length("  ") == 0.0


def test_parameters_of_a_prompt():
    assert parameters("a.b.f(x, y=(1, 2), *, key=None, **more)\n") == ["x", "y", "key", "more"]
    assert parameters("a.b.f(first, second, ...)\n") == ["first", "second"]
    assert parameters("a.b.Klass\n") == []
    assert parameters("a.b.f(x=<object>)\n") == []


def test_parameters_are_named_as_whole_words():
    assert parameters_named("f(axis, data)\n", "Along the axis; dataset is not one.") == 0.5
    assert parameters_named("f()\n", "Nothing.") is None


def test_best_of_n_equals_enumeration():
    rng = np.random.default_rng(0)
    reward, gold = rng.normal(size=7), rng.normal(size=7)
    for size in range(1, 8):
        drawn = [max(s, key=lambda i: reward[i]) for s in itertools.combinations(range(7), size)]
        found = best_of_n(reward, gold, [size])
        assert found == pytest.approx(np.mean(gold[drawn]), abs=1e-12)


def test_best_of_n_shares_ties():
    # {0, 1}: a coin between 4 and 2; {0, 2}: 4; {1, 2}: 2.
    found = best_of_n([1.0, 1.0, 0.0], [4.0, 2.0, -1.0], [2])
    assert found == pytest.approx((3 + 4 + 2) / 3)
    assert best_of_n([0.0] * 5, range(5), [1, 3, 5]) == pytest.approx([2.0] * 3)


def test_best_of_all_is_the_best_and_best_of_one_the_mean():
    gold = np.arange(64.0)
    assert best_of_n(gold, gold, [1, 64]) == pytest.approx([31.5, 63.0])
    assert best_of_n(-gold, gold, [64]) == pytest.approx([0.0])


@pytest.mark.parametrize("sizes", [[0], [4]])
def test_best_of_a_size_that_cannot_be_is_an_error(sizes):
    with pytest.raises(ValueError, match="must be from 1 to 3"):
        best_of_n([1, 2, 3], [1, 2, 3], sizes)


def test_kl_of_best_of_n():
    assert best_of_n_kl(1) == 0.0
    assert best_of_n_kl(2) == pytest.approx(math.log(2) - 0.5)


def test_rank_correlation():
    assert rank_correlation([1, 2, 3, 4], [10, 20, 30, 400]) == pytest.approx(1.0)
    assert rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1.0)
    assert rank_correlation([1, 1, 1], [3, 2, 1]) is None
    # Ranks 0.5, 0.5, 2 and 0, 1, 2.
    assert rank_correlation([1, 1, 5], [3, 4, 9]) == pytest.approx(1.5 / math.sqrt(1.5 * 2))


def test_partial_correlation_is_that_of_what_is_left_over():
    rng = np.random.default_rng(0)
    c = rng.normal(size=50)
    a, b = c + rng.normal(size=50), -2 * c + rng.normal(size=50)
    left = [x - np.polyval(np.polyfit(c, x, 1), c) for x in (a, b)]
    three = [np.corrcoef(*pair)[0, 1] for pair in ((a, b), (a, c), (b, c))]
    assert partial_correlation(*three) == pytest.approx(np.corrcoef(*left)[0, 1])
    assert partial_correlation(0.5, 1.0, 0.5) is None


def test_wins_compare_each_with_each():
    found = wins([[1.0, 3.0], [2.0, 2.0]], [[2.0, 0.0], [2.0, 2.0]])
    assert found == pytest.approx([3 / 4, 0.5])


def test_values_at_a_kl_lie_on_the_line_between_two_checks():
    kl = [0.0, 1.0, 3.0, 2.0, 5.0]
    place = place_at(kl, 2.0)
    assert place == (1, 2, 0.5)
    assert place.of([[0.0, 0.0], [2.0, 4.0], [4.0, 0.0], [9.0, 9.0], [9.0, 9.0]]) == pytest.approx(
        [3.0, 2.0]
    )
    # The run is there at the first check that reaches it, not at a later one.
    assert place_at(kl, 3.0) == (1, 2, 1.0)
    assert place_at(kl, 0.0).of(kl) == 0.0
    with pytest.raises(ValueError, match="not reached"):
        place_at(kl, 5.5)


def test_the_common_kl_is_one_that_all_runs_reach():
    runs = [[0.0, 4.0, 3.0], [0.0, 2.5], [0.0, 1.0, 6.0]]
    assert common_kl(runs) == 2.5
    for run in runs:
        assert place_at(run, 2.5).of(run) == pytest.approx(2.5)


def test_a_policy_never_starts_as_the_model_of_its_own_rewards():
    for seeds in (1, 2, 3, 5):
        assert all(policy_seed(seed, seeds) != seed for seed in range(seeds))


def fake_run(seed, reward, sizes=SMALL, prompts=6):
    """A run whose gold rises with its KL by an amount that depends on the reward."""
    rng = np.random.default_rng([seed, len(reward)])
    slope = {"likelihood": 0.1, "judge": 0.02, "bradley_terry": -0.05}[reward]
    start = rng.uniform(0.2, 0.4, size=(prompts, 2))

    def check(number):
        kl = number * (1.0 + 0.2 * seed)
        return Check(
            step=10 * number,
            kl=[kl] * prompts,
            gold=(start + slope * kl).tolist(),
            equal=(start - slope * kl).tolist(),
            named=[None, *([0.5, 0.1 * number] for _ in range(prompts - 1))],
            proxy=(start * 3 + kl).tolist(),
            characters=[[100 + number, 90]] * prompts,
            finished=[[1, 0]] * prompts,
            texts=["Return it."],
        )

    seconds = {"stage_1": 60.0, "stage_2": 30.0, "grpo": 20.0, "checks": 10.0, "processor": 40.0}
    accuracy = {"value": 0.7, "low": 0.6, "high": 0.8, "n": 100}
    return Run(
        settings=described(sizes, seed, 2, reward),
        facts={"seconds": seconds, "reward_accuracy": {"in": accuracy, "out": accuracy}},
        prompts=[f"f{i}(x)\n" for i in range(prompts)],
        sets=["in", "out"] * (prompts // 2),
        steps=[{"mean": 0.0, "sd": 1.0}],
        checks=[check(number) for number in range(4)],
    )


def fake_best(seed, sizes=SMALL, prompts=4):
    rng = np.random.default_rng(seed)
    gold = {
        picker: np.sort(rng.uniform(size=(prompts, 3)), axis=1).tolist()
        for picker in rlhf_report.PICKERS
    }
    return Best(
        settings=described(sizes, seed, 2, BEST),
        facts={"seconds": {"best_of_n": 5.0, "start": 3.0, "processor": 9.0}},
        prompts=[f"f{i}(x)\n" for i in range(prompts)],
        sets=["in", "out"] * (prompts // 2),
        sizes=[1, 2, 4],
        gold=gold,
        equal=gold,
        named={picker: [None, *values[1:]] for picker, values in gold.items()},
        correlation={picker: [None, 0.1, 0.2, 0.3] for picker in gold},
        equal_correlation={picker: [None, 0.1, 0.2, 0.2] for picker in gold},
        length_correlation={picker: [None, 0.5, 0.5, 0.5] for picker in gold},
    )


@pytest.fixture
def results(tmp_path):
    """Two seeds of all rewards."""
    for seed in range(2):
        for reward in REWARDS:
            write(run_path(tmp_path, seed, reward), fake_run(seed, reward))
        write(run_path(tmp_path, seed, BEST), fake_best(seed))
    return tmp_path


def test_a_result_is_read_as_it_was_written(results):
    run = fake_run(1, "judge")
    found = rlhf_results.read_run(run_path(results, 1, "judge"))
    assert found.settings == run.settings
    np.testing.assert_allclose(found.checks[2].gold, run.checks[2].gold, rtol=1e-4)
    assert found.checks[3].named[0] is None
    np.testing.assert_allclose(found.checks[3].named[1:], run.checks[3].named[1:], rtol=1e-4)
    assert kl_of(found) == pytest.approx(kl_of(run))


def test_what_is_there_with_the_same_settings_is_not_made_again(results):
    assert rlhf.pending(SMALL, 2, results) == []
    changed = dataclasses.replace(SMALL, learning_rate=1e-3)
    # Best of N knows nothing of GRPO.
    assert len(rlhf.pending(changed, 2, results)) == 6
    changed = dataclasses.replace(SMALL, best_samples=8)
    assert [each.what for each in rlhf.pending(changed, 2, results)] == [BEST, BEST]
    assert len(rlhf.pending(dataclasses.replace(SMALL, hidden=64), 2, results)) == 8
    assert not is_done(results / "seed0_judge.json", described(SMALL, 0, 3, "likelihood"))
    run_path(results, 1, "judge").unlink()
    left = rlhf.pending(SMALL, 2, results)
    assert [(each.seed, each.what) for each in left] == [(1, "judge")]


def test_a_damaged_result_says_which_file(results):
    path = run_path(results, 0, "judge")
    path.write_text(path.read_text()[:100])
    with pytest.raises(UserError, match=r"seed0_judge\.json: not a result"):
        rlhf.pending(SMALL, 2, results)


def test_the_report_compares_at_a_kl_that_all_runs_reach(results):
    tables = rlhf_report.tables(results)
    lines = tables["rlhf/equal_kl"].splitlines()
    rows = {line.split(" | ")[0]: line.split(" | ") for line in lines}
    likelihood, judge, head = (
        rows[f"| {name}"] for name in ("likelihood", "judge", "Bradley-Terry")
    )
    # The first seed reaches 3.0 nats, the second 3.6.
    assert likelihood[1] == judge[1] == head[1] == "3.00, 3.00"
    # Steps: 30 of the first seed, and 3.0 / 1.2 checks of the second.
    assert likelihood[2] == "30, 25"
    assert likelihood[6].startswith("+0.300") and judge[6].startswith("+0.060")
    assert head[6].startswith("-0.150")
    assert float(head[3].split()[0]) < 0.5 < float(likelihood[3].split()[0])
    by_seed = [float(value) for value in likelihood[4].split(", ")]
    assert float(likelihood[3].split()[0]) == pytest.approx(sum(by_seed) / 2, abs=1e-3)
    assert float(likelihood[5].split()[0]) < 0.5 < float(head[5].split()[0])
    assert "likelihood less Bradley-Terry" in tables["rlhf/differences"]
    assert "+0.450" in tables["rlhf/differences"]


def test_figures_are_the_same_twice(results, tmp_path):
    for name in ("a", "b"):
        assert rlhf_report.draw(results, tmp_path / name) == 2
    for name in ("rlhf_gold.svg", "rlhf_best_of_n.svg"):
        assert (tmp_path / "a" / name).read_text().startswith("<?xml")
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_report_of_nothing_says_what_to_run(tmp_path):
    with pytest.raises(UserError, match=r"python -m experiments\.rlhf"):
        rlhf_report.tables(tmp_path)


def test_the_rewards_own_gain_is_in_deviations_among_samples_of_a_prompt():
    run = fake_run(0, "judge")
    start = np.array(run.checks[0].proxy)
    deviation = np.sqrt(np.mean(np.ptp(start, axis=1) ** 2 / 2))
    assert proxy_gains(run) == pytest.approx(np.arange(4) / deviation)


def test_sizes_are_changed_by_name():
    sizes = rlhf.sizes_of(True, ["steps=5", "learning_rate=0.01"])
    assert sizes == dataclasses.replace(SMALL, steps=5, learning_rate=0.01)
    assert rlhf.sizes_of(False, []) == Sizes()
    for change, reason in (("stepz=5", "'stepz' is no size"), ("steps=x", "steps is a number")):
        with pytest.raises(UserError, match=reason):
            rlhf.sizes_of(False, [change])


def test_a_missing_environment_says_how_to_make_it(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    with pytest.raises(UserError, match=r"tests/clients/environments\.sh tunix"):
        rlhf.tunix_python()
