"""The application: routes, the key that opens them, and the page."""

from __future__ import annotations

import hmac
import logging
from collections.abc import Iterable
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gram_jax.serving import openrlhf_route, own_routes, vllm_routes
from gram_jax.serving.endpoint import Handler, endpoint, error_response, json_response
from gram_jax.serving.errors import RequestError
from gram_jax.serving.metrics import CONTENT_TYPE, Metrics
from gram_jax.serving.openapi import describe
from gram_jax.serving.openapi_page import page
from gram_jax.serving.service import Service

OPEN = ("/health", "/ready", "/", "/docs", "/openapi.json")
"""Paths that need no key, besides the files of the page."""
PAGE = Path(__file__).parent / "page"

ROUTES: dict[str, Handler] = {
    "/gram/v1/score": own_routes.score,
    "/gram/v1/rank": own_routes.rank_responses,
    "/gram/v1/compare": own_routes.compare,
    "/get_reward": openrlhf_route.get_reward,
    "/classify": vllm_routes.classify,
    "/pooling": vllm_routes.pooling,
    "/score": vllm_routes.score,
    "/v1/score": vllm_routes.score,
    "/rerank": vllm_routes.rerank,
    "/v1/rerank": vllm_routes.rerank,
    "/v2/rerank": vllm_routes.rerank,
    "/generative_scoring": vllm_routes.generative_scoring,
}
"""Paths that compute, all of them POST."""

_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none';"
    " frame-ancestors 'none'; object-src 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def make_app(service: Service, keys: Iterable[str] = ()) -> Starlette:
    """The application of a reward model; requests need one of ``keys`` if there are any."""
    numbers = Metrics(service)
    routes: list[BaseRoute] = [
        Route(path, endpoint(service, numbers, path, handler), methods=["POST"])
        for path, handler in ROUTES.items()
    ]

    async def model(_: Request) -> Response:
        return json_response(service.model())

    async def health(_: Request) -> Response:
        failed = service.engine.batcher.failure is not None
        return json_response({"status": "failed" if failed else "ok"}, 503 if failed else 200)

    async def ready(_: Request) -> Response:
        state = service.state()
        return json_response({"status": state}, 200 if state == "ready" else 503)

    async def metrics(_: Request) -> Response:
        return Response(numbers.text(), media_type=CONTENT_TYPE)

    described = describe(service)

    async def openapi(_: Request) -> Response:
        return json_response(described)

    async def docs(_: Request) -> Response:
        return Response(page(described), media_type="text/html")

    routes += [
        Route("/gram/v1/model", model),
        Route("/health", health),
        Route("/ready", ready),
        Route("/metrics", metrics),
        Route("/openapi.json", openapi),
        Route("/docs", docs),
    ]
    if (PAGE / "index.html").is_file():
        routes.append(Route("/", _index))
    routes.append(Mount("/page", StaticFiles(directory=PAGE)))
    middleware = [Middleware(_Headers), Middleware(_Keys, keys=tuple(keys))]
    handlers = {HTTPException: _http_error, Exception: _defect}
    return Starlette(routes=routes, middleware=middleware, exception_handlers=handlers)


async def _index(_: Request) -> Response:
    return FileResponse(PAGE / "index.html")


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        found = RequestError("method_not_allowed", f"this path takes {allowed}")
    else:
        found = RequestError("not_found", "there is nothing here; /docs lists the paths")
    response = error_response(found)
    response.headers.update(error.headers or {})
    return response


async def _defect(request: Request, error: Exception) -> Response:
    logging.getLogger("gram_jax.serving").error("a request failed", exc_info=error)
    return error_response(RequestError("failed", "the server made a mistake; its log says more"))


class _Headers:
    """Adds what keeps a browser from loading anything from elsewhere."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._added = [(k.lower().encode(), v.encode()) for k, v in _HEADERS.items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", []), *self._added]}
            await send(message)

        await self._app(scope, receive, send_with)


class _Keys:
    """Refuses requests without a key, if there are keys."""

    def __init__(self, app: ASGIApp, keys: tuple[str, ...]) -> None:
        self._app, self._keys = app, [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._keys and not self._is_open(scope):
            error = RequestError(
                "unauthorized",
                "a key is needed: send the header Authorization: Bearer KEY, or X-API-Key: KEY",
            )
            await error_response(error)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _is_open(self, scope: Scope) -> bool:
        if scope["path"] in OPEN or scope["path"].startswith("/page/"):
            return True
        headers = dict(scope["headers"])
        scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
        given = token.strip() if scheme.lower() == b"bearer" else headers.get(b"x-api-key", b"")
        # All are compared, so that the time tells nothing.
        found = [hmac.compare_digest(given, key) for key in self._keys]
        return any(found)
