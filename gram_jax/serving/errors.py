"""What a client is told when it gets no answer."""

from __future__ import annotations

from typing import Any

from gram_jax.errors import DataError


class RequestError(Exception):
    """A request that gets an error instead of an answer.

    Attributes:
      status: of HTTP, 4xx or 5xx.
      kind: one word a program can act on, as in `KINDS`.
      message: what is wrong and what to do.
      field: where in the request, as in ``items[3].response``; None for the request as a whole.
      retry_after: seconds after which it may work, or None.
    """

    def __init__(
        self, kind: str, message: str, *, field: str | None = None, retry_after: int | None = None
    ) -> None:
        self.status, self.kind = KINDS[kind], kind
        self.message, self.field, self.retry_after = message, field, retry_after
        super().__init__(message)

    def body(self) -> dict[str, Any]:
        """What is sent."""
        return {"error": {"message": self.message, "field": self.field, "type": self.kind}}

    def headers(self) -> dict[str, str]:
        """What is sent with it."""
        found = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        if self.status == 401:
            found["WWW-Authenticate"] = "Bearer"
        return found


KINDS = {
    "bad_json": 400,
    "unauthorized": 401,
    "not_found": 404,
    "method_not_allowed": 405,
    "slow_head": 408,
    "slow_body": 408,
    "too_large": 413,
    "invalid": 422,
    "not_supported": 422,
    "queue_full": 429,
    "failed": 500,
    "not_finite": 500,
    "not_ready": 503,
    "stopping": 503,
    "timeout": 504,
}
"""Types of errors, with their HTTP status."""


def invalid(field: str | None, message: str) -> RequestError:
    """A value that cannot be used."""
    return RequestError("invalid", message, field=field)


def from_data(error: DataError, prefix: str = "") -> RequestError:
    """A fault of a row as that of a request; the row stands at ``prefix``, as in ``items[3].``."""
    field = f"{prefix}{error.field}" if error.field else prefix.rstrip(".") or None
    return invalid(field, error.reason)
