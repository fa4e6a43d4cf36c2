"""The server's life: listens, compiles, answers, and stops in order."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from types import FrameType

import uvicorn
from starlette.applications import Starlette

from gram_jax.serving.service import Service
from gram_jax.watchdog import watched

_POLL_SECONDS = 0.05


class Server(uvicorn.Server):
    """uvicorn, with a stop that first says it is not ready and finishes what it took."""

    def __init__(
        self, app: Starlette, service: Service, host: str, port: int, grace_seconds: float
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                host=host,
                port=port,
                log_level="warning",
                access_log=False,
                lifespan="off",
                ws="none",
                server_header=False,
                timeout_graceful_shutdown=5,
            )
        )
        self._service, self._grace = service, grace_seconds

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal begins the stop, another one ends it at once."""
        if self._service.admission.stopping:
            os._exit(128 + sig)
        name = signal.Signals(sig).name
        print(f"{name}: finishing what was taken", file=sys.stderr, flush=True)
        self._service.admission.stopping = True

    async def main_loop(self) -> None:
        """Waits for a stop or the end of the device thread."""
        service, loop = self._service, asyncio.get_running_loop()
        deadline = None
        while service.engine.batcher.failure is None:
            await self.on_tick(0)  # the date in headers
            if service.admission.stopping:
                deadline = deadline or loop.time() + self._grace
                if not service.admission.requests or loop.time() > deadline:
                    break
            await asyncio.sleep(_POLL_SECONDS)


def serve(
    app: Starlette,
    service: Service,
    *,
    host: str,
    port: int,
    grace_seconds: float,
    stall_seconds: float,
) -> None:
    """Runs until it is asked to stop.

    Raises:
      BaseException: what ended the device thread.
      UserError: the address cannot be listened on.
    """
    server = Server(app, service, host, port, grace_seconds)
    batcher = service.engine.batcher
    with watched(stall_seconds, "serving"):
        batcher.start()
        server.run()
        if batcher.failure is not None:
            raise batcher.failure
        batcher.stop()
