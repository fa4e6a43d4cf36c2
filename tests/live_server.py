"""A reward server inside the test's process, on a port of its own, with its engine at hand."""

import contextlib
import http.client
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from gram_jax.scorer import Scorer
from gram_jax.serving.app import make_app
from gram_jax.serving.engine import Engine
from gram_jax.serving.limits import Limits
from gram_jax.serving.server import Server, bind
from gram_jax.serving.service import Service


class Gated(Scorer):
    """A scorer whose batches wait until the gate is open; compiling does not."""

    def __init__(self, loaded, settings):
        super().__init__(loaded, settings)
        self.loaded = loaded
        self.gate = threading.Event()
        self.gate.set()
        self.reached = threading.Event()

    def run(self, batches, *, per_token=False):
        def gated():
            for batch in batches:
                self.reached.set()
                self.gate.wait()
                yield batch

        return super().run(gated(), per_token=per_token)


class Live:
    """A running server.

    Attributes:
      service: what its routes see.
    """

    def __init__(self, service, port):
        self.service, self.port = service, port

    def request(self, method, path, body=None, headers=None):
        """(status, body, headers)."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port)
        try:
            connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            return answer.status, answer.read(), dict(answer.headers)
        finally:
            connection.close()

    def post(self, path, body, headers=None):
        """(status, JSON) of a POST of JSON, or of bytes as they are."""
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        status, answer, _ = self.request("POST", path, raw, headers)
        return status, json.loads(answer)

    def good(self, path, body):
        """The answer to a request that must work."""
        status, answer = self.post(path, body)
        assert status == 200, answer
        return answer

    def all_at_once(self, requests):
        """Answers to (path, body) requests, all of them waiting together."""
        with ThreadPoolExecutor(len(requests)) as pool:
            return list(pool.map(lambda request: self.post(*request), requests))


@contextlib.contextmanager
def live(scorer, *, keys=(), checkpoint="small", **limits):
    """A `Live` server of a scorer, ready."""
    service = Service(Engine(scorer), Limits(**limits), checkpoint)
    server, listening = Server(make_app(service, keys), service, 30.0), bind("127.0.0.1", 0)
    service.engine.batcher.start()
    thread = threading.Thread(target=server.run, args=([listening],))
    port = listening.getsockname()[1]
    thread.start()
    try:
        while not (server.started and service.state() == "ready"):
            assert thread.is_alive() and service.state() in ("starting", "ready")
            time.sleep(0.02)
        yield Live(service, port)
    finally:
        service.admission.stopping = True
        thread.join()
        service.engine.batcher.stop()
        service.engine.batcher.join()
