"""Several processes give what one gives: trained, resumed, scored and exported for real.

All of it goes through launch/local.sh, on one machine, with collectives between the processes.
"""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from gram_jax import distributed
from gram_jax.checkpoints import load_model, read_run_info
from gram_jax.config import ComputeConfig
from gram_jax.data.tokenizer import Tokenizer
from gram_jax.errors import UserError
from gram_jax.model_card import export_checkpoint
from gram_jax.models.decoder import weight_name
from gram_jax.scorer import RewardSettings
from gram_jax.scoring_job import ScoringJob, run_job

ROOT = Path(__file__).parents[1]
LAUNCH = [str(ROOT / "launch" / "local.sh")]
TIMEOUT = 240
"""Seconds for any command here: ten times what the slowest takes on two idle cores."""

pytestmark = pytest.mark.timeout(600)

PRETRAIN = """
from gram_jax.config import *

def get_config(data):
    model = ModelConfig(
        vocab_size=264, hidden_size=32, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=16,
        intermediate_size=32, max_position=64,
    )
    return Config(
        tokenizer=f"{data}/tokenizer",
        model=model,
        data=DataConfig(train=(f"{data}/text.jsonl",), row_length=64),
        train=TrainConfig(length=6, batch_rows=8, log_every=1),
        checkpoint=CheckpointConfig(every=3),
    )
"""
FINETUNE = """
from gram_jax.config import *

def get_config(data):
    return Config(
        init_from=f"{data}/one",
        data=DataConfig(
            format="preferences", train=(f"{data}/pairs.jsonl",), row_length=64, row_sequences=8,
            row_pairs=4,
        ),
        objective=ObjectiveConfig(name="smoothed_pairwise", chosen_ce=1.0),
        train=TrainConfig(length=3, batch_rows=8, log_every=1),
        checkpoint=CheckpointConfig(every=100),
    )
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with data, a tokenizer and the configs of two stages."""
    folder = tmp_path_factory.mktemp("processes")
    texts = [f"Number {i} is followed by number {i + 1}." for i in range(120)]
    write(folder / "text.jsonl", [{"text": text} for text in texts])
    pairs = [
        {"prompt": f"What follows {i}?", "chosen": f"Number {i + 1}.", "rejected": f"Not {i}."}
        for i in range(60)
    ]
    write(folder / "pairs.jsonl", pairs)
    Tokenizer.train(texts, 264).save(folder / "tokenizer")
    (folder / "pretrain.py").write_text(PRETRAIN)
    (folder / "finetune.py").write_text(FINETUNE)
    return folder


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read(path):
    return [json.loads(line) for line in path.read_bytes().splitlines()]


# A shell cannot trap what it was started ignoring, and jobs in the background ignore SIGINT.
HEARS_SIGINT = [
    sys.executable,
    "-c",
    "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL);"
    " os.execvp(sys.argv[1], sys.argv[1:])",
]


def start(command, processes=2, **environment):
    """Processes that compute together, through the launcher."""
    fast = {
        # As in conftest.py: what one test compiles, the next finds; but on CPU process 0 alone.
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
        # The time goes into compiling, for next to no computation.
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
    }
    return subprocess.Popen(
        [*HEARS_SIGINT, *LAUNCH, str(processes), *map(str, command)],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", **fast, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process):
    """Its status, standard output and standard error."""
    try:
        out, err = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        for _ in range(2):  # the second ends a process that has not noticed the first
            process.terminate()
            time.sleep(1)
        pytest.fail(f"not done after {TIMEOUT} s: {process.communicate(timeout=10)}")
    return process.returncode, out, err


def run(module, *flags, expected=0, **settings):
    status, out, err = end(start([sys.executable, "-m", f"gram_jax.{module}", *flags], **settings))
    assert status == expected, f"status {status}\n{out}\n{err}"
    return out, err


def train(work, stage, name, *flags, **settings):
    """Runs a stage in the folder of that name; returns what was said."""
    config = f"--config={work}/{stage}.py:{work}"
    return run(stage, config, f"--workdir={work}/{name}", *flags, **settings)


def losses(workdir):
    lines = [line for line in read(workdir / "metrics.jsonl") if line["split"] == "train"]
    steps = [line["step"] for line in lines]
    assert steps == sorted(set(steps)), "each step is logged once, by one process"
    return {line["step"]: (line["loss"], line["grad_norm"]) for line in lines}


def check_same_losses(workdir, expected):
    found, expected = losses(workdir), losses(expected)
    assert found.keys() == expected.keys()
    for step in expected:
        assert found[step] == pytest.approx(expected[step], rel=1e-5)


def check_same_weights(checkpoint, expected):
    models = [load_model(path, ComputeConfig()).model for path in (checkpoint, expected)]
    found, expected = (jax.tree_util.tree_leaves_with_path(model) for model in models)
    for (path, a), (_, b) in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5, err_msg=weight_name(path))


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


def before_the_end(workdir, copy):
    shutil.copytree(workdir, copy)
    shutil.rmtree(copy / "checkpoints" / "6")
    return copy


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


def rows_to_score(count):
    rows = []
    for i in range(count):
        row = {"id": i, "prompt": f"What follows {i // 4}?"}
        if i % 3 == 0:
            row |= {"chosen": f"Number {i + 1}.", "rejected": "No, no"}
        elif i % 3 == 1:
            row |= {"responses": ["a b", "Number", "a b"]}
        else:
            row |= {"response": f"{i} then"}
        rows.append(row)
    return rows


def check_same_scores(found, expected):
    assert [row["id"] for row in found] == [row["id"] for row in expected]
    for a, b in zip(found, expected, strict=True):
        assert a.keys() == b.keys()
        assert a["num_tokens"] == b["num_tokens"]
        np.testing.assert_allclose(a["logprob"], b["logprob"], rtol=1e-5)


def wait_until(condition, process):
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            pytest.fail(f"did not get there: {end(process)}")
        time.sleep(0.05)


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
