"""Connections whose client is too slow: to send the head of a request, or to read an answer.

uvicorn ends a connection that is silent after an answer (`timeout_keep_alive`) and one whose
headers are too large. It has no time-out for a request line and headers that come slowly or never,
none for the rest of a body that was answered before it had come (401, 413), and none for an answer
that is not read. Each would keep a connection for as long as its client likes, and the last one its
answer in memory. How long a body may take is limited where it is read (see
`gram_jax.serving.endpoint`).
"""

from __future__ import annotations

import asyncio
import json

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from gram_jax.serving.errors import RequestError
from gram_jax.serving.limits import Limits


def connection_class(limits: Limits) -> type[H11Protocol]:
    """The protocol of a server's connections, for `uvicorn.Config(http=...)`."""

    class Connection(_Connection):
        head_seconds, answer_seconds = limits.head_seconds, limits.seconds

    return Connection


class _Connection(H11Protocol):
    """One client's connection.

    Attributes:
      head_seconds: from its opening, or from the first byte after an answer, until the head of the
        next request is complete.
      answer_seconds: for an answer to be read, from when the system takes no more of it.
    """

    head_seconds: float
    answer_seconds: float
    _asking: asyncio.TimerHandle | None = None
    _reading: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        _cancel(self._asking)
        _cancel(self._reading)
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        _cancel(self._reading)
        # Closing would wait for the client to read the rest.
        self._reading = self.loop.call_later(self.answer_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        _cancel(self._reading)
        super().resume_writing()

    def _expect_head(self) -> None:
        """The time begins once; more bytes of the same head do not prolong it."""
        if self.transport.is_closing() or (self.cycle and not self.cycle.response_complete):
            _cancel(self._asking)
            self._asking = None
        elif self._asking is None:
            self._asking = self.loop.call_later(self.head_seconds, self._give_up)

    def _give_up(self) -> None:
        self._asking = None
        if self.transport.is_closing():
            return
        # A connection that was opened and not used, as browsers do, needs no answer.
        if self.conn.their_state is h11.IDLE and self.conn.trailing_data[0]:
            self._refuse()
        self.transport.close()

    def _refuse(self) -> None:
        reason = f"the request line and the headers did not arrive within {self.head_seconds:g} s"
        error = RequestError("slow_head", reason)
        body = json.dumps(error.body()).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        head = h11.Response(status_code=error.status, headers=headers, reason=b"Request Timeout")
        for event in (head, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
