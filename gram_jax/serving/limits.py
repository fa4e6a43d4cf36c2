"""How much a client may ask for, and how much may wait at once."""

from __future__ import annotations

import dataclasses
import math
from types import TracebackType
from typing import Self

from gram_jax.errors import UserError
from gram_jax.serving.errors import RequestError

_BODIES = 64
"""Largest bodies that may be held at once."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Limits of a server; a request over one is refused, and the error names it.

    Attributes:
      body_bytes: of a request.
      items: questions of one request.
      candidates: responses to one prompt.
      waiting: requests at once, from the first byte of the body to the answer.
      seconds: a request may take, its body included; and its client, to read the answer.
      head_seconds: until a request's line and headers are complete.
    """

    body_bytes: int = 8 << 20
    items: int = 1024
    candidates: int = 128
    waiting: int = 1024
    seconds: float = 120.0
    head_seconds: float = 20.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if not getattr(self, field.name) > 0:
                raise UserError(f"limit {field.name}={getattr(self, field.name)} must be positive")


class Admission:
    """Counts requests from their first byte to their answer, and refuses those over the limits.

    Attributes:
      requests, bytes: in progress, of the bodies that have been read.
      stopping: none is let in any more.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.requests = self.bytes = 0
        self.stopping = False

    def enter(self, retry_after: float) -> Ticket:
        """Lets a request in; ``retry_after`` is in how many seconds what waits will be done.

        Raises:
          RequestError: the queue is full, or the server is about to end.
        """
        if self.stopping:
            raise RequestError(
                "stopping", "the server is stopping and takes no more requests", retry_after=5
            )
        if self.requests >= self.limits.waiting:
            raise RequestError(
                "queue_full",
                f"{self.requests} requests are waiting already; try again later",
                retry_after=max(1, math.ceil(retry_after)),
            )
        return Ticket(self)


class Ticket:
    """One request's place; give it back by leaving the ``with`` block."""

    def __init__(self, admission: Admission) -> None:
        self._admission, self._bytes = admission, 0
        admission.requests += 1

    def hold(self, size: int) -> None:
        """Says that so many bytes more have been read.

        Raises:
          RequestError: those of all requests are more than may be held.
        """
        self._bytes += size
        self._admission.bytes += size
        if self._admission.bytes > _BODIES * self._admission.limits.body_bytes:
            reason = "the bodies that wait already are too large together; try again later"
            raise RequestError("queue_full", reason, retry_after=1)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._admission.requests -= 1
        self._admission.bytes -= self._bytes
