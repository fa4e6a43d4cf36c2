"""All of experiments.rlhf, tiny, with Tunix in its environment."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments import rlhf, rlhf_report
from experiments.rlhf_curves import kl_of
from experiments.rlhf_results import BEST, read_best, read_run, run_path
from experiments.rlhf_settings import REWARDS, SMALL
from gram_jax.errors import UserError

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.timeout(1200)


def run(folder, *flags):
    """Runs the command; returns what it printed."""
    command = [
        sys.executable, "-m", "experiments.rlhf", "--small", "--seeds=1",
        f"--workdir={folder / 'work'}", f"--results={folder / 'results'}", *flags,
    ]  # fmt: skip
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run(
        command,
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1100,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    try:
        rlhf.tunix_python()
    except UserError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("rlhf")
    return folder, run(folder)


def test_every_result_is_there_and_the_policy_is_the_exported_model(made):
    folder, printed = made
    for what in (*REWARDS, BEST):
        path = run_path(folder / "results", 0, what)
        assert path.is_file()
        assert json.loads(path.read_text())["facts"]["parity"] <= 1e-4
    assert "Tunix's logits are ours to" in printed


@pytest.mark.parametrize("reward", REWARDS)
def test_a_policy_starts_at_a_kl_of_zero_and_moves(made, reward):
    found = read_run(run_path(made[0] / "results", 0, reward))
    kl = kl_of(found)
    assert [check.step for check in found.checks] == [0, 1, 2]
    assert kl[0] == pytest.approx(0.0, abs=1e-5)
    assert kl[-1] > 1e-3
    assert len(found.steps) == SMALL.steps
    assert np.array(found.checks[0].gold).shape == (SMALL.check_prompts, SMALL.check_samples)


def test_all_runs_of_a_seed_start_from_the_same_samples(made):
    starts = [read_run(run_path(made[0] / "results", 0, reward)).checks[0] for reward in REWARDS]
    assert starts[0].texts == starts[1].texts == starts[2].texts
    assert starts[0].gold == starts[1].gold == starts[2].gold


def test_the_gold_rule_picks_what_the_gold_rule_likes_best(made):
    best = read_best(run_path(made[0] / "results", 0, BEST))
    assert best.sizes == [1, 2, 4]
    oracle = np.array(best.gold["gold"])
    assert (np.diff(oracle, axis=1) >= -1e-6).all()
    for picker in ("likelihood", "likelihood_sum", "judge", "bradley_terry", "longest"):
        assert (np.array(best.gold[picker]) <= oracle + 1e-6).all()
        np.testing.assert_allclose(np.array(best.gold[picker])[:, 0], oracle[:, 0], rtol=1e-4)


def test_a_second_time_there_is_nothing_left_to_do_and_a_lost_result_is_made_again(made):
    folder = made[0]
    assert "complete already" in run(folder)
    path = run_path(folder / "results", 0, "bradley_terry")
    before = read_run(path)
    path.unlink()
    assert "1 results written" in run(folder)
    after = read_run(path)
    assert [check.texts for check in after.checks] == [check.texts for check in before.checks]
    assert kl_of(after) == pytest.approx(kl_of(before), rel=1e-3)


def test_the_report_reads_them(made, tmp_path):
    tables = rlhf_report.tables(made[0] / "results")
    assert "| judge | " in tables["rlhf/equal_kl"]
    rlhf_report.draw(made[0] / "results", tmp_path)
    assert (tmp_path / "rlhf_gold.svg").stat().st_size > 1000
