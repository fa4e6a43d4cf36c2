"""A reward server as a process of its own, for tests."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path


class Server:
    """A running server, and what it answers."""

    def __init__(self, process, url, key=""):
        self.process, self.url, self.key = process, url, key

    def post(self, path, **body):
        """The answer's JSON, an error's too."""
        headers = {"Content-Type": "application/json", "X-API-Key": self.key}
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            return json.load(error)

    def wait(self):
        """Until it says that it is ready."""
        while True:
            assert self.process.poll() is None, "the server ended"
            try:
                with urllib.request.urlopen(self.url + "ready"):
                    return
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.1)


@contextlib.contextmanager
def serving(folder, *flags, key="", program=("-m", "gram_jax.serve"), log=None, **variables):
    """A `Server` of a checkpoint, on a free port, that ends with the block.

    What it says goes to the file ``log``, if there is one; ``variables`` are of its environment.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, *program, f"--checkpoint={folder}", f"--port={port}",
               "--row_length=256", "--batch_rows=1", *flags]  # fmt: skip
    environment = {**os.environ, "GRAM_JAX_API_KEY": key, **variables}
    with (
        Path(log or os.devnull).open("w") as said,
        subprocess.Popen(command, env=environment, stderr=said if log else None) as process,
    ):
        try:
            server = Server(process, f"http://127.0.0.1:{port}/", key)
            server.wait()
            yield server
        finally:
            process.send_signal(signal.SIGTERM)
