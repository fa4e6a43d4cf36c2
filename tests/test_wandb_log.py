"""Weights & Biases gets what metrics.jsonl gets, from one process, and a resumed run goes on there.

With the wandb package, offline: what it would send later is read from the file it writes.
"""

import json
import os
import re
import shutil
import struct
import subprocess
import sys

import pytest
import tiny
from several_processes import make_work, read, train

from gram_jax.config import Config, TrainConfig
from gram_jax.errors import UserError
from gram_jax.loop import run_stage
from gram_jax.wandb_log import RUN_ID_FILE

pytestmark = pytest.mark.timeout(600)

ASKED = "--config.train.wandb_project=rewards"
OFFLINE = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false"}


def records(path):
    """What wandb wrote for a run: protocol buffers in LevelDB's log format.

    A header of 7 bytes, then blocks of 32 KiB that hold pieces: checksum (4 bytes), length (2),
    kind (1: whole, 2: first, 3: middle, 4: last).
    """
    from wandb.proto import wandb_internal_pb2

    content, place, record = path.read_bytes(), 7, b""
    while place < len(content):
        left = -place % 32768
        if 0 < left < 7:  # no room for a header: filled with zeros
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", content[place : place + 7])
        record += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield wandb_internal_pb2.Record.FromString(record)
            record = b""


def one_run(folder):
    """(id, {setting: value}, [line of numbers], exit status) of the only run in a wandb folder."""
    (path,) = folder.glob("offline-run-*/run-*.wandb")
    run_id, settings, lines, status = "", {}, [], None
    for record in records(path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run_id = record.run.run_id
            for item in record.run.config.update:
                settings[item.key] = json.loads(item.value_json)
        elif kind == "history":
            items = record.history.item
            line = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in items}
            lines.append({k: v for k, v in line.items() if not k.startswith("_")})
        elif kind == "exit":
            status = record.exit.exit_code
    return run_id, settings, lines, status


def lines_of(workdir):
    """metrics.jsonl as wandb should have it."""
    found = []
    for line in read(workdir / "metrics.jsonl"):
        split, step = line.pop("split"), line.pop("step")
        del line["time"]
        found.append({"step": step} | {f"{split}/{name}": value for name, value in line.items()})
    return found


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return make_work(tmp_path_factory.mktemp("wandb"))


@pytest.fixture(scope="module")
def trained(work):
    """Two processes, whose metrics are to go to a project."""
    train(work, "pretrain", "run", ASKED, processes=2, **OFFLINE)
    return work / "run"


def test_one_process_of_two_sends_every_line_and_the_config(trained):
    run_id, settings, lines, status = one_run(trained / "wandb")
    assert run_id == (trained / RUN_ID_FILE).read_text().strip()
    assert status == 0
    assert settings["optimizer"]["learning_rate"] == 3e-4
    assert settings["train"]["wandb_project"] == "rewards"
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert lines == lines_of(trained)


def test_a_resumed_run_goes_on_under_the_same_id(trained, work, tmp_path):
    workdir = work / "resumed"
    shutil.copytree(trained, workdir)
    shutil.rmtree(workdir / "checkpoints" / "6")
    (workdir / "wandb").rename(tmp_path / "before")
    train(work, "pretrain", "resumed", ASKED, processes=1, **OFFLINE)
    run_id, _, lines, _ = one_run(workdir / "wandb")
    assert run_id == one_run(tmp_path / "before")[0]
    assert [line["step"] for line in lines] == [4, 5, 6]
    assert lines == lines_of(workdir)[3:]


def script(folder, text, **environment):
    """A log in a process of its own, as wandb keeps one of its own beside it."""
    begin = "import sys\nfrom gram_jax.wandb_log import WandbLog\nfolder = sys.argv[1]\n"
    return subprocess.run(
        [sys.executable, "-c", begin + text, str(folder)],
        env={**os.environ, **OFFLINE, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_a_run_that_starts_over_is_a_new_one(tmp_path):
    (tmp_path / RUN_ID_FILE).write_text("before\n")
    start = "with WandbLog(folder, 'rewards', {}, resume_step=-1) as log: log.write(1, {'loss': 2})"
    done = script(tmp_path, start)
    assert done.returncode == 0, done.stderr
    run_id, _, lines, _ = one_run(tmp_path / "wandb")
    assert "before" != run_id == (tmp_path / RUN_ID_FILE).read_text().strip()
    assert lines == [{"step": 1, "train/loss": 2}]


def test_without_a_key_it_is_said_what_to_do(tmp_path):
    start = "WandbLog(folder, 'rewards', {}, resume_step=-1)"
    done = script(tmp_path, start, WANDB_MODE="online", HOME=str(tmp_path), WANDB_API_KEY="")
    said = done.stderr.splitlines()[-1]
    assert "UserError: config.train.wandb_project=rewards: wandb does not start" in said
    assert "`wandb login`, set WANDB_MODE=offline" in said


def test_a_run_goes_on_where_wandb_does_not(tmp_path):
    """Its process is killed between two lines."""
    text = """
import psutil
with WandbLog(folder, "rewards", {}, resume_step=-1) as log:
    log.write(1, {"loss": 2})
    children = psutil.Process().children(recursive=True)
    for child in children:
        child.kill()
    psutil.wait_procs(children)
    for step in range(2, 50):
        log.write(step, {"loss": 1})
print("trained")
"""
    done = script(tmp_path, text)
    assert (done.returncode, done.stdout) == (0, "trained\n"), done.stderr
    warning = re.findall("^warning: .*", done.stderr, flags=re.M)
    assert len(warning) == 1
    assert "Weights & Biases was not sent" in warning[0]
    assert "metrics.jsonl has it all" in warning[0]


def test_a_project_without_the_package_is_an_error_before_anything_is_done(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    config = Config(model=tiny.config(), train=TrainConfig(wandb_project="rewards"))
    with pytest.raises(UserError, match=r"wandb is not installed: pip install .*'\.\[wandb\]'"):
        run_stage(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
