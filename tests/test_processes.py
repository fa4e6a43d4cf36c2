"""Several processes give what one gives: trained, resumed, scored and exported for real.

All of it goes through launch/local.sh, on one machine, with collectives between the processes.
"""

import io
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from several_processes import (
    LAUNCH,
    before_the_end,
    check_same_losses,
    check_same_scores,
    check_same_weights,
    end,
    losses,
    make_work,
    read,
    rows_to_score,
    run,
    start,
    train,
    wait_until,
    write,
)

from gram_jax import distributed
from gram_jax.checkpoints import load_model, read_run_info
from gram_jax.config import ComputeConfig
from gram_jax.errors import UserError
from gram_jax.model_card import export_checkpoint
from gram_jax.scorer import RewardSettings
from gram_jax.scoring_job import ScoringJob, run_job

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with data, a tokenizer and the configs of two stages."""
    return make_work(tmp_path_factory.mktemp("processes"))


@pytest.fixture(scope="module")
def one(work):
    """Stage 1 in one process: a checkpoint after steps 3 and 6."""
    train(work, "pretrain", "one", processes=1)
    return work / "one"


@pytest.fixture(scope="module")
def two(work):
    """The same in two processes; also what they said."""
    said = train(work, "pretrain", "two")
    return work / "two", said


def test_two_processes_pretrain_as_one_does(one, two):
    folder, _ = two
    check_same_losses(folder, one)
    check_same_weights(folder, one)


def test_only_process_0_speaks(two):
    _, (out, err) = two
    assert out.count("done: 6 steps") == 1
    others = [line for line in err.splitlines() if line.startswith("[1] ")]
    # Gloo, the library that connects the processes, says so in each of them.
    assert [line for line in others if "[Gloo]" not in line] == []


def test_one_process_goes_on_where_two_stopped(work, one, two):
    folder = before_the_end(two[0], work / "two_one")
    train(work, "pretrain", folder.name, processes=1)
    check_same_losses(folder, one)


def test_two_processes_go_on_where_one_stopped(work, one):
    folder = before_the_end(one, work / "one_two")
    train(work, "pretrain", folder.name)
    check_same_losses(folder, one)


def test_a_run_that_is_told_to_stop_saves_in_all_processes(work):
    command = [sys.executable, "-m", "gram_jax.pretrain", f"--config={work}/pretrain.py:{work}"]
    workdir = work / "stopped"
    process = start([*command, f"--workdir={workdir}", "--config.train.length=2000"])
    log = workdir / "metrics.jsonl"
    wait_until(lambda: log.exists() and b"\n" in log.read_bytes(), process)
    process.send_signal(signal.SIGTERM)
    status, _, err = end(process)
    assert status == distributed.SAVED, err
    last = max(losses(workdir))
    assert err.count(f"stopped by SIGTERM after step {last} of 2000; the same command") == 1
    assert read_run_info(workdir / "checkpoints" / str(last)).position == 8 * last


def test_two_processes_of_two_devices_finetune_as_one_does(work, one, two):
    flags = ["--config.mesh.fsdp=2", "--config.mesh.tensor=2", f"--config.init_from={two[0]}"]
    train(work, "finetune", "tuned_two", *flags, JAX_NUM_CPU_DEVICES="2")
    train(work, "finetune", "tuned_one", processes=1)
    check_same_losses(work / "tuned_two", work / "tuned_one")
    check_same_weights(work / "tuned_two", work / "tuned_one")


@pytest.fixture(scope="module")
def exported(work, two):
    """A Hugging Face folder, gathered from two processes."""
    folder = work / "exported"
    run("export", f"--checkpoint={two[0]}", f"--output={folder}")
    return folder


def test_two_processes_export_what_one_does(work, two, exported):
    export_checkpoint(two[0], work / "exported_one")
    for path in (work / "exported_one").iterdir():
        assert (exported / path.name).read_bytes() == path.read_bytes(), path.name


def score(tmp_path, exported, name):
    job = ScoringJob(
        input=f"{tmp_path}/in.jsonl",
        output=f"{tmp_path}/{name}.jsonl",
        reward=RewardSettings(row_length=64, batch_rows=2),
    )
    return run_job(job, lambda: load_model(exported, ComputeConfig()), stream=io.StringIO())


def score_command(tmp_path, exported, name):
    flags = [f"--checkpoint={exported}", f"--input={tmp_path}/in.jsonl", "--row_length=64"]
    flags += [f"--output={tmp_path}/{name}.jsonl", "--batch_rows=2", "--mesh=fsdp=2"]
    return [sys.executable, "-m", "gram_jax.score", *flags]


def test_two_processes_score_as_one_does(tmp_path, exported):
    write(tmp_path / "in.jsonl", rows_to_score(100))
    status, out, err = end(start(score_command(tmp_path, exported, "two")))
    assert status == 0, err
    assert "100 rows" in out
    assert "[1] row" not in err
    one = score(tmp_path, exported, "one").summary
    check_same_scores(read(tmp_path / "two.jsonl"), read(tmp_path / "one.jsonl"))
    state = json.loads((tmp_path / "two.jsonl.state.json").read_text())
    assert state["summary"]["pairs"]["n"] == one.pairs["n"] == 34


def test_a_killed_process_ends_the_job_and_one_process_goes_on(tmp_path, exported):
    write(tmp_path / "in.jsonl", rows_to_score(5000))
    state, partial = (tmp_path / f"out.jsonl.{name}" for name in ("state.json", "partial"))
    remember = ["sh", "-c", 'echo $$ > "$0/pid.$JAX_PROCESS_ID"; exec "$@"', str(tmp_path)]
    process = start([*remember, *score_command(tmp_path, exported, "out")])
    wait_until(lambda: state.exists() and json.loads(state.read_text())["lines"], process)
    os.kill(int((tmp_path / "pid.1").read_text()), signal.SIGKILL)
    began = time.monotonic()
    status, _, err = end(process)
    # Process 0 fails a moment later, and may be the first of which the launcher hears.
    assert status in (1, 128 + signal.SIGKILL), err
    assert "process 1 was ended by signal 9" in err
    assert time.monotonic() - began < 20
    assert partial.exists()
    assert 0 < json.loads(state.read_text())["lines"] < 5000
    score(tmp_path, exported, "out")
    score(tmp_path, exported, "whole")
    check_same_scores(read(tmp_path / "out.jsonl"), read(tmp_path / "whole.jsonl"))


def test_a_save_that_fails_in_process_0_alone_fails_in_all(work):
    """Only process 0 gives a checkpoint its name; here a file has it already."""
    workdir = work / "in_the_way"
    (workdir / "checkpoints").mkdir(parents=True)
    (workdir / "checkpoints" / "6").write_text("not a checkpoint")
    flags = ("--config.checkpoint.on_error=continue",)
    _, err = train(work, "pretrain", workdir.name, *flags, expected=2)
    assert err.count("step 6: the checkpoint could not be saved") == 1
    assert "the newest is step 3" in err
    assert "Traceback" not in err
    (workdir / "checkpoints" / "6").unlink()
    out, _ = train(work, "pretrain", workdir.name, *flags)
    assert "resuming after step 3" in out + _
    assert (workdir / "checkpoints" / "6").is_dir()


def test_an_error_in_all_processes_is_said_once(work):
    _, err = run("pretrain", "--config=no/such.py", f"--workdir={work}/none", expected=2)
    assert err.count("error: --config=no/such.py: there is no file") == 1


def test_an_error_in_one_process_is_said_and_ends_the_others(work):
    flags = [f"--config={work}/pretrain.py:{work}", f"--workdir={work}/none"]
    wrong_in_1 = '[ "$JAX_PROCESS_ID" = 0 ] || set -- "$@" --nonsense; exec "$@"'
    command = ["sh", "-c", wrong_in_1, "sh", sys.executable, "-m", "gram_jax.pretrain", *flags]
    status, _, err = end(start(command))
    assert status == 2
    assert "[1] error: Unknown command line flag 'nonsense'" in err


AGREE = """
import sys, time
from gram_jax import distributed
from gram_jax.errors import UserError

def refuse():
    raise UserError("process 0 says no")

distributed.start()
me = distributed.process_id()
if distributed.is_main():
    time.sleep(1.5)  # longer than the others wait at a time
assert distributed.main_first(lambda: {"from": me}) == {"from": 0}
try:
    distributed.main_first(refuse)
except UserError as error:
    assert str(error) == "process 0 says no"
began = time.monotonic()
if me == 1:
    time.sleep(1.5)
distributed.barrier("met")
assert time.monotonic() - began > 1
print("agreed", me)
distributed.finish()
"""


def test_processes_wait_for_each_other_and_hear_what_process_0_did():
    status, out, err = end(start([sys.executable, "-c", AGREE], processes=3))
    assert (status, out) == (0, "agreed 0\n"), err
    assert sorted(err.splitlines()) == ["[1] agreed 1", "[2] agreed 2"]


def test_one_process_waits_for_nobody():
    assert distributed.is_main()
    distributed.barrier("alone")
    assert distributed.main_first(lambda: 3) == 3
    distributed.finish()


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (
            {"JAX_NUM_PROCESSES": "2"},
            "JAX_NUM_PROCESSES=2, but without JAX_COORDINATOR_ADDRESS and",
        ),
        ({"JAX_COORDINATOR_ADDRESS": "h"}, "but without JAX_NUM_PROCESSES and JAX_PROCESS_ID"),
        (("h", "2", "0"), "JAX_COORDINATOR_ADDRESS=h must read HOST:PORT"),
        (("h:99999", "2", "0"), "JAX_COORDINATOR_ADDRESS=h:99999 must read HOST:PORT"),
        (("h:1", "two", "0"), "JAX_NUM_PROCESSES=two must be a number"),
        (("h:1", "2", "-1"), "JAX_PROCESS_ID=-1 must be a number"),
        (("h:1", "2", "2"), "JAX_PROCESS_ID=2 must be below JAX_NUM_PROCESSES=2"),
    ],
)
def test_variables_that_do_not_make_sense_are_named(monkeypatch, variables, message):
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    if isinstance(variables, tuple):
        variables = dict(zip(names, variables, strict=True))
    for name in names:
        monkeypatch.setenv(name, variables.get(name, ""))
    with pytest.raises(UserError) as caught:
        distributed.start()
    assert message in str(caught.value)


def test_the_launcher_marks_what_processes_say():
    status, out, err = end(start(["sh", "-c", "echo $JAX_PROCESS_ID of $JAX_NUM_PROCESSES"], 3))
    assert (status, out) == (0, "0 of 3\n")
    assert sorted(err.splitlines()) == ["[1] 1 of 3", "[2] 2 of 3"]


@pytest.mark.parametrize("failing", ["0", "1"])
def test_the_launcher_stops_the_others_when_one_fails(failing):
    began = time.monotonic()
    process = start(["sh", "-c", f"[ $JAX_PROCESS_ID = {failing} ] && exit 3; sleep 60"])
    status, _, err = end(process)
    assert status == 3, err
    assert time.monotonic() - began < 15


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_the_launcher_passes_signals_on(sent, tmp_path):
    name = sent.name.removeprefix("SIG")
    waiting = (
        f'trap "exit 75" {name}; touch {tmp_path}/$JAX_PROCESS_ID; while :; do sleep 0.1; done'
    )
    process = start(["bash", "-c", waiting])
    wait_until(lambda: len(list(tmp_path.iterdir())) == 2, process)
    process.send_signal(sent)
    assert end(process)[0] == distributed.SAVED


def test_the_launcher_explains_itself():
    shown = subprocess.run([*LAUNCH, "--help"], capture_output=True, text=True, check=True)
    assert "launch/local.sh N COMMAND..." in shown.stdout
    for wrong in ([], ["2"], ["two", "true"], ["0", "true"]):
        refused = subprocess.run([*LAUNCH, *wrong], capture_output=True, text=True)
        assert (refused.returncode, refused.stderr) == (2, shown.stdout)
