"""The experiment's command trains, evaluates and keeps; what is kept is not done again."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.results import is_done, path_of
from experiments.settings import ALL, BASE, FACTORS
from experiments.tasks import SCALES, SMOKE, TASKS, Task, make_task
from experiments.training import model_config, stage_1, stage_2
from gram_jax.config_rules import validate
from gram_jax.errors import UserError

pytestmark = pytest.mark.timeout(600)
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("work")


def command(work, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "experiments.generalisation", "--scale=smoke", "--seeds=0",
         "--workers=1", f"--work={work}", f"--results={work}/results", *arguments],
        cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True,
        timeout=500,
    )  # fmt: skip


def test_a_run_is_kept_with_what_it_said_of_every_pair_and_not_done_again(work):
    first = command(work, "--factors=")
    assert first.returncode == 0, first.stderr[-3000:]
    assert "1 settings x 1 seeds, 1 runs to do" in first.stdout
    kept = path_of(work / "results" / "docstrings-smoke", BASE, 0)
    record = json.loads(kept.read_text())
    sets = json.loads((kept.parents[1] / "sets.json").read_text())["sets"]
    for name in ("in", "out"):
        text = record["sets"][name]["outcomes"]
        assert len(text) == len(sets[name]["prompts"]) == len(sets[name]["longer"]) == 20
        assert set(sets[name]["known"]) <= {"0", "1"} and len(sets[name]["known"]) == 20
        assert record["sets"][name]["accuracy"] == sum(map(int, text)) / 40
    assert set(record["training"]) == {"stage 1, text", "stage 1, pairs", "stage 2"}
    assert record["configs"]["stage 2"]["objective"]["name"] == "smoothed_pairwise"
    assert record["configs"]["stage 2"]["objective"]["beta"] > 0
    assert str(work) not in kept.read_text()
    again = command(work, "--factors=")
    assert "0 runs to do" in again.stdout
    assert json.loads(kept.read_text()) == record


def test_other_data_and_other_scales_are_not_mixed_with_what_is_kept(work):
    folder = work / "results" / "docstrings-smoke"
    task = Task(
        name="docstrings", scale=SMOKE, text=work, responses=work, pairs=work, sets={},
        tokenizer=work, digests={},
    )  # fmt: skip
    assert is_done(folder, BASE, 0, task)
    assert not is_done(folder, BASE, 1, task)
    path = path_of(folder, BASE, 7)
    record = json.loads(path_of(folder, BASE, 0).read_text())
    record["scale"]["tokens"] += 1
    path.write_text(json.dumps(record))
    with pytest.raises(UserError, match="another setting or scale"):
        is_done(folder, BASE, 7, task)
    path.unlink()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--factors=stage1"], "--factors=stage1: there are stage_1, smoothing,"),
        (["--level=critic"], "--level=critic: there are text+pairs; text; pairs; none; e = 0;"),
        (["--factors=pairs", "--level=judge"], "--level=judge: there are 0; 100; 1,000; all"),
        (["--task=preferences"], "--data='' has no folder preferences"),
        (
            ["--task=preferences", "--scale=labels"],
            "--scale=labels: preferences has cpu, pretrained, gpu and smoke",
        ),
    ],
)
def test_what_cannot_be_run_is_said_in_one_line(work, arguments, message):
    done = command(work, *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("name", "scale"), [(name, scale) for name in TASKS for scale in (*SCALES[name], "smoke")]
)
def test_every_setting_of_every_factor_is_a_config_that_can_be_run(work, tmp_path, name, scale):
    task = make_task("docstrings", SMOKE, work / "docstrings-smoke" / "data", "")
    sizes = SMOKE if scale == "smoke" else SCALES[name][scale]
    task = dataclasses.replace(task, name=name, scale=sizes)
    for factor in FACTORS.values():
        for setting in factor.levels.values():
            configs = [config for _, config in stage_1(task, setting, 0, tmp_path)]
            if setting.pairs:
                beta = 1.0 if setting.objective == "judge" else 0.1
                configs.append(stage_2(task, setting, 0, tmp_path, "runs/x", beta))
            for config in configs:
                validate(config)
            tokens = sum(config.train.length for config in configs[: len(configs) - 1])
            if setting.stage_1 != "none" and setting.pairs == ALL:
                assert tokens == pytest.approx(sizes.tokens * setting.tokens)
    # "120 million parameters" of the page.
    millions = model_config(task, BASE).num_parameters() / 1e6
    assert (119 < millions < 125) == (scale == "gpu")
