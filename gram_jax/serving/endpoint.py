"""What every route that computes does: lets a request in, reads it, and waits for its answer.

A request ends in one of five ways: an answer, an error that names what is wrong with it, a
time-out, the client's going away, or the end of the server. In the last three, what of it is not on
the device yet is never computed.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from gram_jax.serving.bodies import parse_object, read_body
from gram_jax.serving.engine import DeviceError
from gram_jax.serving.errors import RequestError
from gram_jax.serving.limits import Ticket
from gram_jax.serving.metrics import Metrics
from gram_jax.serving.service import Service

Handler: TypeAlias = Callable[[Service, dict[str, Any]], Awaitable[dict[str, Any]]]

_log = logging.getLogger("gram_jax.serving")
CLIENT_GONE = 499
"""Status in metrics of a request whose client did not wait; nothing is sent."""


_LARGE = 1 << 14
"""Bytes of a body whose answer may be so long that others would wait while it is written."""


def json_response(
    content: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None
) -> Response:
    """JSON, with numbers that JSON has."""
    return Response(_dump(content), status, headers, "application/json")


def _dump(content: dict[str, Any]) -> str:
    return json.dumps(content, allow_nan=False, separators=(",", ":"))


def error_response(error: RequestError) -> Response:
    """An error as it is sent."""
    return json_response(error.body(), error.status, error.headers())


def endpoint(
    service: Service, metrics: Metrics, path: str, handler: Handler
) -> Callable[[Request], Awaitable[Response]]:
    """A route that answers a JSON object with a JSON object."""

    async def respond(request: Request) -> Response:
        started = time.monotonic()
        response = await outcome(request)
        metrics.ended(path, response.status_code, time.monotonic() - started)
        return response

    async def outcome(request: Request) -> Response:
        try:
            with service.admission.enter(service.seconds_waiting()) as ticket:
                if not service.engine.batcher.ready:
                    raise RequestError(
                        "not_ready", "the model is being compiled; try again later", retry_after=5
                    )
                return await _answer(service, handler, request, ticket)
        except RequestError as error:
            return error_response(error)
        except ClientDisconnect:
            return Response(status_code=CLIENT_GONE)

    return respond


async def _answer(service: Service, handler: Handler, request: Request, ticket: Ticket) -> Response:
    seconds = service.limits.seconds
    begun = asyncio.get_running_loop().time()
    try:
        async with asyncio.timeout(seconds):
            body = await read_body(request, service.limits, ticket)
    except TimeoutError:
        reason = f"the body did not arrive within {seconds:g} s"
        raise RequestError("slow_body", reason) from None
    left = seconds - (asyncio.get_running_loop().time() - begun)
    work = asyncio.ensure_future(_handle(service, handler, body))
    gone = asyncio.ensure_future(_until_gone(request))
    try:
        await asyncio.wait({work, gone}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            return work.result()
        if gone.done():
            raise ClientDisconnect
        reason = f"no answer within {seconds:g} s; send less at once, or try again later"
        raise RequestError("timeout", reason)
    finally:
        for task in (work, gone):
            task.cancel()
        await asyncio.gather(work, gone, return_exceptions=True)


async def _handle(service: Service, handler: Handler, body: bytes) -> Response:
    try:
        answer = await handler(service, await service.engine.aside(parse_object, body))
        if len(body) < _LARGE:
            return json_response(answer)
        text = await service.engine.aside(_dump, answer)
        return Response(text, media_type="application/json")
    except (RequestError, asyncio.CancelledError):
        raise
    except DeviceError:
        raise RequestError("failed", "the model failed, and the server is ending") from None
    except Exception:
        # A defect of one route must not look like a broken connection; its traceback is kept.
        _log.exception("a request failed")
        raise RequestError("failed", "the server made a mistake; its log says more") from None


async def _until_gone(request: Request) -> None:
    """Waits until the client goes away."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
