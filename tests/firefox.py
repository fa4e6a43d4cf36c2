"""Debian's Firefox without a window, by Marionette, its own protocol: no driver is needed.

A message is ``LENGTH:JSON``. What is asked is [0, number, command, parameters], what is answered
[1, number, error, result].
"""

import contextlib
import json
import os
import socket
import subprocess
import time


class Firefox:
    """A browser with one page."""

    def __init__(self, connection):
        self._connection, self._reader = connection, connection.makefile("rb")
        self._number = 0
        assert self._read()["marionetteProtocol"] == 3
        self.version = self.ask("WebDriver:NewSession")["capabilities"]["browserVersion"]

    def ask(self, command, **parameters):
        """The result of a command."""
        self._number += 1
        message = json.dumps([0, self._number, command, parameters]).encode()
        self._connection.sendall(b"%d:%s" % (len(message), message))
        _, number, error, result = self._read()
        assert (number, error) == (self._number, None), (command, error)
        return result.get("value", result) if result else None

    def go(self, url):
        """Opens an address, anew."""
        self.ask("WebDriver:Navigate", url="about:blank")
        self.ask("WebDriver:Navigate", url=url)

    def run(self, script, *arguments):
        """What a function's body in JavaScript returns."""
        return self.ask("WebDriver:ExecuteScript", script=script, args=arguments)

    def wait(self, condition):
        """Until an expression in JavaScript is true."""
        while not self.run(f"return Boolean({condition})"):
            time.sleep(0.05)

    def _read(self):
        length = b"".join(iter(lambda: self._reader.read(1), b":"))
        return json.loads(self._reader.read(int(length)))


@contextlib.contextmanager
def firefox(program, folder, *options):
    """A `Firefox` of its own profile in a folder, which ends with the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (folder / "user.js").write_text(f'user_pref("marionette.port", {port});\n')
    command = [program, "--headless", "-marionette", "-profile", str(folder), *options]
    # Its caches go into the folder too.
    environment = {**os.environ, "HOME": str(folder), "XDG_CACHE_HOME": str(folder)}
    said = subprocess.DEVNULL
    with subprocess.Popen(command, env=environment, stdout=said, stderr=said) as process:
        try:
            while True:
                assert process.poll() is None, "Firefox ended"
                with contextlib.suppress(ConnectionError):
                    connection = socket.create_connection(("127.0.0.1", port))
                    break
                time.sleep(0.1)
            with connection:
                yield Firefox(connection)
        finally:
            process.terminate()
