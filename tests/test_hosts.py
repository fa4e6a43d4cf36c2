"""Many processes, as on many hosts: four give what one gives, and jobs survive the loss of some."""

import json
import os
import signal
import sys
import time

import pytest
from several_processes import (
    ONE_JOB,
    ROOT,
    Interrupted,
    all_jobs,
    before_the_end,
    check_same_losses,
    check_same_rows,
    check_same_scores,
    check_same_weights,
    end,
    losses,
    make_work,
    pairs_to_evaluate,
    read,
    rows_to_rank,
    rows_to_score,
    run,
    start,
    train,
    wait_until,
    write,
)

from gram_jax.checkpoints import read_run_info
from gram_jax.distributed import SAVED
from gram_jax.watchdog import STUCK

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with data, a tokenizer and the configs of two stages."""
    return make_work(tmp_path_factory.mktemp("hosts"))


@pytest.fixture(scope="module")
def one(work):
    """Stage 1 in one process: a checkpoint after steps 3 and 6."""
    train(work, "pretrain", "one", processes=1)
    return work / "one"


@pytest.fixture(scope="module")
def four(work):
    """The same in four processes."""
    train(work, "pretrain", "four", processes=4)
    return work / "four"


def test_four_processes_pretrain_as_one_does(one, four):
    check_same_losses(four, one)
    check_same_weights(four, one)


@pytest.mark.parametrize("processes", [2, 1])
def test_what_four_saved_goes_on_with_the_same_rows_on_fewer(work, one, four, processes):
    """Other rows, or the same in another order, would give other losses from step 4 on."""
    folder = before_the_end(four, work / f"four_{processes}")
    assert read_run_info(folder / "checkpoints" / "3").position == 3 * 8
    out = train(work, "pretrain", folder.name, processes=processes)
    assert "resuming after step 3" in "".join(out)
    check_same_losses(folder, one)
    check_same_weights(folder, one)


def test_four_processes_finetune_as_one_does(work, one):
    for name, processes in (("tuned_four", 4), ("tuned_one", 1)):
        train(work, "finetune", name, f"--config.init_from={one}", processes=processes)
    check_same_losses(work / "tuned_four", work / "tuned_one")
    check_same_weights(work / "tuned_four", work / "tuned_one")


ALL = """
import sys
from pathlib import Path
from gram_jax import distributed
from several_processes import all_jobs

distributed.start(sys.argv)
all_jobs(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
distributed.finish()
"""


@pytest.fixture(scope="module")
def expected(one, tmp_path_factory):
    """What one process writes: a folder with scores, rankings and an evaluation."""
    folder = tmp_path_factory.mktemp("expected")
    write_inputs(folder, 90)
    all_jobs(folder, one, "one")
    return folder


def write_inputs(folder, count):
    write(folder / "score.jsonl", rows_to_score(count))
    write(folder / "rank.jsonl", rows_to_rank(count))
    write(folder / "evaluate.jsonl", pairs_to_evaluate(count))


def test_four_processes_score_rank_and_evaluate_as_one_does(one, expected):
    name = "four"
    command = [sys.executable, "-c", ALL, expected, one, name]
    status, _, err = end(start(command, 4, PYTHONPATH=str(ROOT / "tests")))
    assert status == 0, err
    check_same_scores(read(expected / f"{name}.scores"), read(expected / "one.scores"))
    check_same_rows(read(expected / f"{name}.ranks"), read(expected / "one.ranks"))
    check_same_rows(*(read(expected / n / "results.jsonl") for n in (name, "one")))
    states, results = (
        [json.loads((expected / n).read_text()) for n in (name + end, "one" + end)]
        for end in (".ranks.state.json", "/results.json")
    )
    for of in ("rows", "responses", "comparisons", "hits", "longest", "labelled", "costs"):
        assert states[0]["summary"][of] == states[1]["summary"][of], of
    assert states[0]["input_sha256"] == states[1]["input_sha256"]
    for of in ("items", "pairs", "responses", "sequences", "repeated", "settings", "data"):
        assert results[0][of] == results[1][of], of
    for subset, found in results[1]["subsets"].items():
        mine = results[0]["subsets"][subset]["pairs"]
        assert mine["accuracy"] == found["pairs"]["accuracy"]
        assert mine["nll"] == pytest.approx(found["pairs"]["nll"], rel=1e-5)
    left = [path.name for path in expected.rglob("*.shards")]
    assert left == []


def test_the_commands_of_two_processes_rank_and_evaluate_as_one_does(one, expected, tmp_path):
    flags = [f"--checkpoint={one}", "--row_length=64", "--batch_rows=2"]
    out, err = run("rank", *flags, f"--input={expected}/rank.jsonl", f"--output={tmp_path}/ranks")
    assert "90 rows, 180 responses ranked by likelihood, method scalar" in out
    check_same_rows(read(tmp_path / "ranks"), read(expected / "one.ranks"))
    data = f"--data={expected}/evaluate.jsonl"
    # Of a model that is spread over both, they answer every question together.
    out, said = run("evaluate", *flags, data, f"--output={tmp_path}/results", "--mesh=fsdp=2")
    assert "accuracy" in out
    found = read(tmp_path / "results" / "results.jsonl")
    check_same_rows(found, read(expected / "one" / "results.jsonl"))
    for line in (err + said).splitlines():
        assert not line.startswith("[1]") or "[Gloo]" in line, "only process 0 speaks"


@pytest.mark.parametrize("job", ["rank", "evaluate"])
def test_what_two_processes_had_written_is_kept_when_one_goes_on_alone(tmp_path, one, job):
    write_inputs(tmp_path, 3000)
    flags = [f"--checkpoint={one}", "--row_length=64", "--batch_rows=2"]
    if job == "rank":
        flags += [f"--input={tmp_path}/rank.jsonl", f"--output={tmp_path}/out.ranks"]
        folder = tmp_path / "out.ranks.shards"
    else:
        flags += [f"--data={tmp_path}/evaluate.jsonl", f"--output={tmp_path}/out"]
        folder = tmp_path / "out" / "answers.shards"
    process = start([*remember(tmp_path), sys.executable, "-m", f"gram_jax.{job}", *flags])
    wait_until(lambda: len(files_of_pieces(folder)) >= 6, process)
    os.kill(int((tmp_path / "pid.1").read_text()), signal.SIGKILL)
    status, _, err = end(process)
    assert status == 128 + signal.SIGKILL, err
    manifest = json.loads((folder / "manifest.json").read_text())
    kept = files_of_pieces(folder)
    assert 3 <= sum(name.endswith(".json") for name in kept) < len(manifest["pieces"])

    def go_on(name="out", stream=None):
        ONE_JOB[job](tmp_path, one, name, stream)

    with pytest.raises(KeyboardInterrupt):
        go_on(stream=Interrupted(folder, pieces=len(kept) // 2 + 1))
    assert kept.items() <= files_of_pieces(folder).items(), "written again"
    go_on()
    assert not folder.exists()
    go_on("whole")
    found, expected = (
        read(tmp_path / f"{name}.ranks" if job == "rank" else tmp_path / name / "results.jsonl")
        for name in ("out", "whole")
    )
    check_same_rows(found, expected)


def remember(folder):
    """The beginning of a command that leaves the id of each process in a folder."""
    return ["sh", "-c", 'echo $$ > "$0/pid.$JAX_PROCESS_ID"; exec "$@"', str(folder)]


def score_flags(tmp_path, one, name="out"):
    flags = [f"--checkpoint={one}", f"--input={tmp_path}/in.jsonl", "--row_length=64"]
    return [*flags, f"--output={tmp_path}/{name}.jsonl", "--batch_rows=2"]


def score_command(tmp_path, one, name="out"):
    return [sys.executable, "-m", "gram_jax.score", *score_flags(tmp_path, one, name)]


def files_of_pieces(folder):
    """The pieces that are done, with what tells a file from one written again."""
    found = folder.glob("[0-9]*.json*")
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in found if "tmp" not in p.name}


def pieces(tmp_path):
    return files_of_pieces(tmp_path / "out.jsonl.shards")


def test_pieces_of_a_lost_process_are_done_by_others_and_no_piece_twice(tmp_path, one):
    write(tmp_path / "in.jsonl", rows_to_score(4000))
    process = start([*remember(tmp_path), *score_command(tmp_path, one)])
    wait_until(lambda: len(pieces(tmp_path)) >= 6, process)
    os.kill(int((tmp_path / "pid.1").read_text()), signal.SIGKILL)
    status, _, err = end(process)
    assert status == 128 + signal.SIGKILL, err
    manifest = json.loads((tmp_path / "out.jsonl.shards" / "manifest.json").read_text())
    kept = pieces(tmp_path)
    assert 3 <= sum(name.endswith(".json") for name in kept) < len(manifest["pieces"])
    assert not (tmp_path / "out.jsonl").exists()

    # Four go on where two stopped, and are told to stop.
    process = start(score_command(tmp_path, one), processes=4)
    wait_until(lambda: len(pieces(tmp_path)) > len(kept), process)
    process.send_signal(signal.SIGTERM)
    status, _, err = end(process)
    assert status == SAVED, err
    assert "stopped by SIGTERM; the same command goes on after what is written" in err
    assert kept.items() <= pieces(tmp_path).items()
    kept = pieces(tmp_path)
    assert sum(name.endswith(".json") for name in kept) < len(manifest["pieces"])

    # One alone does the rest. What was written before is in the output as it was.
    folder = tmp_path / "out.jsonl.shards"
    number = min(int(name[:5]) for name in kept if name.endswith(".json"))
    first = (folder / f"{number:05}.jsonl").read_bytes()
    run("score", *score_flags(tmp_path, one), processes=1)
    assert first in (tmp_path / "out.jsonl").read_bytes()
    assert not folder.exists()
    run("score", *score_flags(tmp_path, one, "whole"), processes=1)
    check_same_scores(read(tmp_path / "out.jsonl"), read(tmp_path / "whole.jsonl"))
    states = [
        json.loads((tmp_path / f"{name}.jsonl.state.json").read_text()) for name in ("out", "whole")
    ]
    assert states[0]["input_sha256"] == states[1]["input_sha256"]
    _, err = run("score", *score_flags(tmp_path, one), processes=1)
    assert "is complete already" in err


def test_a_bad_row_is_named_once_whoever_reads_it(tmp_path, one):
    rows = rows_to_score(400)
    rows[333] = {"prompt": "no response"}
    rows[390] = {"prompt": 3}
    write(tmp_path / "in.jsonl", rows)
    _, err = run("score", *score_flags(tmp_path, one), expected=2)
    assert err.count("in.jsonl:334: no response, responses, or chosen and rejected") == 1
    assert "Traceback" not in err


IN_STEP = """
import pathlib, sys
from gram_jax import distributed
from gram_jax.config import MeshConfig
from gram_jax.mesh import make_mesh
from gram_jax.signals import StopRequest
from gram_jax.watchdog import progress, watched

def take_steps():
    for step in range(10**9):
        assert not stop.at_step(mesh)
        progress()
        if step == 10:
            pathlib.Path(sys.argv[1]).touch()

distributed.start(sys.argv)
mesh = make_mesh(MeshConfig())
with StopRequest() as stop:
    for _ in range(3):
        stop.at_step(mesh)  # compiles
    with watched(5, "training"):
        take_steps()
"""


def test_a_process_that_hears_nothing_of_another_ends_with_its_stacks(tmp_path):
    """The other one is stopped, as by a machine that hangs: no connection is closed."""
    started = tmp_path / "started"
    process = start([*remember(tmp_path), sys.executable, "-c", IN_STEP, started])
    wait_until(started.exists, process)
    os.kill(int((tmp_path / "pid.1").read_text()), signal.SIGSTOP)
    status, _, err = end(process)
    assert status == STUCK, err
    assert "process 0 of 2: no progress in training for 5 s (stall_seconds)" in err
    assert "in take_steps" in err
    assert "in at_step" in err


def test_a_process_that_is_killed_in_training_ends_the_others_and_the_run_goes_on(work):
    workdir = work / "long"
    flags = [f"--config={work}/pretrain.py:{work}", f"--workdir={workdir}"]
    command = [sys.executable, "-m", "gram_jax.pretrain", *flags, "--config.train.length=5000"]

    def begin(after):
        process = start([*remember(work), *command])
        log = workdir / "metrics.jsonl"
        wait_until(lambda: log.exists() and log.read_bytes().count(b"\n") > after, process)
        return process

    process = begin(6)
    os.kill(int((work / "pid.1").read_text()), signal.SIGKILL)
    began = time.monotonic()
    status, _, err = end(process)
    assert time.monotonic() - began < 60
    assert status in (1, 128 + signal.SIGABRT, 128 + signal.SIGKILL), err
    assert "process 1 was ended by signal 9" in err
    assert "loop.py" in err, "where process 0 was"

    process = begin(max(losses(workdir)) + 3)
    process.send_signal(signal.SIGTERM)
    status, _, err = end(process)
    assert status == SAVED, err
    assert "resuming after step" in err
    last = max(losses(workdir))
    assert read_run_info(workdir / "checkpoints" / str(last)).position == 8 * last
