"""Rewards from a `gram_jax.serve`, over HTTP, by the standard library alone."""

from __future__ import annotations

import http.client
import json
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from gram_jax.data.sources import Response
from gram_jax.errors import UserError
from gram_jax.scorer import Question, QuestionError

_CONNECTIONS = 16
"""Requests at once; the server puts them together into batches."""
_FIRST_SECONDS = 10.0
"""For the server to say what it has."""
_EMPTY = len(json.dumps({"items": []}))
"""Bytes of a request for nothing."""
_FIELD = re.compile(r"(?:items\[(\d+)\]\.)?(prompt|responses|response|a|b)(?:\[(\d+)\])?")


class Server:
    """A server's model.

    Attributes:
      kind: ``likelihood``, ``judge`` or ``head``.
    """

    def __init__(self, url: str, *, api_key: str | None = None, timeout: float = 180.0) -> None:
        """Asks the server what model it has; see `reward_function` for the arguments.

        Raises:
          UserError: there is no server, or it does not let us in.
        """
        _check_address(url)
        self._url, self._timeout = url.rstrip("/"), timeout
        self._headers = {"Content-Type": "application/json"}
        if key := (api_key or "").strip():  # of a file's line, with its end
            self._headers["Authorization"] = f"Bearer {_header_value(key)}"
        described = self._answer("/gram/v1/model", None, _FIRST_SECONDS, again=False)
        try:
            self.kind = str(described["reading"])
            limits = described["limits"]
            self._most_items, self._most_candidates = limits["items"], limits["candidates"]
            self._most_bytes = limits["body_bytes"]
        except (KeyError, TypeError):
            raise UserError(f"{self._url}: does not answer as a gram_jax.serve does") from None

    def rewards(
        self, questions: Sequence[Question], references: Sequence[Response] | None
    ) -> list[list[float]]:
        """See `gram_jax.clients.reward_function.Rewards`.

        Raises:
          UserError: the server is gone, or has had no room for too long.
        """
        found = [[0.0] * len(question.responses) for question in questions]
        if self.kind != "judge":
            calls = [self._scores(parts) for parts in self._bundles(questions)]
        elif references is None:
            calls = [self._ratings(number, question) for number, question in enumerate(questions)]
        else:
            calls = [
                self._comparison(number, place, question.prompt, response, references[number])
                for number, question in enumerate(questions)
                for place, response in enumerate(question.responses)
            ]
        with ThreadPoolExecutor(_CONNECTIONS) as pool:
            for part, rewards in (each for some in pool.map(self._call, calls) for each in some):
                found[part.question][part.start : part.start + len(rewards)] = rewards
        return found

    def _bundles(self, questions: Sequence[Question]) -> Iterator[list[_Part]]:
        """As much as one request may hold, again and again."""
        bundle, size = list[_Part](), _EMPTY
        most = self._most_candidates
        for number, question in enumerate(questions):
            for start in range(0, len(question.responses), most):
                responses = list(question.responses[start : start + most])
                part = _Part(number, start, {"prompt": question.prompt, "responses": responses})
                more = len(json.dumps(part.body).encode()) + 2
                if bundle and (len(bundle) == self._most_items or size + more > self._most_bytes):
                    yield bundle
                    bundle, size = [], _EMPTY
                bundle.append(part)
                size += more
        if bundle:
            yield bundle

    def _scores(self, parts: list[_Part]) -> _Call:
        return _Call("/gram/v1/score", {"items": [part.body for part in parts]}, parts)

    def _ratings(self, number: int, question: Question) -> _Call:
        body = {"prompt": question.prompt, "responses": list(question.responses)}
        return _Call("/gram/v1/rank", body, [_Part(number, 0, body)])

    def _comparison(
        self, number: int, place: int, prompt: Any, response: Response, reference: Response
    ) -> _Call:
        body = {"prompt": prompt, "a": response, "b": reference}
        return _Call("/gram/v1/compare", body, [_Part(number, place, body)])

    def _call(self, call: _Call) -> list[tuple[_Part, list[float]]]:
        try:
            answer = self._answer(call.path, call.body, self._timeout)
        except _Refused as refused:
            raise _question_error(refused, call.parts) from None
        if call.path == "/gram/v1/compare":
            return [(call.parts[0], [answer["p_a_better"]])]
        if call.path == "/gram/v1/rank":
            ranked = sorted(answer["results"], key=lambda result: result["index"])
            return [(call.parts[0], [result["reward"] for result in ranked])]
        results = answer["results"]
        return [(p, result["rewards"]) for p, result in zip(call.parts, results, strict=True)]

    def _answer(self, path: str, body: Any, seconds: float, *, again: bool = True) -> Any:
        """The JSON answer; ``again`` waits while the server is full, or not there, for ``seconds``.

        Raises:
          _Refused: the server finds fault with the body.
          UserError: the time has passed, or the request can never be answered.
        """
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._url + path, data, self._headers)
        deadline = time.monotonic() + seconds
        while True:
            wait = 1.0
            try:
                timeout = max(deadline - time.monotonic(), 0.1)  # 0 would not wait at all
                with urllib.request.urlopen(request, timeout=timeout) as response:
                    return json.load(response)
            except urllib.error.HTTPError as error:
                reason, field = _fault(error)
                if error.code in (413, 422):
                    raise _Refused(reason, field) from None
                if error.code not in (429, 503):
                    raise UserError(f"{self._url}{path}: {error.code}, {reason}") from None
                wait = _seconds(error.headers.get("Retry-After"), wait)
                problem = f"{error.code}, {reason}"
            except (OSError, http.client.HTTPException, json.JSONDecodeError) as error:
                problem = str(getattr(error, "reason", error)) or type(error).__name__
            if not again or time.monotonic() + wait > deadline:
                raise UserError(
                    f"{self._url}{path}: no answer ({problem}); is there a server, started by"
                    " python -m gram_jax.serve?"
                )
            time.sleep(wait)


def _check_address(url: str) -> None:
    try:
        parts = urllib.parse.urlsplit(url)
        is_address = bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, or too large
        is_address = False
    if not is_address:
        raise UserError(f"{url}: is no address of a server; write one as http://localhost:8000")


def _header_value(key: str) -> str:
    """A key as `http.client` sends it as UTF-8, in which the server compares it."""
    if not key.isprintable():
        raise UserError("api_key: holds a line's end or a control character; give one key alone")
    return key.encode().decode("latin-1")


class _Part(NamedTuple):
    """Some responses of a question, from the place ``start`` on, as the server reads them."""

    question: int
    start: int
    body: dict[str, Any]


class _Call(NamedTuple):
    """A request, and the parts that it asks about."""

    path: str
    body: dict[str, Any]
    parts: list[_Part]


class _Refused(Exception):
    """The server's word on a bad request, and the field that it names."""

    def __init__(self, reason: str, field: str) -> None:
        self.reason, self.field = reason, field
        super().__init__(reason)


def _fault(error: urllib.error.HTTPError) -> tuple[str, str]:
    """The reason and the field of an error's body, as far as it says them."""
    try:
        said = json.load(error)["error"]
        return str(said["message"]), str(said.get("field") or "")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return str(error.reason), ""


def _seconds(value: str | None, otherwise: float) -> float:
    """A Retry-After in seconds; a proxy may send a date instead."""
    return float(value) if value and value.isdecimal() else otherwise


def _question_error(refused: _Refused, parts: Sequence[_Part]) -> QuestionError:
    """What the server refuses, as an error in the questions."""
    match = _FIELD.match(refused.field)
    if match is None:
        return QuestionError(parts[0].question, refused.reason)
    item, name, index = match.groups()
    part = parts[int(item or 0)]
    if name == "prompt":
        return QuestionError(part.question, refused.reason, "prompt")
    if name == "b":
        return QuestionError(part.question, refused.reason, "reference")
    return QuestionError(part.question, refused.reason, "response", part.start + int(index or 0))
