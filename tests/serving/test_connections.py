"""A client too slow to ask, or to read its answer, loses its connection."""

import contextlib
import itertools
import json
import socket
import threading
import time

import pytest
import uvicorn
from live_server import live
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Route

from gram_jax.serving.connections import connection_class
from gram_jax.serving.limits import Limits
from gram_jax.serving.server import bind

LARGE = 64 << 20  # more than the system takes of what nobody reads
SLOW_HEAD = b"GET / HTTP/1.1\r\nX: "
GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


async def echo(request):
    return Response(await request.body())


async def refuse(request):
    return Response(status_code=401)


async def large(request):
    return Response(bytes(LARGE))


@contextlib.contextmanager
def serving(**limits):
    """uvicorn with our connections: (the server, ``connect()``)."""
    routes = [Route("/", echo), Route("/", echo, methods=["POST"]), Route("/large", large),
              Route("/refuse", refuse, methods=["POST"])]  # fmt: skip
    protocol = connection_class(Limits(**limits))
    config = uvicorn.Config(Starlette(routes=routes), http=protocol, log_level="warning",
                            lifespan="off", ws="none", timeout_graceful_shutdown=1)  # fmt: skip
    server, listening = uvicorn.Server(config), bind("127.0.0.1", 0)
    address = listening.getsockname()
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    try:
        waits(lambda: server.started)
        yield server, lambda: socket.create_connection(address, timeout=30)
    finally:
        server.should_exit = True
        thread.join()


def waits(condition):
    while not condition():
        time.sleep(0.01)


def drip(sock):
    """Sends a byte every 20 ms until the server ends the connection; what it said by then."""
    said = b""
    sock.settimeout(0.02)
    with contextlib.suppress(ConnectionError):
        while True:
            sock.sendall(b"x")
            with contextlib.suppress(TimeoutError):
                got = sock.recv(4096)
                if not got:
                    break
                said += got
    return said


def answer(sock):
    """One whole answer, of a server that says how long it is."""
    said = b""
    while b"\r\n\r\n" not in said:
        said += sock.recv(1)
    length = next(int(line.split(b":")[1]) for line in said.lower().split(b"\r\n")
                  if line.startswith(b"content-length:"))  # fmt: skip
    return said + b"".join(sock.recv(1) for _ in range(length))


def is_refused(said):
    head, _, body = said.partition(b"\r\n\r\n")
    error = json.loads(body)["error"]
    return (
        head.startswith(b"HTTP/1.1 408 ")
        and b"connection: close" in head.lower()
        and error["type"] == "slow_head"
        and "within 0.3 s" in error["message"]
    )


def test_a_head_that_comes_slowly_is_refused_however_often_a_byte_of_it_comes():
    with serving(head_seconds=0.3) as (server, connect), connect() as sock:
        sock.sendall(SLOW_HEAD)
        assert is_refused(drip(sock))
        waits(lambda: not server.server_state.connections)


def test_a_client_that_says_nothing_is_disconnected_without_an_answer():
    with serving(head_seconds=0.3) as (_, connect), connect() as sock:
        assert sock.recv(100) == b""


def test_a_second_head_has_no_more_time_than_the_first():
    with serving(head_seconds=0.3) as (_, connect), connect() as sock:
        sock.sendall(GET)
        assert answer(sock).startswith(b"HTTP/1.1 200")
        sock.sendall(SLOW_HEAD)
        assert is_refused(drip(sock))


def test_a_body_that_goes_on_after_its_refusal_is_cut_off():
    with serving(head_seconds=0.3) as (server, connect), connect() as sock:
        sock.sendall(b"POST /refuse HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000\r\n\r\n")
        assert answer(sock).startswith(b"HTTP/1.1 401")
        assert drip(sock) == b""
        waits(lambda: not server.server_state.connections)


def test_a_body_and_the_next_request_are_not_part_of_a_head():
    with serving(head_seconds=0.3) as (_, connect), connect() as sock:
        for size in (3, 40):
            sock.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % size)
            for _ in range(size):
                sock.sendall(b"x")
                time.sleep(0.02)
            assert answer(sock).endswith(b"\r\n\r\n" + size * b"x")
        sock.sendall(GET + GET + SLOW_HEAD)  # all at once
        assert answer(sock).startswith(b"HTTP/1.1 200")
        assert answer(sock).startswith(b"HTTP/1.1 200")


def test_an_answer_that_is_not_read_is_cut_off_and_its_memory_given_back():
    with serving(seconds=0.5) as (server, connect), connect() as sock:
        sock.sendall(b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n")
        waits(lambda: server.server_state.total_requests)
        waits(lambda: not server.server_state.connections)
        assert received(sock) < LARGE


def test_an_answer_that_is_read_slowly_but_in_time_is_whole():
    with serving(seconds=60.0) as (_, connect), connect() as sock:
        sock.sendall(b"GET /large HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        time.sleep(0.5)
        assert received(sock) > LARGE


def received(sock):
    """Bytes until the connection ends, in whatever way."""
    size = 0
    with contextlib.suppress(ConnectionError):
        for got in iter(lambda: sock.recv(1 << 20), b""):
            size += len(got)
    return size


@pytest.mark.parametrize("begun", [b"", SLOW_HEAD])
def test_slow_heads_hold_up_nobody_else(make_scorer, begun):
    body = {"prompt": "What is a list?", "response": "A sequence."}
    with (
        live(make_scorer(batch_rows=1), head_seconds=0.5) as server,
        contextlib.ExitStack() as all_,
    ):
        slow = [
            all_.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=30))
            for _ in range(50)
        ]
        for sock in slow:
            sock.sendall(begun)
        assert server.good("/gram/v1/score", body)["results"]
        answers = [b"".join(iter(lambda s=sock: s.recv(4096), b"")) for sock in slow]
        assert server.service.admission.requests == 0
    assert [a.startswith(b"HTTP/1.1 408 ") for a in answers] == [bool(begun)] * 50
    assert all(len(a) == len(b) for a, b in itertools.pairwise(answers))
