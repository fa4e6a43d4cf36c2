"""The benchmark of growth: its rows are full, and its result becomes a table and a figure."""

import dataclasses

import numpy as np
import pytest

from benchmarks.full_rows import FullRows
from benchmarks.growth_figure import write_figure
from benchmarks.models import SHAPES
from benchmarks.results import Case, Point, Result
from benchmarks.steps import ScoringStep
from benchmarks.table import text
from gram_jax.errors import UserError
from gram_jax.rows import check_batch


def point(side, at, *seconds):
    return Point(
        side=side,
        at=at,
        seconds=list(seconds),
        work=4,
        unit="pair",
        temporary_bytes=at * 2**20,
    )


def case(name, points):
    return Case(name=name, what="pairs", timings=[], difference=None, targets=[], points=points)


RESULT = Result(
    benchmark="growth",
    command="python -m benchmarks.growth",
    date="2026-11-24T00:00:00+00:00",
    machine={"cores": 2},
    versions={"jax": "0.10.2"},
    peak={},
    cases=[
        case("pairs", [point("scoring", 8, 0.1, 0.4, 0.2), point("training", 8, 1.0)]),
        case("layers", [point("scoring", n, 0.1 * n) for n in (2, 4, 16)]),
    ],
)


@pytest.mark.parametrize(
    "rows", [FullRows(16, 1, 12, 4, 2), FullRows(4, 4, 16, 8, 2), FullRows(8, 1, 6, 2, 1)]
)
def test_full_rows_have_no_padding_and_no_unused_slot(rows):
    batch = rows.batch()
    check_batch(batch, 500)
    assert batch.tokens.shape == (rows.rows, rows.shape.tokens)
    assert (batch.segment_ids != 0).all() and (batch.weights != 0).all()
    assert batch.weights.sum() == rows.prompts * rows.candidates * rows.response
    assert batch.sequence_ids.max() == rows.sequences
    again = rows.batch()
    assert np.array_equal(batch.tokens, again.tokens)


def test_a_scoring_step_on_full_rows_has_a_time_and_needs_more_memory_for_more_responses():
    config = dataclasses.replace(SHAPES["tiny"], num_layers=1)
    few, many = (FullRows(n, 1, 6, 2, 1) for n in (4, 16))
    steps = [ScoringStep(config, rows.batch(), rows.sequences) for rows in (few, many)]
    assert all(step.seconds() > 0 for step in steps)
    assert 0 < steps[0].temporary < steps[1].temporary


def test_points_are_kept_and_shown_with_their_medians(tmp_path):
    RESULT.write(tmp_path / "growth.json")
    assert Result.read(tmp_path / "growth.json") == RESULT
    # The median of 0.1, 0.4 and 0.2 s over 4 pairs.
    line = next(line for line in text(RESULT).splitlines() if "0.2 (0.1-0.4)" in line)
    assert line.split() == ["8", "scoring", "0.2", "(0.1-0.4)", "50", "8"]


def test_the_figure_has_two_panels_a_case_and_is_the_same_each_time(tmp_path):
    RESULT.write(tmp_path / "growth.json")
    drawn = []
    for name in ("one.svg", "other.svg"):
        write_figure(tmp_path / "growth.json", tmp_path / "docs" / name)
        drawn.append((tmp_path / "docs" / name).read_text())
    assert drawn[0] == drawn[1]
    assert drawn[0].count('id="axes_') == 4
    for label in ("pairs", "layers", "ms a pair", "memory, MiB", "scoring", "training"):
        assert f"<!-- {label} -->" in drawn[0]


def test_a_result_in_which_nothing_grows_is_refused(tmp_path):
    path = tmp_path / "memory.json"
    dataclasses.replace(RESULT, cases=[]).write(path)
    with pytest.raises(UserError, match=r"memory.json: nothing grows here"):
        write_figure(path, tmp_path / "growth.svg")
