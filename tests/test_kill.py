"""Runs killed at random moments end as runs that were not, and the tool that says so can tell."""

import json
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gram_jax.loop import run_stage

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import kill_runs  # noqa: E402


@pytest.mark.timeout(1200)
def test_twenty_kills_over_both_stages_change_nothing(tmp_path):
    """About two minutes on two idle cores; the long version is tools/kill_runs.py --kills=100."""
    command = [sys.executable, str(ROOT / "tools" / "kill_runs.py"), "--kills=20"]
    done = subprocess.run(
        [*command, f"--folder={tmp_path}"], capture_output=True, text=True, timeout=1100
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    # How many fall into which phase depends on the machine; saves are aimed at.
    found = re.search(
        r"(\d+) kills in (\d+) runs: (\d+) while a checkpoint was being written", done.stdout
    )
    kills, runs, in_saves = map(int, found.groups())
    assert kills == 20
    assert runs >= 2
    assert in_saves >= 3


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A whole run of the tool's first stage."""
    folder = tmp_path_factory.mktemp("data")
    kill_runs.write_data(folder)
    config = runpy.run_path(str(folder / "pretrain.py"))["get_config"](str(folder))
    config.train.length = 6.0
    run_stage(config, folder / "run", quiet=True)
    return folder / "run"


def change_line(workdir):
    path = workdir / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[3]["loss"] += 1e-6
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def drop_line(workdir):
    path = workdir / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


def repeat_events(workdir):
    (path,) = (workdir / "tensorboard").iterdir()
    shutil.copy(path, path.with_name(path.name + ".again"))


def drop_events(workdir):
    (path,) = (workdir / "tensorboard").iterdir()
    data, kept = path.read_bytes(), 0
    for _ in range(4):
        kept += 16 + int.from_bytes(data[kept : kept + 8], "little")
    path.write_bytes(data[:kept])


def drop_checkpoint(workdir):
    shutil.rmtree(workdir / "checkpoints" / "4")


def leave_a_save(workdir):
    (workdir / "checkpoints" / "4.writing").mkdir()


@pytest.mark.parametrize(
    ("tamper", "said"),
    [
        (change_line, "metrics.jsonl, line 4"),
        (drop_line, "metrics.jsonl has 7 lines for 8"),
        (repeat_events, "more than once"),
        (drop_events, "TensorBoard: "),
        (drop_checkpoint, "holds the checkpoints"),
        (leave_a_save, "holds the checkpoints"),
    ],
)
def test_the_tool_notices_a_difference(run, tmp_path, tamper, said):
    copy = shutil.copytree(run, tmp_path / "copy")
    kill_runs.compare(copy, run)
    tamper(copy)
    with pytest.raises(kill_runs.Difference, match=said):
        kill_runs.compare(copy, run)


def test_the_tool_notices_one_changed_parameter(run, tmp_path):
    """A run that differs in its seed alone, with the same lines put beside it."""
    config = runpy.run_path(str(run.parent / "pretrain.py"))["get_config"](str(run.parent))
    config.train.length, config.seed = 6.0, 2
    other = tmp_path / "other"
    run_stage(config, other, quiet=True)
    shutil.copy(run / "metrics.jsonl", other)
    with pytest.raises(kill_runs.Difference, match="is not the same to the bit"):
        kill_runs.compare(other, run)
