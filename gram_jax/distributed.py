"""Several processes that compute together: how they start, wait for each other and end.

Every process runs the same program on the same input; what differs is which part of each array it
holds. Process 0 alone logs and writes shared files. `launch/local.sh` starts processes on one
machine, schedulers on many; `clusters.py` finds out what a process is part of. One that is alone
pays nothing for what is here. All calls are made by every process, in the same order.

Waiting goes through the key-value store that process 0 serves, not through arrays: a collective on
CPU gives up when one process is half a minute late (the first one of a group of devices, and every
reduce-scatter: jax issue 40831), and data may take hours to prepare. A process that dies ends the
others: at once if it is process 0, else after `clusters.heartbeat_seconds`, or as the launcher sees
it.
"""

from __future__ import annotations

import collections
import json
import math
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

import jax
from jax._src.distributed import global_state  # the key-value store has no public name

from gram_jax.clusters import detect, heartbeat_seconds, tpu_metadata, with_flags
from gram_jax.errors import UserError

SAVED = 75
"""Exit status of a run that was told to end, has saved its state, and can be started again."""

_CONNECT_SECONDS = 300  # between the starts of the first process and the last
_PATIENCE_SECONDS = 20
_SHUTDOWN_SECONDS = 60
# An error that all processes find is found by all within this time.
_ERROR_SECONDS = 5.0

_T = TypeVar("_T")
_uses: collections.Counter[str] = collections.Counter()


def start(arguments: Sequence[str] = ()) -> None:
    """Joins the processes that this one is part of, before anything else is asked of JAX.

    Args:
      arguments: of the command line; see `clusters.with_flags`.

    Raises:
      UserError: what the environment says is not right, or the other processes do not answer.
    """
    environ = with_flags(os.environ, arguments)
    place = detect(environ) or tpu_metadata(environ)
    if place is None:
        return
    # JAX would take SIGTERM for itself and go on; what it means is for the program to say.
    jax.config.update("jax_enable_preemption_service", False)
    here = f"process {place.process_id} of {place.num_processes}"
    # JAX ends a process that has waited too long, with a stack trace; so this is said before.
    patience = threading.Timer(
        _PATIENCE_SECONDS, _say, [f"{here} is waiting for the others at {place.address}"]
    )
    patience.daemon = True
    patience.start()
    try:
        if place.process_id:
            _wait_for_name(here, place.address.rpartition(":")[0])
        jax.distributed.initialize(
            place.address,
            place.num_processes,
            place.process_id,
            local_device_ids=place.devices,
            cluster_detection_method="deactivate",
            initialization_timeout=_CONNECT_SECONDS,
            heartbeat_timeout_seconds=heartbeat_seconds(environ),
            shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
        )
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"{here} could not join the others at {place.address}: {error}") from error
    finally:
        patience.cancel()


def _wait_for_name(here: str, host: str) -> None:
    """Waits until the machine of process 0 has an address: its pod may start later than this one.

    Raises:
      UserError: it has none.
    """
    deadline = time.monotonic() + _CONNECT_SECONDS
    while True:
        try:
            socket.getaddrinfo(host.strip("[]"), None)
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"{here}: the machine of process 0, {host}, is not known here ({error})"
                ) from None
            time.sleep(2)


def process_id() -> int:
    """Which process this is; 0 where there is one. Asks nothing of the devices."""
    return int(global_state.process_id)


def process_count() -> int:
    """How many processes there are. Asks nothing of the devices."""
    return int(global_state.num_processes)


def is_main() -> bool:
    """Whether this is process 0, which logs and writes what is shared."""
    return process_id() == 0


def barrier(name: str) -> None:
    """Waits, however long it takes, until every process has come here."""
    if process_count() == 1:
        return
    key = _key(f"barrier/{name}")
    if is_main():
        for other in range(1, process_count()):
            _wait_for(f"{key}/{other}")
        _tell(f"{key}/all", "")
    else:
        _tell(f"{key}/{process_id()}", "")
        _wait_for(f"{key}/all")


def main_first(function: Callable[[], _T]) -> _T:
    """Runs ``function`` on process 0 alone, and gives what it returned to every process.

    The others wait, however long it takes.

    Args:
      function: returns values that JSON can hold, None among them; lists, no tuples.

    Raises:
      UserError: in every process, where it was raised in process 0.
    """
    if process_count() == 1:
        return function()
    key = _key("main_first")
    if is_main():
        try:
            value = function()
        except UserError as error:
            _tell(key, json.dumps({"error": str(error)}))
            raise
        _tell(key, json.dumps({"value": value}))
        return value
    told: dict[str, Any] = json.loads(_wait_for(key))
    if "error" in told:
        raise UserError(told["error"])
    return told["value"]  # type: ignore[no-any-return]


def told_by_all(message: str) -> list[str]:
    """What each process says here, by number; waits until all have spoken."""
    if process_count() == 1:
        return [message]
    key = _key("told_by_all")
    _tell(f"{key}/{process_id()}", message)
    return [_wait_for(f"{key}/{i}") for i in range(process_count())]


def finish() -> None:
    """Waits until every process is done, and leaves them."""
    if process_count() > 1:
        barrier("finish")
        jax.distributed.shutdown()


def fail(status: int, message: str) -> NoReturn:
    """Prints a message and ends this process with a status.

    Where all processes fail with the same message, process 0 prints it and all end in order. Where
    they do not, each prints its own, and ends without waiting for processes that will not come.
    """
    try:
        alike = _compare(message)
    except jax.errors.JaxRuntimeError:  # some processes did not fail, or are gone
        alike = False
    if is_main() or not alike:
        _say(message)
    if alike and process_count() > 1:
        jax.distributed.shutdown()
    # At once: where a batch is still being computed, the end of the interpreter crashes.
    _end_now(status)


def crash() -> NoReturn:
    """Prints the exception that is being handled, a defect, and ends this process at once."""
    traceback.print_exc()
    _end_now(1)


def _compare(message: str) -> bool:
    """Whether every process has come here with the same message."""
    if process_count() == 1:
        return True
    _tell(f"failed/{process_id()}", message)
    deadline = time.monotonic() + _ERROR_SECONDS
    found = [_wait_for(f"failed/{i}", deadline) for i in range(process_count())]
    alike = all(other == message for other in found)
    # Process 0 serves what the others read, so it stays until they have read it.
    _tell(f"compared/{process_id()}", "")
    for i in range(process_count()):
        _wait_for(f"compared/{i}", deadline + 1)
    return alike


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _end_now(status: int) -> NoReturn:
    """Ends without JAX's own end, which would wait for the other processes."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _key(name: str) -> str:
    """A name that is used once: all processes count their uses alike."""
    _uses[name] += 1
    return f"{name}/{_uses[name]}"


def _tell(key: str, value: str) -> None:
    global_state.client.key_value_set(f"gram_jax/{key}", value)  # type: ignore[union-attr]


def _wait_for(key: str, deadline: float = math.inf) -> str:
    """The value of a key once it is there.

    Raises:
      JaxRuntimeError: the deadline (of time.monotonic) has passed, or process 0 is gone.
    """
    client: Any = global_state.client
    while True:
        try:
            # A second at a time: signals are seen in between only.
            return str(client.blocking_key_value_get(f"gram_jax/{key}", 1000))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error) or time.monotonic() > deadline:
                raise
