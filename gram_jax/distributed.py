"""Several processes that compute together: how they start, wait for each other and end.

Every process runs the same program on the same input; what differs is which part of each array it
holds. Process 0 alone logs and writes shared files. `launch/local.sh` starts processes on one
machine; three environment variables tell each what it is part of:

  JAX_COORDINATOR_ADDRESS  HOST:PORT where process 0 listens
  JAX_NUM_PROCESSES        how many there are
  JAX_PROCESS_ID           which one this is, from 0

Without them, nothing here costs anything. All calls are made by every process, in the same order.

Waiting goes through the key-value store that process 0 serves, not through arrays: a collective on
CPU gives up when one process is half a minute late (the first one of a group of devices, and every
reduce-scatter: jax issue 40831), and data may take hours to prepare. A process that dies ends the
others: at once if it is process 0, else after `_HEARTBEAT_SECONDS`, or as the launcher sees it.
"""

from __future__ import annotations

import collections
import json
import math
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn, TypeVar

import jax
from jax._src.distributed import global_state  # the key-value store has no public name

from gram_jax.errors import UserError

SAVED = 75
"""Exit status of a run that was told to end, has saved its state, and can be started again."""

_ADDRESS, _COUNT, _ID = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
_CONNECT_SECONDS = 300  # between the starts of the first process and the last
_PATIENCE_SECONDS = 20
_HEARTBEAT_SECONDS = 100
_SHUTDOWN_SECONDS = 60
# An error that all processes find is found by all within this time.
_ERROR_SECONDS = 5.0

_T = TypeVar("_T")
_uses: collections.Counter[str] = collections.Counter()


class Place(NamedTuple):
    """Which of how many processes this is, and where process 0 listens."""

    address: str
    num_processes: int
    process_id: int


def read_environment() -> Place | None:
    """What the environment says; None where it says nothing.

    Raises:
      UserError: some of the variables are missing or are not what they must be.
    """
    values = {name: os.environ.get(name, "") for name in (_ADDRESS, _COUNT, _ID)}
    missing = [name for name, value in values.items() if not value]
    if len(missing) == len(values):
        return None
    if missing:
        found = ", ".join(f"{name}={value}" for name, value in values.items() if value)
        raise UserError(
            f"{found}, but without {' and '.join(missing)}: set all three, as launch/local.sh does,"
            " or none for one process"
        )
    host, _, port = values[_ADDRESS].rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"{_ADDRESS}={values[_ADDRESS]} must read HOST:PORT")
    numbers = []
    for name in (_COUNT, _ID):
        if not values[name].isdecimal():
            raise UserError(f"{name}={values[name]} must be a number")
        numbers.append(int(values[name]))
    place = Place(values[_ADDRESS], *numbers)
    if place.process_id >= place.num_processes:
        raise UserError(f"{_ID}={place.process_id} must be below {_COUNT}={place.num_processes}")
    return place


def start() -> None:
    """Joins the processes that the environment names, before anything else is asked of JAX.

    Raises:
      UserError: the environment is not right, or the other processes do not answer.
    """
    # Where a cluster's own variables are to be understood, they are turned into a Place here.
    place = read_environment()
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
        jax.distributed.initialize(
            *place,
            cluster_detection_method="deactivate",
            initialization_timeout=_CONNECT_SECONDS,
            heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
        )
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"{here} could not join the others at {place.address}: {error}") from error
    finally:
        patience.cancel()


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
    if alike:
        if process_count() > 1:
            jax.distributed.shutdown()
        sys.exit(status)
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
