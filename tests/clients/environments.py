"""The clients' environments, and scripts run in them.

`tests/clients/environments.sh` makes them, `make test-clients` calls it. Tests of a client that is
not there are skipped, and say so.
"""

import json
import os
import subprocess
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
TIMEOUT = 900
"""Seconds for any script here: ten times what the slowest takes on two cores."""


def program(environment, name="python"):
    """A program of this environment; skips the test where there is no such environment."""
    folder = ROOT / ".venv" / "clients" / environment
    if not (folder / "installed").exists():
        pytest.skip(f"{environment} is not installed; make test-clients does that")
    return str(folder / "bin" / name)


def variables(**more):
    """The environment of a script: our code, one CPU device, no network, compiled functions."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_NUM_PROCESSES")}
    return inherited | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "WANDB_MODE": "disabled",
        **more,
    }


def run(command, folder, **more):
    """Runs a command in a folder; returns what it printed."""
    environment = variables(HF_HOME=str(folder / "cache"), **more)
    done = subprocess.run(
        [str(word) for word in command],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=TIMEOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def report(environment, script, folder, *arguments):
    """What a script of this folder says at its end: one line of JSON."""
    command = [program(environment), HERE / script, folder, *arguments]
    return json.loads(run(command, folder).splitlines()[-1])
