"""The command: starts, stops in order, and ends with a status when it cannot go on."""

import json
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
from live_server import Gated, Live
from reward_server import serving

from gram_jax.scorer import Question
from gram_jax.serving.app import make_app
from gram_jax.serving.batching import Work
from gram_jax.serving.engine import Engine
from gram_jax.serving.limits import Limits
from gram_jax.serving.server import bind, serve
from gram_jax.serving.service import Service

SCORE = "/gram/v1/score"
GOOD = {"prompt": "What is a list?", "responses": ["A sequence.", "No."]}


def test_sigterm_finishes_what_was_taken_and_refuses_what_comes(folder):
    items = [{"prompt": f"Number {i}?", "response": "A sequence. " * 12} for i in range(1000)]
    answers, seen = [], []
    with serving(folder, "--max_length=160") as server:
        wanted = server.post(SCORE[1:], items=items[:3])["results"]
        asking = threading.Thread(
            target=lambda: answers.append(server.post(SCORE[1:], items=items))
        )
        asking.start()
        while "gram_requests_in_progress 1.0" not in metrics(server):
            assert asking.is_alive()
        server.process.send_signal(signal.SIGTERM)
        while asking.is_alive():
            try:
                seen.append(status(server, "ready"))
                seen.append(status(server, "health"))
                seen.append(server.post(SCORE[1:], **GOOD)["error"]["type"])
            except (urllib.error.URLError, ConnectionError):
                break  # it listens no more
        asking.join()
        assert server.process.wait(60) == 0
    assert (503, "stopping") in seen and (200, "ok") in seen and "stopping" in seen
    (answer,) = answers
    assert len(answer["results"]) == 1000
    for found, number in zip(answer["results"], wanted, strict=False):
        np.testing.assert_allclose(found["rewards"], number["rewards"], rtol=1e-5)


def status(server, path):
    try:
        with urllib.request.urlopen(server.url + path, timeout=120) as answer:
            return answer.status, json.load(answer)["status"]
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)["status"]


def metrics(server):
    with urllib.request.urlopen(server.url + "metrics", timeout=120) as answer:
        return answer.read().decode()


def test_what_cannot_be_started_says_why(folder, tmp_path):
    empty = tmp_path / "keys.txt"
    empty.write_text("\n")
    command = [sys.executable, "-m", "gram_jax.serve", f"--checkpoint={folder}"]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        wrong = [
            (f"--api_key_file={empty}", "holds no key; write one a line"),
            (f"--port={port}", f"--host=127.0.0.1 --port={port}: cannot listen there"),
            ("--head_seconds=0", "flag --head_seconds=0"),
        ]
        for flag, reason in wrong:
            done = subprocess.run([*command, flag], capture_output=True, text=True, timeout=280)
            assert done.returncode == 2
            assert reason in done.stderr and "Traceback" not in done.stderr


class Failing(Gated):
    """A scorer whose device fails once the gate is open, after it has compiled."""

    is_failing = False

    def run(self, batches, *, per_token=False):
        yield from super().run(batches, per_token=per_token)
        if self.is_failing:
            raise RuntimeError("the device is lost")


def test_a_failed_device_answers_everyone_and_ends_the_server(make_scorer):
    made = make_scorer(batch_rows=1)
    scorer = Failing(made.loaded, made.settings)
    service = Service(Engine(scorer), Limits(), "small")
    listening, ended = bind("127.0.0.1", 0), []

    def run():
        with pytest.raises(RuntimeError, match="the device is lost"):
            serve(make_app(service), service, listening, grace_seconds=30, stall_seconds=0)
        ended.append(True)

    thread = threading.Thread(target=run)
    thread.start()
    server = Live(service, listening.getsockname()[1])
    while service.state() != "ready":
        time.sleep(0.02)
    scorer.is_failing = True
    scorer.gate.clear()
    scorer.reached.clear()
    answers = []
    calls = [
        threading.Thread(target=lambda: answers.append(server.post(SCORE, GOOD))) for _ in range(3)
    ]
    calls[0].start()
    scorer.reached.wait()  # computed before the failure
    calls[1].start()
    calls[2].start()
    while len(service.engine.batcher._turns) < 2:
        time.sleep(0.01)
    scorer.gate.set()
    for call in calls:
        call.join()
    thread.join()
    assert ended == [True]
    assert service.state() == "failed"
    assert sorted(code for code, _ in answers) == [200, 500, 500]
    assert {a["error"]["type"] for code, a in answers if code == 500} == {"failed"}
    # One that came too late is told at once, and may be dropped.
    told = []
    work = Work([scorer.encode(Question("a", ["b"]))], scorer.shapes[-1], told.append)
    service.engine.batcher.add(work)
    service.engine.batcher.drop(work)
    assert told == [service.engine.batcher.failure]
