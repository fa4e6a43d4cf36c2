"""A `gram_jax.serve` of its own process, for clients to ask."""

import contextlib
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import environments

KEY = "a key of the tests"


@contextlib.contextmanager
def serving(folder, *flags, **variables):
    """The address of a `gram_jax.serve` that is ready; it must end well when it is stopped."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "gram_jax.serve", f"--checkpoint={folder}", f"--port={port}"]
    environment = environments.variables(**variables)
    log = Path(folder).parent / f"server_{port}.log"
    with log.open("w") as stream:
        process = subprocess.Popen(
            [*command, *flags], cwd=environments.ROOT, env=environment, stdout=stream, stderr=stream
        )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + environments.TIMEOUT
        while not is_ready(url):
            assert process.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < deadline, log.read_text()[-4000:]
            time.sleep(0.2)
        yield url
        process.send_signal(signal.SIGTERM)
        assert process.wait(environments.TIMEOUT) == 0, log.read_text()[-4000:]
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def is_ready(url):
    try:
        with urllib.request.urlopen(f"{url}/ready", timeout=10) as answer:
            return answer.status == 200
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False
