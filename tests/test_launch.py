"""The files in launch/ for machines that are not here, as far as they can be run and checked.

launch/local.sh is run in test_processes.py, launch/slurm.sbatch in test_slurm.py.
"""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import pytest
import yaml

from gram_jax.distributed import SAVED

ROOT = Path(__file__).parents[1]
POD = ROOT / "launch" / "tpu_pod.sh"
JOBSET = ROOT / "launch" / "gke_jobset.yaml"
SCRIPTS = [*sorted((ROOT / "launch").glob("*.s*")), ROOT / "tests" / "slurm_node.sh"]
SCHEMA = json.loads((ROOT / "tests" / "jobset_schema.json").read_text())
# The test extra brings one, into the folder of the interpreter.
SHELLCHECK = shutil.which(
    "shellcheck", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
)

# Stands in for gcloud: machines are folders, and what is to run on one runs there.
GCLOUD = """#!/usr/bin/env bash
set -euo pipefail
machines=("$MACHINES"/*)
for word in "$@"; do
  case "$word" in
    describe) echo ACTIVE; exit ;;
    --worker=0) machines=("${machines[0]}") ;;
    --command=*) command=${word#--command=} ;;
  esac
done
for machine in "${machines[@]}"; do
  (cd "$machine" && HOME=$machine bash -c "$command")
done
"""


@pytest.mark.skipif(SHELLCHECK is None, reason="shellcheck is not installed: pip install '.[test]'")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_sound_in_the_eyes_of_shellcheck(script):
    done = subprocess.run([SHELLCHECK, script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def pod(*words, expected=0, **environment):
    command = [POD, "--zone=us-east5-a", *words]
    done = subprocess.run(
        list(map(str, command)),
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == expected, done.stdout + done.stderr
    return done.stdout if expected == 0 else done.stderr


def test_a_dry_run_prints_the_commands_that_ask_for_a_slice_and_runs_none():
    queued = "gcloud compute tpus queued-resources"
    said = pod("--dry-run", "create", "big", "v5p-128", "--spot", PATH="/usr/bin:/bin")
    assert said == (
        f"{queued} create big --zone=us-east5-a --node-id=big --accelerator-type=v5p-128"
        " --runtime-version=v2-alpha-tpuv5 --spot\n"
    )
    said = pod("--dry-run", "--project=p", "--slices=2", "create", "big", "v6e-256")
    assert said == (
        f"{queued} create big --zone=us-east5-a --project=p --node-count=2 --node-prefix=big"
        " --accelerator-type=v6e-256 --runtime-version=v2-alpha-tpuv6e\n"
    )
    assert pod("--dry-run", "delete", "big") == f"{queued} delete big --zone=us-east5-a --force\n"


@pytest.mark.parametrize(
    "words",
    [
        ("create", "big", "v5litepod-16"),
        ("--share=10.0.0.2:/a 'b'", "install", "big"),
        ("run", "big", "python", "-m", "gram_jax.pretrain", "--config=a 'b' $c"),
        ("status", "big"),
        ("follow", "big"),
        ("stop", "big"),
        ("delete", "big"),
    ],
    ids=lambda words: next(word for word in words if not word.startswith("-")),
)
def test_what_a_dry_run_prints_is_what_would_run(words, tmp_path):
    """Pasted into a shell, it gives gcloud and git the words that they get without --dry-run."""
    for name in ("gcloud", "git"):
        stand_in = tmp_path / name
        stand_in.write_text('#!/bin/sh\nprintf "%s\\n" "$0" "$@" >>"$LOG"\necho ACTIVE\n')
        stand_in.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    logs = [tmp_path / "printed", tmp_path / "run"]
    printed = pod("--dry-run", *words)
    environment = {**os.environ, "PATH": path, "LOG": str(logs[0])}
    subprocess.run(["bash", "-c", printed], env=environment, check=True)
    pod(*words, PATH=path, LOG=str(logs[1]))
    assert logs[0].read_text() == logs[1].read_text()


@pytest.fixture
def machines(tmp_path):
    """Two machines with gram_jax installed, and what finds them."""
    for name in ("a", "b"):
        (tmp_path / "machines" / name / "gram_jax").mkdir(parents=True)
        (tmp_path / "machines" / name / "venv" / "bin").mkdir(parents=True)
    gcloud = tmp_path / "bin" / "gcloud"
    gcloud.parent.mkdir()
    gcloud.write_text(GCLOUD)
    gcloud.chmod(0o755)
    path = f"{gcloud.parent}:{os.environ['PATH']}"
    return {"PATH": path, "MACHINES": str(tmp_path / "machines")}


def wait_until(condition):
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_command_is_started_on_all_machines_watched_and_stopped(machines):
    status = ("status", "big")
    assert pod(*status, **machines).count("nothing was started") == 2
    waiting = f"trap 'echo saved; exit {SAVED}' TERM; echo \"it's $0\"; while :; do sleep 0.1; done"
    pod("run", "big", "bash", "-c", waiting, "a $b", **machines)
    wait_until(lambda: pod(*status, **machines).count("running; it's a $b") == 2)
    refused = pod("run", "big", "true", expected=1, **machines)
    assert "a command is running; stop it first" in refused
    pod("stop", "big", **machines)
    wait_until(lambda: pod(*status, **machines).count(f"ended with status {SAVED}; saved") == 2)
    pod("run", "big", "false", **machines)
    wait_until(lambda: pod(*status, **machines).count("ended with status 1; saved") == 2)


def test_following_shows_what_process_0_says(machines):
    (Path(machines["MACHINES"]) / "a" / "run.log").write_text("step 1\n")
    (Path(machines["MACHINES"]) / "b" / "run.log").write_text("not this\n")
    following = subprocess.Popen(
        [POD, "--zone=z", "follow", "big"],
        env={**os.environ, **machines},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert following.stdout.readline() == "step 1\n"
    finally:
        os.killpg(following.pid, signal.SIGTERM)
        following.communicate(timeout=30)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "an action and a NAME are needed"),
        (("create", "big"), "create big: a TYPE is needed"),
        (("create", "big", "v7x-8"), "TYPE v7x-8 is none of"),
        (("create", "Big", "v6e-8"), "NAME Big must be of a-z"),
        (("--slices=0", "create", "big", "v6e-8"), "--slices=0 must be a number from 1"),
        (("run", "big"), "run big: a COMMAND is needed"),
        (("start", "big"), "unknown action start"),
        (("--spot", "create", "big", "v6e-8"), "unknown option --spot"),
    ],
)
def test_what_is_asked_for_wrongly_is_said(words, message):
    said = pod("--dry-run", *words, expected=2)
    assert said.startswith(f"launch/tpu_pod.sh: {message}")
    assert said.count("\n") == 1


def test_the_pod_script_explains_itself():
    shown = subprocess.run([POD, "--help"], capture_output=True, text=True, check=True)
    for word in ("create", "install", "run", "follow", "status", "stop", "delete", "--dry-run"):
        assert f" {word} " in shown.stdout


@pytest.fixture
def jobset():
    return yaml.safe_load(JOBSET.read_text())


def errors(jobset):
    found = jsonschema.Draft202012Validator(SCHEMA).iter_errors(jobset)
    return [f"{'.'.join(map(str, error.absolute_path))}: {error.message}" for error in found]


def test_the_jobset_follows_its_schema(jobset):
    assert errors(jobset) == []


def test_the_schema_knows_what_is_wrong(jobset):
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    job["template"]["spec"]["restartpolicy"] = "Never"
    job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] = ["75"]
    del jobset["spec"]["failurePolicy"]["rules"][0]["action"]
    found = "\n".join(errors(jobset))
    for part in ("'restartpolicy' was unexpected", "'75' is not of type", "'action' is a required"):
        assert part in found


def test_the_jobset_uses_each_chip_of_the_slice_once(jobset):
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod_spec = job["template"]["spec"]
    (container,) = pod_spec["containers"]
    topology = pod_spec["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    chips = math.prod(map(int, topology.split("x")))
    assert job["parallelism"] == job["completions"]
    assert job["parallelism"] * container["resources"]["limits"]["google.com/tpu"] == chips
    assert container["resources"]["requests"] == container["resources"]["limits"]


def test_the_jobset_starts_again_after_a_run_has_saved(jobset):
    (saved,) = jobset["spec"]["failurePolicy"]["rules"]
    assert saved["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert saved["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    by_code, by_condition = job["podFailurePolicy"]["rules"]
    assert by_code["action"] == by_condition["action"] == "FailJob"
    assert by_code["onExitCodes"]["operator"] == "In"
    assert by_code["onExitCodes"]["values"] == [SAVED]
    (container,) = job["template"]["spec"]["containers"]
    assert by_code["onExitCodes"]["containerName"] == container["name"]
    # Without this, Kubernetes refuses a podFailurePolicy.
    assert job["template"]["spec"]["restartPolicy"] == "Never"


def test_the_image_takes_what_an_installation_needs():
    lines = (ROOT / "launch" / "Dockerfile").read_text().splitlines()
    sources = [word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]]
    assert {"setup.py", "pyproject.toml", "README.md", "constraints.txt"} <= set(sources)
    assert all((ROOT / source).exists() for source in sources)
