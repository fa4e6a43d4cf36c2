"""launch/slurm.sbatch does what its header says, in a real Slurm of one node (slurm_node.sh)."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from gram_jax.data.tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]
# Debian keeps the daemons where only root's PATH looks.
PATH = f"{os.environ['PATH']}:/usr/sbin"
MISSING = [
    name
    for name in ("slurmctld", "slurmd", "sbatch", "munged")
    if not shutil.which(name, path=PATH)
]
TIMEOUT = 240
"""Seconds for any wait here: ten times what the longest takes on two idle cores."""

pytestmark = [
    pytest.mark.skipif(
        bool(MISSING), reason=f"{', '.join(MISSING)} not installed: apt-get install slurm-wlm munge"
    ),
    pytest.mark.timeout(600),
]

CONFIG = """
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
        train=TrainConfig(length=60, batch_rows=8, log_every=1),
        checkpoint=CheckpointConfig(every=1000),
    )
"""
# A command that does nothing until it is told to stop, and then "saves".
WAIT = 'trap "exit 75" TERM; touch "$0.$JAX_PROCESS_ID"; while :; do sleep 0.1; done'


def wait_until(condition, what):
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline, f"not within {TIMEOUT} s: {what()}"
        time.sleep(0.1)


class Slurm:
    """Jobs of launch/slurm.sbatch with two processes; what they say goes to ``folder``."""

    def __init__(self, folder, config):
        self.folder = folder
        self.environment = {
            **os.environ,
            "SLURM_CONF": str(config),
            # As in test_processes.py.
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
            "XLA_FLAGS": "--xla_backend_optimization_level=0",
        }

    def run(self, *command):
        done = subprocess.run(
            list(map(str, command)), env=self.environment, cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def submit(self, *command):
        flags = ["--nodes=1", "--ntasks-per-node=2", f"--output={self.folder}/%j.out"]
        return self.run("sbatch", "--parsable", *flags, "launch/slurm.sbatch", *command)

    def job(self, job):
        """What Slurm knows about a job."""
        words = self.run("scontrol", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def said(self, job):
        return (self.folder / f"{job}.out").read_text()

    def wait_for(self, job, **expected):
        """Waits until Slurm says this about the job."""

        def is_so():
            known = self.job(job)
            return all(known[name] == value for name, value in expected.items())

        wait_until(is_so, lambda: f"{expected}, but {self.job(job)}\n{self.said(job)}")

    def wait_for_files(self, job, *paths):
        wait_until(lambda: all(path.exists() for path in paths), lambda: self.said(job))


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slurm")
    with (folder / "node.out").open("w") as out:
        node = subprocess.Popen(
            [ROOT / "tests" / "slurm_node.sh", folder / "node"], stdout=out, stderr=out
        )

    def said():
        return (folder / "node.out").read_text()

    wait_until(lambda: "ready" in said() or node.poll() is not None, said)
    assert node.poll() is None, said()
    yield Slurm(folder, folder / "node" / "slurm.conf")
    node.terminate()
    node.wait(timeout=TIMEOUT)


def test_a_run_that_gets_sigterm_saves_is_requeued_and_goes_on(slurm, tmp_path):
    texts = [f"Number {i} is followed by number {i + 1}." for i in range(120)]
    rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "text.jsonl").write_text(rows)
    Tokenizer.train(texts, 264).save(tmp_path / "tokenizer")
    (tmp_path / "config.py").write_text(CONFIG)
    flags = [f"--config={tmp_path}/config.py:{tmp_path}", f"--workdir={tmp_path}/run"]
    job = slurm.submit(sys.executable, "-m", "gram_jax.pretrain", *flags)
    log = tmp_path / "run" / "metrics.jsonl"
    wait_until(lambda: log.exists() and b"\n" in log.read_bytes(), lambda: slurm.said(job))
    slurm.run("scancel", "--signal=TERM", job)
    slurm.wait_for(job, JobState="COMPLETED", Restarts="1")
    said = slurm.said(job)
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert steps == list(range(1, 61)), "each step is done once"
    for line in (
        "start 1, 2 processes",
        "stopped by SIGTERM after step",
        "saved; back into the queue",
        "start 2, 2 processes",
        "resuming after step",
        "done: 60 steps",
    ):
        assert said.count(line) == 1, said


def test_a_job_that_is_preempted_goes_on_after_the_other(slurm, tmp_path):
    job = slurm.submit("bash", "-c", WAIT, tmp_path / "here")
    slurm.wait_for_files(job, tmp_path / "here.0", tmp_path / "here.1")
    flags = ["--partition=urgent", "--exclusive", f"--output={tmp_path}/urgent.out"]
    urgent = slurm.run("sbatch", "--parsable", *flags, "--wrap=sleep 1")
    slurm.wait_for(urgent, JobState="COMPLETED")
    slurm.wait_for(job, JobState="PENDING", Restarts="1")
    slurm.run("scancel", job)


def test_a_job_that_is_cancelled_does_not_come_back(slurm, tmp_path):
    job = slurm.submit("bash", "-c", WAIT, tmp_path / "here")
    slurm.wait_for_files(job, tmp_path / "here.0", tmp_path / "here.1")
    slurm.run("scancel", job)
    slurm.wait_for(job, JobState="CANCELLED", Restarts="0")


def test_a_command_that_fails_fails_the_job(slurm):
    job = slurm.submit("bash", "-c", 'exit "$((JAX_PROCESS_ID + 1))"')
    slurm.wait_for(job, JobState="FAILED", ExitCode="2:0", Restarts="0")


def test_without_a_command_the_script_says_how_it_is_used():
    done = subprocess.run(
        ["bash", ROOT / "launch" / "slurm.sbatch"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr == "use: sbatch [--nodes=N ...] launch/slurm.sbatch COMMAND...\n"
