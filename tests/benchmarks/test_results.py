"""The arithmetic of benchmarks: ratios, differences, targets, files and tables."""

import dataclasses
import math

import pytest

from benchmarks.harness import agree, speed_target
from benchmarks.results import Case, Ratio, Result, Target, Timing, largest_difference, ratio
from benchmarks.table import targets, text
from benchmarks.worker import Answer
from gram_jax.errors import UserError


def timing(side, *seconds):
    return Timing(
        side=side,
        seconds=list(seconds),
        work=100,
        unit="tokens",
        compile_seconds=1.5,
        warm_up_seconds=2.0,
        facts={"padding": 0.125},
    )


def target(reached, goal=2.5, **more):
    return Target(what="speed, plain = 1", goal=goal, reached=reached, unit="x", **more)


def result(reached):
    timings = [timing("gram_jax", 2.0, 4.0, 3.0), timing("plain", 6.0, 6.0, 15.0)]
    case = Case(
        name="56M",
        what="some pairs",
        timings=timings,
        difference=2e-6,
        targets=[target(reached, low=1.5, high=5.0)],
    )
    return Result(
        benchmark="scoring",
        command="python -m benchmarks.scoring",
        date="2026-11-24T00:00:00+00:00",
        machine={"cores": 2},
        versions={"jax": "0.10.2"},
        peak={"XLA": 1.8e11},
        cases=[case],
    )


def test_a_ratio_is_that_of_the_medians_and_its_spread_that_of_repetitions():
    # Medians 6 and 3; beside each other 6 / 2, 6 / 4 and 15 / 3.
    assert ratio([6.0, 6.0, 15.0], [2.0, 4.0, 3.0]) == Ratio(2.0, 1.5, 5.0)


def test_sides_that_ran_unequally_often_have_no_ratio():
    with pytest.raises(ValueError):
        ratio([1.0, 2.0], [1.0])


def test_a_rate_is_work_by_the_median():
    assert timing("plain", 2.0, 50.0, 4.0).rate == 25.0


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        ([-200.0, 0.5], [-200.02, 0.5], 1e-4),
        ([0.0], [1e-5], 1e-5),  # small numbers are compared as they are
        ([1.0], [math.nan], math.inf),
        ([math.nan], [1.0], math.inf),
        ([math.inf], [1.0], math.inf),
        ([1.0, 2.0], [1.0], math.inf),
        ([], [], 0.0),
    ],
)
def test_the_largest_difference_is_relative_above_one(ours, theirs, expected):
    assert largest_difference(ours, theirs) == pytest.approx(expected, rel=1e-3)


def test_sides_with_other_numbers_are_refused():
    ours = Answer(numbers=[-200.0, -50.0])
    assert agree({"gram_jax": ours, "plain": Answer(numbers=[-200.01, -50.0])}) < 1e-4
    with pytest.raises(UserError, match="gram_jax and careful did not compute the same"):
        agree({"gram_jax": ours, "plain": ours, "careful": Answer(numbers=[-200.0, -50.01])})


def test_a_target_is_met_from_its_goal_on():
    assert target(2.5).met and not target(2.49).met
    assert target(0.6, 0.6, at_most=True).met and not target(0.61, 0.6, at_most=True).met


def test_a_result_is_read_back_as_it_was_written(tmp_path):
    result(2.0).write(tmp_path / "new" / "scoring.json")
    assert Result.read(tmp_path / "new" / "scoring.json") == result(2.0)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"cases": [{"timings": [{}]}]}'])
def test_a_file_that_is_no_result_is_named(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(UserError, match=r"a\.json: not the result of a benchmark"):
        Result.read(tmp_path / "a.json")


def test_the_table_shows_targets_beside_what_was_reached():
    table = targets([result(1.94), result(2.51)]).text()
    low, high = table.splitlines()[-2:]
    assert low.split()[-5:] == ["2.50x", "1.94x", "(1.50x-5.00x)", "no", "–"]
    assert ">= 2.50x" in low and high.split()[-2:] == ["yes", "–"]


def test_a_speed_that_is_counted_stands_beside_what_the_peak_would_give():
    ours, peer = timing("gram_jax", 2.0, 4.0, 3.0), timing("plain", 6.0)
    ours = dataclasses.replace(ours, flops=1.5e11, peak=1e11)
    assert ours.share == pytest.approx(0.5)  # 1.5 s of a median of 3
    assert timing("plain", 6.0).share is None
    peer = dataclasses.replace(peer, seconds=[6.0, 6.0, 15.0])
    found = speed_target(2.5, [ours, peer], "plain")
    assert found.reached == pytest.approx(2.0) and found.at_peak == pytest.approx(4.0)


def test_a_benchmark_shows_rate_ratio_padding_and_peak():
    shown = text(result(2.0))
    assert "2.00x (1.50-5.00)" in shown and "12.5%" in shown and "180 (XLA)" in shown
    assert "33" in shown  # 100 tokens in a median of 3 s
