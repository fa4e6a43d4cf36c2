"""What is too much is refused, what takes too long is dropped, and what is dropped never runs."""

import json
import socket
import threading
import time

import pytest
from live_server import live

from gram_jax.clients import reward_function
from gram_jax.errors import UserError
from gram_jax.serving.limits import Limits

SCORE = "/gram/v1/score"
GOOD = {"prompt": "What is a list?", "responses": ["A sequence.", "No."]}


def waits(condition):
    """Waits for what another thread brings about."""
    while not condition():
        time.sleep(0.01)


class Call:
    """A request in a thread of its own."""

    def __init__(self, server, body=GOOD):
        self.answer = None

        def run():
            self.answer = server.request("POST", SCORE, json.dumps(body).encode())

        self._thread = threading.Thread(target=run)
        self._thread.start()

    def result(self):
        self._thread.join()
        status, raw, headers = self.answer
        return status, json.loads(raw), headers


@pytest.fixture
def gated(make_scorer):
    """``gated(**limits)``: a server whose device stands still until ``open_gate()``."""
    from contextlib import ExitStack

    with ExitStack() as stack:

        def make(**limits):
            scorer = make_scorer(batch_rows=1)
            server = stack.enter_context(live(scorer, **limits))
            stack.callback(scorer.gate.set)  # before the server stops
            scorer.gate.clear()
            scorer.reached.clear()
            server.scorer, server.batcher = scorer, server.service.engine.batcher
            return server

        yield make


def test_a_full_queue_answers_429_and_says_when_to_try_again(gated):
    server = gated(waiting=3)
    taken = [Call(server) for _ in range(3)]
    waits(lambda: server.service.admission.requests == 3)
    status, answer, headers = Call(server).result()
    assert (status, answer["error"]["type"]) == (429, "queue_full")
    assert int(headers["retry-after"]) >= 1
    server.scorer.gate.set()
    assert [call.result()[0] for call in taken] == [200] * 3
    assert Call(server).result()[0] == 200


def test_a_time_out_is_answered_504_and_its_work_is_dropped(gated):
    server = gated(seconds=1.0)
    first = Call(server)
    waits(server.scorer.reached.is_set)  # on the device
    second = Call(server)
    assert [first.result()[0], second.result()[0]] == [504, 504]
    assert server.batcher.waiting_tokens == 0
    before = server.batcher.packed.sequences
    server.scorer.gate.set()
    waits(lambda: server.batcher.packed.sequences > before)
    assert Call(server).result()[0] == 200
    # The first was on the device already; the second never got there.
    assert server.batcher.packed.sequences - before == 4
    assert server.batcher.dropped == 2


def test_work_of_a_client_that_went_away_is_dropped_before_it_runs(gated):
    server = gated()
    first = Call(server)
    waits(server.scorer.reached.is_set)
    before = server.batcher.packed.sequences
    body = json.dumps(GOOD | {"responses": ["one", "two", "three"]}).encode()
    with socket.create_connection(("127.0.0.1", server.port)) as gone:
        gone.sendall(
            b"POST /gram/v1/score HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
        )
        gone.sendall(body)
        waits(lambda: server.batcher.waiting_tokens > 0)
    waits(lambda: server.batcher.dropped == 1)
    assert server.batcher.waiting_tokens == 0
    assert not server.batcher._turns  # its memory is given back while the device is busy
    server.scorer.gate.set()
    assert first.result()[0] == 200
    assert Call(server).result()[0] == 200
    assert server.batcher.packed.sequences - before == 4
    assert server.service.admission.requests == server.service.admission.bytes == 0


def test_a_large_request_does_not_keep_a_small_one_waiting(gated, english):
    server = gated()
    finished = []
    large = {"items": [{"prompt": text[:100], "response": text[100:150]} for text in english]}

    def run(name, body):
        finished.append((name, server.post(SCORE, body)[0]))

    threads = [threading.Thread(target=run, args=("large", large))]
    threads[0].start()
    waits(server.scorer.reached.is_set)
    threads.append(threading.Thread(target=run, args=("small", GOOD)))
    threads[1].start()
    waits(lambda: server.service.admission.requests == 2)
    waits(lambda: len(server.batcher._turns) == 2)
    server.scorer.gate.set()
    for thread in threads:
        thread.join()
    assert finished == [("small", 200), ("large", 200)]


def test_bodies_over_the_limit_are_refused_before_they_are_read(make_scorer):
    with live(make_scorer(batch_rows=1), body_bytes=1000) as server:
        large = json.dumps(GOOD | {"system": "x" * 2000}).encode()
        assert server.post(SCORE, large)[0] == 413
        with socket.create_connection(("127.0.0.1", server.port)) as sock:
            sock.sendall(b"POST /gram/v1/score HTTP/1.1\r\nHost: x\r\nContent-Length: 9999\r\n\r\n")
            assert sock.recv(100).startswith(b"HTTP/1.1 413")
        with socket.create_connection(("127.0.0.1", server.port)) as sock:
            sock.sendall(
                b"POST /gram/v1/score HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
            )
            sock.sendall(b"3e9\r\n" + b" " * 1001 + b"\r\n")
            assert sock.recv(100).startswith(b"HTTP/1.1 413")
        assert server.post(SCORE, GOOD)[0] == 200
        assert server.service.admission.bytes == 0


def test_a_body_that_does_not_arrive_is_given_up(make_scorer):
    with live(make_scorer(batch_rows=1), seconds=0.5) as server:
        with socket.create_connection(("127.0.0.1", server.port)) as sock:
            sock.sendall(b"POST /gram/v1/score HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{")
            assert sock.recv(100).startswith(b"HTTP/1.1 408")
        assert server.service.admission.requests == 0


def test_a_client_of_ours_waits_as_long_as_it_was_told(gated):
    server = gated()
    reward = reward_function(f"http://127.0.0.1:{server.port}", timeout=0.5)
    started = time.monotonic()
    with pytest.raises(UserError, match=r"score: no answer .*timed out"):
        reward(prompts=["What is a list?"], completions=["A sequence."])
    assert time.monotonic() - started < 8  # not the 10 s that it may take to say what it has


def test_limits_must_be_positive():
    with pytest.raises(UserError, match="items=0 must be positive"):
        Limits(items=0)
