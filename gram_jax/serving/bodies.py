"""The bodies of requests: read within limits, and checked field by field."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

from starlette.requests import Request

from gram_jax.data.formats import is_too_deep, kind, printable
from gram_jax.serving.errors import RequestError, invalid
from gram_jax.serving.limits import Limits, Ticket


async def read_body(request: Request, limits: Limits, ticket: Ticket) -> bytes:
    """The body of a request.

    Raises:
      RequestError: it is too large.
      starlette.requests.ClientDisconnect: the client went away.
    """
    said = request.headers.get("content-length", "")
    if said.isdecimal() and int(said) > limits.body_bytes:
        raise _too_large(limits)
    found = bytearray()
    async for chunk in request.stream():
        ticket.hold(len(chunk))
        found += chunk
        if len(found) > limits.body_bytes:
            raise _too_large(limits)
    return bytes(found)


def _too_large(limits: Limits) -> RequestError:
    return RequestError(
        "too_large", f"the body is larger than {limits.body_bytes} bytes; send fewer items at once"
    )


def parse_object(body: bytes) -> dict[str, Any]:
    """The JSON object that a body holds.

    Raises:
      RequestError: it holds none.
    """
    if not body.strip():
        raise RequestError("bad_json", "the body is empty; a JSON object is expected")
    try:
        value = json.loads(body.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RequestError("bad_json", f"not UTF-8 (byte {error.start + 1})") from None
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise RequestError("bad_json", f"not JSON: {error.msg} ({place})") from None
    except RecursionError:
        raise RequestError("bad_json", "JSON is nested too deeply") from None
    except ValueError as error:  # an integer of thousands of digits
        raise RequestError("bad_json", f"not JSON: {printable(str(error), 160)}") from None
    if not isinstance(value, dict):
        raise RequestError("bad_json", f"a JSON object is expected, not {kind(value)}")
    if is_too_deep(value):
        raise RequestError("bad_json", "JSON is nested too deeply")
    return value


def only_fields(values: Mapping[str, Any], known: Collection[str], prefix: str = "") -> None:
    """Refuses fields that would have been overlooked.

    Raises:
      RequestError: names the first one.
    """
    for name in values:
        if name not in known:
            shown = printable(str(name), 60)
            raise invalid(f"{prefix}{shown}", f"is not known; fields are {', '.join(known)}")


def flag(values: Mapping[str, Any], field: str) -> bool:
    """A field that is true or false, and may be left out."""
    value = values.get(field)
    if value is None or isinstance(value, bool):
        return bool(value)
    raise invalid(field, f"must be true or false, not {kind(value)}")


def positive(values: Mapping[str, Any], field: str) -> int | None:
    """A field that is a positive whole number, and may be left out."""
    value = values.get(field)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise invalid(field, f"must be a whole number, not {kind(value)}")
    if value < 1:
        raise invalid(field, f"must be at least 1, not {printable(str(value), 40)}")
    return value


def listed(
    values: Mapping[str, Any], field: str, most: int, what: str, *, least: int = 1
) -> list[Any]:
    """A field that is a list of ``least`` to ``most`` of something."""
    if field not in values:
        raise invalid(field, "is missing")
    value = values[field]
    if not isinstance(value, list):
        raise invalid(field, f"must be a list of {what}, not {kind(value)}")
    if len(value) < least:
        raise invalid(field, f"must be a list of at least {least} {what}; got {len(value)}")
    if len(value) > most:
        raise invalid(field, f"holds {len(value)} {what}; this server takes at most {most}")
    return value
