"""A process that makes no progress says where it stands and ends; one that does is left alone."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gram_jax.config import STALL_SECONDS, TrainConfig
from gram_jax.watchdog import STUCK, watched

ROOT = Path(__file__).parents[1]

STANDING = """
import threading, time
from gram_jax.watchdog import progress, watched

def stand_still():
    threading.Event().wait()

with watched(0.5, "training"):
    for _ in range(4):
        time.sleep(0.3)
        progress()
    print("moving", flush=True)
    stand_still()
"""
MOVING = """
import time
from gram_jax.watchdog import progress, watched

with watched(1.0, "training"):
    print("moving", flush=True)
    for _ in range(30):
        time.sleep(0.1)
        progress()
time.sleep(1.5)  # not watched any more
print("done")
"""


def start(code):
    command = [sys.executable, "-c", code]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_a_process_that_stands_still_shows_its_stacks_and_ends():
    with start(STANDING) as process:
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (STUCK, "moving\n") == (76, "moving\n")
    first, *rest = err.splitlines()
    assert first.startswith("no progress in training for 0.5 s (stall_seconds);")
    assert "ends with status 76; the same command goes on" in first
    assert any("in stand_still" in line for line in rest)
    assert any("in _watch" in line for line in rest), "all threads"


def test_a_process_that_was_stopped_as_a_whole_goes_on():
    with start(MOVING) as process:
        assert process.stdout.readline() == "moving\n"
        process.send_signal(signal.SIGSTOP)
        time.sleep(2.5)
        process.send_signal(signal.SIGCONT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "done\n", "")


def test_it_can_be_left_out_and_has_one_default():
    with watched(0, "training"):
        time.sleep(0.1)
    assert TrainConfig().stall_seconds == STALL_SECONDS


def test_what_goes_wrong_within_comes_out():
    with pytest.raises(KeyError), watched(60, "training"):
        raise KeyError
