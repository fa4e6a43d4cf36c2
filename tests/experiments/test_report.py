"""Tables of experiments say what the kept runs say, and a page is filled from nothing else."""

import json

import numpy as np
import pytest

from experiments.factor_figure import factor_figure
from experiments.factor_table import (
    cell,
    factor_table,
    known_table,
    labels_table,
    levels_of,
    longer,
    overview,
    subset_table,
)
from experiments.page import filled, tables
from experiments.results import RESULTS, HeldOut, digits, outcomes, path_of
from experiments.settings import ALL, BASE, FACTORS, runs_of, settings_of
from gram_jax.errors import UserError

PROMPTS = [0, 0, 1, 2, 3, 3, 4, 5]


def run(setting, seed, text):
    return {
        "seed": seed,
        "setting": setting.to_json(),
        "parameters": 1000,
        "sets": {"in": {"outcomes": text, "accuracy": float(outcomes(text).mean())}},
        "training": {
            "stage 1, text": {"wall_seconds": 60.0},
            "stage 2": {
                "wall_seconds": 30.0,
                "steps": 9,
                "metrics": {"ranking_loss": 0.5 + seed, "accuracy": 0.75, "margin": 0.25},
            },
        },
        "evaluation_seconds": 6.0,
        "versions": {"gram_jax": "1"},
        "time": f"2026-01-0{1 + seed}T00:00:00Z",
    }


@pytest.fixture
def kept(tmp_path):
    folder = tmp_path / "task"
    held_out = HeldOut(PROMPTS, [""] * 8, "22000011")
    folder.mkdir()
    (folder / "sets.json").write_text(json.dumps({"digests": {}, "sets": {"in": vars(held_out)}}))
    none = FACTORS["pairs"].levels["0"]
    for setting, texts in ((BASE, ("22220000", "22222000")), (none, ("20000000", "12000000"))):
        (folder / setting.name).mkdir()
        for seed, text in enumerate(texts):
            path = folder / setting.name / f"seed{seed}.json"
            path.write_text(json.dumps(run(setting, seed, text)))
    return tmp_path


def test_every_factor_has_the_base_and_no_two_settings_share_a_name():
    for factor in FACTORS.values():
        assert factor.base in factor.levels.values()
    settings = settings_of(FACTORS)
    assert len({setting.name for setting in settings}) == len(settings)
    assert all(setting.first.pairs == ALL for setting in settings)


def test_levels_are_named_by_their_labels_and_the_base_is_always_run():
    judge = FACTORS["readout"].levels["judge"]
    assert settings_of(["readout"], ["judge"]) == [BASE, judge]
    assert settings_of(["readout"], ["likelihood, sum"]) == [BASE]
    assert settings_of(["readout"]) == [BASE, *list(FACTORS["readout"].levels.values())[1:]]


def test_a_published_model_that_is_not_trained_has_one_seed_and_is_the_base_of_all(kept):
    factor = FACTORS["pretrained"]
    judge = factor.levels["judge"]
    seeds = [(factor.base, 4), (judge, 4), (judge, 5)]
    assert runs_of([factor.base, judge], [4, 5], pretrained=True) == seeds
    assert (factor.base, 5) in runs_of([factor.base, judge], [4, 5], pretrained=False)
    for (setting, seed), text in zip(seeds, ("22220000", "22222200", "22222220"), strict=True):
        record = run(setting, seed, text) | {"scale": {"pretrained": True}}
        if setting == factor.base:
            record["training"] = {}
        path = path_of(kept / "task", setting, seed)
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(record))
    base, trained = levels_of(kept / "task", factor)
    held_out = HeldOut(PROMPTS, [""] * 8, "22000011")
    assert cell(base, "in", held_out).seeds == [0.5]
    # Over both seeds, though the base has only the first.
    assert cell(trained, "in", held_out).gain.value == pytest.approx((2 + 3) / 16)


def test_a_cell_is_the_mean_over_seeds_and_the_gain_is_on_the_same_pairs(kept):
    zero, base = levels_of(kept / "task", FACTORS["pairs"])
    held_out = HeldOut(PROMPTS, [""] * 8, "22000011")
    found = cell(zero, "in", held_out)
    assert found.seeds == [1 / 8, 1.5 / 8]
    assert found.accuracy.value == pytest.approx(np.mean(found.seeds))
    assert found.gain.value == pytest.approx((1 + 1.5 - 4 - 5) / 16)
    assert found.gain.low < found.gain.value < found.gain.high < 0
    assert cell(base, "in", held_out).gain is None
    assert longer(held_out).value == 3 / 8


def test_the_table_names_each_level_and_the_length_baseline(kept):
    levels = levels_of(kept / "task", FACTORS["pairs"])
    sets = {"in": HeldOut(PROMPTS, [""] * 8, "22000011")}
    lines = factor_table(FACTORS["pairs"], levels, sets).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:5]] == [
        "| 0", "| **all**", "| longer wins (tokens)",
    ]  # fmt: skip
    assert lines[6].startswith("What GRAM reports: with few labels")
    assert "0.156 [" in lines[2] and "0.125, 0.188 | -0.406 [" in lines[2]
    assert "0.375 [" in lines[4]


def test_of_many_sets_the_gain_stands_below_the_accuracy(kept):
    levels = levels_of(kept / "task", FACTORS["pairs"])
    for level in levels:
        for one in (*level.runs.values(), *level.base.values()):
            one["sets"] |= {"b": one["sets"]["in"], "c": one["sets"]["in"]}
    held_out = HeldOut(PROMPTS, [""] * 8, "22000011")
    lines = factor_table(FACTORS["pairs"], levels, dict.fromkeys("bc", held_out) | {"in": held_out})
    rows = [line.split(" | ") for line in lines.splitlines()[:5]]
    assert rows[0] == ["| Labelled pairs", "b [95 %]", "c [95 %]", "in [95 %] |"]
    assert rows[2][1].startswith("0.156 [") and "]<br>-0.406 [" in rows[2][1]
    assert rows[3][1].endswith("]<br>–")


def test_few_labels_and_many_are_compared_on_the_same_pairs(kept):
    none, few = levels_of(kept / "task", FACTORS["pairs"])
    runs = {seed: json.loads(json.dumps(run)) for seed, run in few.runs.items()}
    for one in runs.values():
        one["sets"]["in"]["outcomes"] = "22222222"
        one["configs"] = {"stage 2": {"train": {"length": 14004.0}}}
    for one in few.runs.values():
        one["configs"] = {"stage 2": {"train": {"length": 2000.0}}}
    many = few._replace(runs=runs, base=runs)
    sets = {"in": HeldOut(PROMPTS, [""] * 8, "22000011")}
    lines = labels_table(none, [few], [many], sets).splitlines()
    assert len(lines) == 3
    # "20000000" and "12000000", "22220000" and "22222000" of 8.
    assert lines[2].startswith("| all | 2,000 and 14,004 | in | 0.156 [")
    cells = lines[2].split(" | ")
    assert cells[4].startswith("0.562 [") and cells[5] == "1.000 [1.000, 1.000]"
    assert cells[6].startswith("+0.438 [+") and cells[7].startswith("+0.844 [+")
    # Without labels there is only the reading of the base.
    other = few._replace(label="judge", is_base=False)
    lines = labels_table(none, [other], [other], sets).splitlines()
    cells = lines[2].removesuffix(" |").split(" | ")
    assert cells[3] == cells[7] == "–" and cells[6] == "+0.000 [+0.000, +0.000]"


def test_pairs_that_share_words_with_the_text_have_a_row_of_their_own(kept):
    levels = levels_of(kept / "task", FACTORS["pairs"])
    held_out = HeldOut(PROMPTS, [""] * 8, "22000011", "11111000")
    lines = known_table(levels, {"in": held_out, "b": HeldOut(PROMPTS, [""] * 8, "22000011")})
    rows = lines.splitlines()[2:]
    assert len(rows) == 2
    assert rows[0].startswith("| in | shares 8 words or more | 5 | 0.250 [")
    assert rows[1].startswith("| in | shares no 8 words with the text | 3 | 0.000 [")


def test_each_subset_has_the_accuracy_of_its_own_pairs(kept):
    levels = levels_of(kept / "task", FACTORS["pairs"])
    sets = {"in": HeldOut(PROMPTS, ["x"] * 5 + ["y"] * 3, "22000011")}
    lines = subset_table(levels, sets).splitlines()
    assert lines[0] == "| set | subset | pairs | 0 | **all** | longer wins |"
    # Of "20000000" and "12000000", and of "22220000" and "22222000", the first five and the rest.
    assert lines[2].startswith("| in | x | 5 | 0.250 [")
    assert "| 0.900 [" in lines[2] and "| 0.400 [" in lines[2]
    assert lines[3].startswith("| in | y | 3 | 0.000 [0.000, 0.000] | 0.000 [0.000, 0.000] | 0.333")


def test_a_stage_1_that_runs_share_costs_once(kept):
    runs = [json.loads(p.read_text()) for p in sorted((kept / "task").glob("*/seed*.json"))]
    sets = {"in": HeldOut(PROMPTS, [""] * 8, "22000011")}
    # Two seeds of stage 1, four of stage 2, four evaluations.
    assert f"| cost | {(2 * 60 + 4 * 30 + 4 * 6) / 60:.0f} core-minutes |" in overview(
        runs, sets, {}
    )
    assert "| left out as too long | in 1,200, text 0 |" in overview(
        runs, sets, {"in": 1200, "text": 0}
    )


def test_the_figure_has_a_panel_per_set_and_a_row_per_level(kept):
    levels = levels_of(kept / "task", FACTORS["pairs"])
    held_out = HeldOut(PROMPTS, [""] * 8, "22000011")
    figure = factor_figure(FACTORS["pairs"], levels, {"in": held_out})
    (panel,) = figure.axes
    assert [label.get_text() for label in panel.get_yticklabels()] == ["0", "all"]


def test_a_page_is_filled_between_its_marks_and_nowhere_else(kept):
    found = tables(kept)
    assert set(found) == {
        "task/overview", "task/pairs", "task/pairs/known", "task/pairs/subsets", "task/training",
    }  # fmt: skip
    assert (
        "| base | 9, 9 | 0.500, 1.500 | 0.750, 0.750 | 0.250, 0.250 |" in found["task/training"]()
    )
    page = "# T\n<!-- task/pairs -->\nold\n<!-- end -->\nprose\n"
    after, count = filled(page, found)
    assert count == 1
    assert after == f"# T\n<!-- task/pairs -->\n{found['task/pairs']()}<!-- end -->\nprose\n"
    assert filled(after, found) == (after, 1)
    with pytest.raises(UserError, match="task/width"):
        filled("<!-- task/width -->\n<!-- end -->\n", found)


def test_outcomes_are_kept_as_digits():
    assert digits([0.5, 0.0, -2.0]) == "210"
    assert outcomes("210").tolist() == [1.0, 0.5, 0.0]


def test_the_page_of_results_is_what_the_kept_runs_give():
    page = (RESULTS.parents[1] / "docs" / "results.md").read_text()
    assert filled(page, tables(RESULTS))[0] == page
