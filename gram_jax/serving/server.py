"""The server's life: listens, compiles, answers, and stops in order."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import time
from types import FrameType

import uvicorn
from starlette.applications import Starlette

from gram_jax.errors import UserError
from gram_jax.serving.connections import connection_class
from gram_jax.serving.service import Service
from gram_jax.watchdog import watched

_POLL_SECONDS = 0.05
_LAST_SECONDS = 5
"""For answers that are written already to leave, and for a batch that nobody waits for to end."""


def bind(host: str, port: int) -> socket.socket:
    """A socket at this address, which nobody is answered on yet; port 0 is a free one.

    Raises:
      UserError: the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, port))
    except OSError as error:
        found.close()
        reason = f"--host={host} --port={port}: cannot listen there ({error.strerror or error})"
        raise UserError(f"{reason}; choose another port") from None
    return found


class Server(uvicorn.Server):
    """uvicorn, with a stop that first says it is not ready and finishes what it took.

    Attributes:
      unfinished: requests that were not finished when the stop had taken too long.
    """

    def __init__(self, app: Starlette, service: Service, grace_seconds: float) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=connection_class(service.limits),
                log_level="warning",
                access_log=False,
                lifespan="off",
                ws="none",
                server_header=False,
                timeout_graceful_shutdown=_LAST_SECONDS,
            )
        )
        self.unfinished = 0
        self._service, self._grace = service, grace_seconds

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal begins the stop, another one ends it at once."""
        if self._service.admission.stopping:
            os._exit(128 + sig)
        _say(f"{signal.Signals(sig).name}: finishing what was taken")
        self._service.admission.stopping = True

    async def main_loop(self) -> None:
        """Waits for a stop or the end of the device thread."""
        service, loop = self._service, asyncio.get_running_loop()
        started, told, deadline = loop.time(), False, None
        while service.engine.batcher.failure is None:
            await self.on_tick(0)  # the date in headers
            if service.admission.stopping:
                deadline = deadline or loop.time() + self._grace
                if not service.admission.requests or loop.time() > deadline:
                    break
            elif not told and service.engine.batcher.ready:
                told = True
                _say(f"ready: all shapes compiled in {loop.time() - started:.1f} s")
            await asyncio.sleep(_POLL_SECONDS)
        self.unfinished = service.admission.requests


def serve(
    app: Starlette,
    service: Service,
    listening: socket.socket,
    *,
    grace_seconds: float,
    stall_seconds: float,
) -> int:
    """Runs until it is asked to stop, and returns how many requests were left unfinished then.

    Raises:
      BaseException: what ended the device thread.
    """
    server = Server(app, service, grace_seconds)
    batcher = service.engine.batcher
    host, port = listening.getsockname()[:2]
    _say(f"listening on http://{f'[{host}]' if ':' in host else host}:{port}; compiling")
    with watched(stall_seconds, "serving"):
        batcher.start()
        server.run(sockets=[listening])
        if batcher.failure is not None:
            raise batcher.failure
        batcher.stop()
        ending = time.monotonic()
        if not batcher.join(_LAST_SECONDS):
            # The end of the interpreter would crash beside a batch that is being computed.
            _say(f"a batch was still being computed {time.monotonic() - ending:.0f} s later")
            os._exit(1 if server.unfinished else 0)
    return server.unfinished


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
