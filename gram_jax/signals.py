"""SIGTERM: a machine that is about to be taken away asks the run to stop.

While the loop of a stage runs, the step is finished, a checkpoint saved, and `Preempted`
raised; before the loop, and in commands without one, it is raised at once. Another SIGTERM, after a
second or more, ends the process there and then.
"""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gram_jax.distributed import barrier, process_count
from gram_jax.mesh import place


class Preempted(BaseException):
    """The run stopped because it was asked to; the message says where it will go on.

    An entry point exits with `distributed.SAVED` then. As KeyboardInterrupt, this can be raised
    anywhere, and must not be taken for an ordinary error.
    """


# One request may come twice: sent to a group of processes, and passed on by one of them.
_SAME_SECONDS = 1.0
_END = bytes(1)  # no signal has the number 0


class StopRequest:
    """Whether SIGTERM has come. Use as a context manager; the handler before it is put back.

    Outside the main thread, where Python allows no handlers, nothing is caught.
    """

    def __init__(
        self, message: str = "stopped by SIGTERM before the first step; the same command goes on"
    ) -> None:
        """``message`` is that of a `Preempted` that is raised at once."""
        self.requested = False
        self._message = message
        self._raised = False
        self._at_once = True
        self._votes: list[jax.Array] = []
        self._restore: list[Any] = []

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            # Python runs handlers between two of its own instructions in the main thread, which may
            # be compiling for minutes. The number of a signal is written to this pipe in any case.
            self._read, self._write = os.pipe()
            os.set_blocking(self._write, False)
            self._restore = [
                signal.getsignal(signal.SIGTERM),
                signal.set_wakeup_fd(self._write, warn_on_full_buffer=False),
            ]
            self._watcher = threading.Thread(target=self._watch, name="sigterm", daemon=True)
            self._watcher.start()
            signal.signal(signal.SIGTERM, self._handle)
            os.register_at_fork(after_in_child=self._forget)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._restore:
            handler, descriptor = self._restore
            # None is a handler that was not installed from Python, and cannot be put back from it.
            signal.signal(signal.SIGTERM, signal.SIG_DFL if handler is None else handler)
            signal.set_wakeup_fd(descriptor)
            # Not by closing the pipe, which a forked worker may hold open.
            os.write(self._write, _END)
            self._watcher.join()
            os.close(self._write)
            os.close(self._read)
            self._restore = []

    def wait_for_steps(self) -> None:
        """From here on the loop asks `at_step`; nothing is raised in between.

        Processes meet here first: one that left before its first step would leave the others alone
        in theirs.
        """
        barrier("first step")
        self._at_once = False

    def at_step(self, mesh: Mesh) -> bool:
        """Whether to stop after this step; the same answer in all processes.

        With several processes, which a signal reaches at different moments or not at all, each
        gives its vote with every step, and the sum is read one step later, when it is known
        without waiting. JAX's own service (reached_preemption_sync_point) takes the signal over
        from start-up on, and a run that still prepares its data could not be stopped.
        """
        if process_count() == 1:
            return self.requested
        self._votes.append(_sum_of_votes(mesh, self.requested))
        return len(self._votes) > 1 and bool(jax.device_get(self._votes.pop(0)))

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        if self._at_once and not self._raised:
            self._raised = True  # what is done on the way out must not be cut short
            raise Preempted(self._message)

    def _forget(self) -> None:
        """In a forked worker: what ends a worker must not be written to the pipe of the run."""
        if self._restore:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def _watch(self) -> None:
        """Sees signals also while the main thread is busy."""
        first = math.inf
        while (data := os.read(self._read, 1)) != _END:
            if data[0] != signal.SIGTERM:
                continue
            self.requested = True
            now = time.monotonic()
            first = min(first, now)
            if now - first > _SAME_SECONDS:
                os.write(2, b"SIGTERM again: exiting at once\n")
                os._exit(128 + signal.SIGTERM)


def _sum_of_votes(mesh: Mesh, vote: bool) -> jax.Array:
    """How many devices belong to processes that were asked to stop; not waited for."""
    everywhere = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    mine = np.array([vote], np.int32)
    return _sum(place((mesh.size,), everywhere, lambda _: mine))


@jax.jit
def _sum(votes: jax.Array) -> jax.Array:
    return jnp.sum(votes)
