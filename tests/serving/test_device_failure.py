"""A device that fails ends the process, with a status for its supervisor, and answers who waits."""

import threading
import urllib.error
from pathlib import Path

import pytest
from reward_server import serving

PROGRAM = Path(__file__).parents[1] / "lost_device.py"
GOOD = {"prompt": "What is a list?", "response": "A sequence."}


def test_a_lost_device_ends_the_process_with_status_1_after_all_are_answered(folder, tmp_path):
    log = tmp_path / "log.txt"
    many = {"items": [GOOD | {"response": f"Number {i}."} for i in range(200)]}
    answers = []

    def ask(body):
        try:
            answers.append(server.post("gram/v1/score", **body))
        except (urllib.error.URLError, ConnectionError) as error:
            answers.append(error)  # it listens no more

    with serving(folder, "--max_length=160", program=[str(PROGRAM)], log=log) as server:
        assert server.post("gram/v1/score", **GOOD)["results"]
        fatal = {"prompt": "LOST", "response": "x"}
        calls = [threading.Thread(target=ask, args=(b,)) for b in (many, many, fatal, many)]
        for call in calls:
            call.start()
        for call in calls:
            call.join()
        assert server.process.wait(60) == 1
        with pytest.raises(urllib.error.URLError):
            server.post("gram/v1/score", **GOOD)
    answered = [answer for answer in answers if isinstance(answer, dict)]
    assert {a["error"]["type"] for a in answered if "error" in a} == {"failed"}
    said = log.read_text()
    assert "Traceback (most recent call last)" in said
    assert "JaxRuntimeError: INTERNAL: " in said and "the device is lost" in said
