"""A server in a process of its own, and clients that keep it busy."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

from benchmarks.command import is_small
from benchmarks.harness import ROOT
from benchmarks.workloads import LONGEST
from gram_jax.errors import UserError


class Reply(NamedTuple):
    """What came back.

    Attributes:
      status: of HTTP.
      answer: the JSON.
      seconds: from the first byte sent to the last one received.
    """

    status: int
    answer: Any
    seconds: float


class Connection:
    """One client's connection, used again for each request."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def open(cls, port: int) -> Self:
        """Connects."""
        return cls(*await asyncio.open_connection("127.0.0.1", port, limit=1 << 24))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.writer.close()
        with contextlib.suppress(ConnectionError):
            await self.writer.wait_closed()

    async def post(self, path: str, body: bytes, *, slowly: float = 0.0) -> Reply:
        """A request and its reply; the body goes out over ``slowly`` seconds."""
        started = time.perf_counter()
        self.writer.write(head(path, body))
        pieces = 8 if slowly else 1
        for i in range(pieces):
            cut = body[len(body) * i // pieces : len(body) * (i + 1) // pieces]
            self.writer.write(cut)
            await self.writer.drain()
            if slowly:
                await asyncio.sleep(slowly / pieces)
        status, raw = await self._reply()
        return Reply(status, json.loads(raw), time.perf_counter() - started)

    async def _reply(self) -> tuple[int, bytes]:
        lines = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines[1:] if line)
        return int(lines[0].split()[1]), await self.reader.readexactly(
            int(headers["content-length"])
        )


def head(path: str, body: bytes) -> bytes:
    """The head of a POST."""
    return (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    ).encode()


async def load(port: int, path: str, bodies: Sequence[bytes], clients: int) -> list[Reply]:
    """Replies to all bodies, in order; each client sends one when the last one is answered."""
    replies: list[Reply | None] = [None] * len(bodies)
    left = iter(range(len(bodies)))

    async def client() -> None:
        async with await Connection.open(port) as connection:
            for i in left:
                replies[i] = await connection.post(path, bodies[i])

    async with asyncio.TaskGroup() as group:
        for _ in range(min(clients, len(bodies))):
            group.create_task(client())
    return [reply for reply in replies if reply is not None]


class RunningServer:
    """A server that is ready.

    Attributes:
      compile_seconds: that it took before it was ready, loading left out.
    """

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process, self.port = process, 0
        self.compile_seconds = 0.0
        assert process.stderr is not None
        said = []
        for line in process.stderr:
            said.append(line)
            if line.startswith("listening on "):
                self.port = int(line.split(";")[0].rsplit(":", 1)[1])
            if line.startswith("ready: "):
                self.compile_seconds = float(line.split()[-2])
                break
        else:
            raise UserError(f"the server ended with status {process.wait()}:\n{''.join(said)}")
        # What it says from here on must not fill the pipe.
        threading.Thread(target=_pass_on, args=(process.stderr,), daemon=True).start()

    def metrics(self) -> dict[str, float]:
        """Its numbers without labels."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics") as answer:
            lines = answer.read().decode().splitlines()
        return {
            name: float(value)
            for name, value in (line.split() for line in lines if not line.startswith("#"))
            if "{" not in name
        }


def _pass_on(stream: Any) -> None:
    for line in stream:
        sys.stderr.write(f"  server: {line}")


def row() -> int:
    """Tokens of the server's rows, and so of the longest sequence."""
    return 512 if is_small() else LONGEST


def server_flags() -> list[str]:
    """None, unless little is to be done: few shapes to compile."""
    return [f"--row_length={row()}", "--batch_rows=1"] if is_small() else []


@contextlib.contextmanager
def serving(model: Path, *flags: str) -> Iterator[RunningServer]:
    """A server of a model, ready; asked to stop at the end.

    Raises:
      UserError: it does not start, or does not stop with status 0.
    """
    command = [sys.executable, "-m", "gram_jax.serve", f"--checkpoint={model}", "--port=0", *flags]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        yield RunningServer(process)
        process.send_signal(signal.SIGTERM)
        if status := process.wait():
            raise UserError(f"the server stopped with status {status}")
    finally:
        process.kill()
        process.wait()
