"""Ends a process that makes no progress, and says where it stands.

A process whose peers are gone, or whose device or file system does not answer, waits for ever and
says nothing. While it is watched, one that has shown no progress for the time allowed prints the
stacks of all its threads and ends with status `STUCK`, so that a scheduler can start the job again.
What is written to disk by then stays, as after a kill.

Time during which the whole process was stopped (a suspended machine, SIGSTOP) does not count. A
call that never returns and lets no other thread of Python run is not noticed.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator

from gram_jax.distributed import process_count, process_id

STUCK = 76
"""Exit status of a process that made no progress; the job can be started again."""

_marks = 0


def progress() -> None:
    """Says that something was done: a step, a batch."""
    global _marks
    _marks += 1


@contextlib.contextmanager
def watched(seconds: float, doing: str) -> Iterator[None]:
    """Within it, `progress` must be called at least every so many seconds; 0 = never."""
    if not seconds:
        yield
        return
    done = threading.Event()
    thread = threading.Thread(
        target=_watch, args=(seconds, doing, done), name="watchdog", daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _watch(seconds: float, doing: str, done: threading.Event) -> None:
    interval = min(seconds / 10, 5.0)
    idle, seen, before = 0.0, _marks, time.monotonic()
    while not done.wait(interval):
        now = time.monotonic()
        # Longer than it slept, this thread was stopped, and so were the others.
        idle += min(now - before, 2 * interval)
        before = now
        if seen != _marks:
            seen, idle = _marks, 0.0
        if idle > seconds:
            _end(seconds, doing)


def _end(seconds: float, doing: str) -> None:
    place = f"process {process_id()} of {process_count()}: " if process_count() > 1 else ""
    sys.stdout.flush()
    sys.stderr.flush()
    message = (
        f"{place}no progress in {doing} for {seconds:g} s (stall_seconds); what its threads were"
        f" doing follows. It ends with status {STUCK}; the same command goes on\n"
    )
    os.write(2, message.encode())
    faulthandler.dump_traceback(2)
    os._exit(STUCK)
