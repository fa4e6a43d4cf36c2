"""SIGTERM: the step is finished, a checkpoint saved, and the run goes on as if nothing had been."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny

from gram_jax import loop
from gram_jax.checkpoints import load_model
from gram_jax.config import CheckpointConfig, Config, DataConfig, TrainConfig
from gram_jax.data.tokenizer import Tokenizer
from gram_jax.distributed import SAVED
from gram_jax.loop import run_stage
from gram_jax.reporting import read_metrics
from gram_jax.signals import Preempted, StopRequest

ROOT = Path(__file__).parents[1]
STEPS = 60
RECIPE = """
from gram_jax.config import *

def get_config(data):
    return Config(
        tokenizer=f"{data}/tokenizer",
        model=ModelConfig(vocab_size=264, hidden_size=32, num_layers=1, num_heads=2,
            num_kv_heads=2, head_dim=16, intermediate_size=32, max_position=64),
        data=DataConfig(train=(f"{data}/text.jsonl",), row_length=64),
        train=TrainConfig(length=5000.0, batch_rows=8, log_every=100),
        checkpoint=CheckpointConfig(every=100000))
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    texts = [f"Number {i} is followed by number {i + 1}." for i in range(120)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    Tokenizer.train(texts, 264).save(folder / "tokenizer")
    (folder / "recipe.py").write_text(RECIPE)
    return folder


def config(data):
    return Config(
        tokenizer=str(data / "tokenizer"),
        model=tiny.config(vocab_size=264),
        compute=tiny.COMPUTE,
        data=DataConfig(train=(str(data / "text.jsonl"),), row_length=64),
        train=TrainConfig(length=float(STEPS), batch_rows=8),
        checkpoint=CheckpointConfig(every=1000),
    )


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    run_stage(config(data), workdir, quiet=True)
    return workdir


def lines(workdir):
    path = workdir / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def steps_in(workdir):
    return [int(p.name) for p in (workdir / "checkpoints").iterdir()]


@pytest.fixture(autouse=True)
def handler():
    """One that a run must put back, and that keeps a signal sent too late from ending pytest."""

    def ignore(number, frame):
        pass

    before = signal.signal(signal.SIGTERM, ignore)
    yield ignore
    found = signal.signal(signal.SIGTERM, before)
    assert found is ignore


def terminate(condition, seconds=0.0):
    """Sends SIGTERM to this process so long after a run has its handler and the condition holds."""
    before = signal.getsignal(signal.SIGTERM)

    def wait():
        deadline = time.monotonic() + 60
        while signal.getsignal(signal.SIGTERM) is before or not condition():
            if time.monotonic() > deadline:
                return
            time.sleep(0.002)
        time.sleep(seconds)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def test_a_run_that_is_stopped_again_and_again_ends_as_one_that_is_not(
    data, whole, tmp_path, handler
):
    for number in (1, 2):
        done = max(steps_in(tmp_path)) if number > 1 else 0
        thread = terminate(lambda done=done: lines(tmp_path) > done + 7)
        with pytest.raises(Preempted, match=r"stopped by SIGTERM after step \d+ of 60") as stopped:
            run_stage(config(data), tmp_path, quiet=True)
        thread.join()
        (step,) = set(steps_in(tmp_path)) - {done}
        assert done + 7 < step < STEPS
        assert f"after step {step} of 60; the same command goes on after step {step}" in str(
            stopped.value
        )
        assert lines(tmp_path) == step
        assert signal.getsignal(signal.SIGTERM) is handler
    run_stage(config(data), tmp_path, quiet=True)
    speed = {"tokens_per_second": 0.0, "time": 0.0}
    ours, theirs = ([row | speed for row in read_metrics(w)] for w in (tmp_path, whole))
    assert ours == theirs
    a, b = (load_model(w, tiny.COMPUTE).model for w in (tmp_path, whole))
    jax.tree.map(np.testing.assert_array_equal, a, b)


def stopped_run(data, workdir):
    with pytest.raises(Preempted, match="stopped by SIGTERM") as stopped:
        run_stage(config(data), workdir, quiet=True)
    return str(stopped.value)


def ends_as_one_that_is_not(data, whole, workdir):
    run_stage(config(data), workdir, quiet=True)
    speed = {"tokens_per_second": 0.0, "time": 0.0}
    ours, theirs = ([row | speed for row in read_metrics(w)] for w in (workdir, whole))
    return ours == theirs


@pytest.mark.parametrize("point", ["make_mesh", "stage_data", "make_optimizer", "make_train_step"])
def test_before_the_first_step_the_run_stops_at_once(data, whole, tmp_path, monkeypatch, point):
    real = getattr(loop, point)

    def after_a_signal(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(loop, point, after_a_signal)
        assert "before the first step" in stopped_run(data, tmp_path)
    assert not (tmp_path / "metrics.jsonl").exists()
    assert ends_as_one_that_is_not(data, whole, tmp_path)


def test_at_any_moment_of_its_start_a_run_stops_and_nothing_is_torn(data, whole, tmp_path):
    for seconds in (0.0, 0.02, 0.1, 0.4):
        thread = terminate(lambda: True, seconds)
        with contextlib.suppress(Preempted):  # on a quick machine the run may be over by then
            run_stage(config(data), tmp_path, quiet=True)
        thread.join()
    assert ends_as_one_that_is_not(data, whole, tmp_path)


def test_a_signal_during_the_last_step_does_not_turn_success_into_failure(data, tmp_path):
    thread = terminate(lambda: lines(tmp_path) >= STEPS)
    assert run_stage(config(data), tmp_path, quiet=True).steps == STEPS
    thread.join()
    assert steps_in(tmp_path) == [STEPS]


def test_in_another_thread_no_handler_is_installed(handler):
    found = []

    def use():
        with StopRequest() as stop:
            found.append((signal.getsignal(signal.SIGTERM), stop.requested))

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert found == [(handler, False)]


@pytest.mark.filterwarnings("ignore:os.fork")
def test_what_ends_a_forked_worker_does_not_stop_the_run():
    with StopRequest() as stop:
        stop.wait_for_steps()
        child = os.fork()
        if not child:
            time.sleep(30)
            os._exit(0)
        time.sleep(0.2)
        os.kill(child, signal.SIGTERM)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGTERM
        time.sleep(0.2)
        assert not stop.requested


BUSY = """
import hashlib, time
from gram_jax.signals import StopRequest
with StopRequest() as stop:
    stop.wait_for_steps()
    print("busy", flush=True)
    # Minutes in C, during which Python runs no handlers.
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
"""


def test_a_second_signal_ends_the_process_there_and_then():
    command = [sys.executable, "-c", BUSY]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout.readline() == "busy\n"
            for pause in (0.2, 1.5):  # the second of three is the same request, passed on
                process.send_signal(signal.SIGTERM)
                time.sleep(pause)
                assert process.poll() is None
            process.send_signal(signal.SIGTERM)
            _, error = process.communicate(timeout=10)
        finally:
            process.kill()
    assert process.returncode == 128 + signal.SIGTERM
    assert error == "SIGTERM again: exiting at once\n"


def start(data, workdir, **environment):
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
    }
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "gram_jax.pretrain", f"--workdir={workdir}"),
            f"--config={data}/recipe.py:{data}",
        ],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", **cache, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def stop_after(processes, told, workdir, steps):
    """Sends SIGTERM to one process once so many steps are logged; statuses and standard errors."""
    deadline = time.monotonic() + 120
    try:
        while lines(workdir) < steps:
            time.sleep(0.02)
            assert all(p.poll() is None for p in processes), processes[0].communicate()
            assert time.monotonic() < deadline
        told.send_signal(signal.SIGTERM)
        errors = [p.communicate(timeout=60)[1] for p in processes]
    finally:
        for process in processes:
            process.kill()
    return [p.returncode for p in processes], errors


def test_the_command_says_where_it_goes_on_and_exits_with_75(data, tmp_path):
    process = start(data, tmp_path)
    statuses, (error,) = stop_after([process], process, tmp_path, 3)
    assert statuses == [SAVED] == [75]
    (step,) = steps_in(tmp_path)
    assert error.splitlines()[-1] == (
        f"stopped by SIGTERM after step {step} of 5000; the same command goes on after step {step}"
    )
    assert "Traceback" not in error


def test_two_processes_of_which_one_is_told_stop_at_the_same_step(data, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": "2"}
    processes = [start(data, tmp_path, JAX_PROCESS_ID=str(i), **place) for i in (0, 1)]
    statuses, errors = stop_after(processes, processes[1], tmp_path, 3)
    assert statuses == [SAVED, SAVED], errors
    (step,) = steps_in(tmp_path)
    assert f"stopped by SIGTERM after step {step} of 5000; the same" in errors[0]
    assert "stopped by SIGTERM" not in errors[1]
    assert lines(tmp_path) == step
