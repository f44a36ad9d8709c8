"""Starts a command that serves a local page, for tests of labels and votes."""

from __future__ import annotations

import http.client
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class LocalPage:
    """A page that a running command serves; :attr:`output` is what the command printed before it ended."""

    def __init__(self, port: int, token: str):
        self.connection, self.token, self.output = (
            http.client.HTTPConnection("127.0.0.1", port, timeout=10),
            token,
            "",
        )

    def get(self) -> str:
        """Return the page."""
        self.connection.request("GET", f"/{self.token}/")
        return self.connection.getresponse().read().decode()

    def act(self, body: str) -> http.client.HTTPResponse:
        """Send an answer."""
        self.connection.request("POST", f"/{self.token}/act", body, {"Content-Type": "application/json"})
        return self.connection.getresponse()


@contextmanager
def served_page(*arguments: Any, ends_within: float = 30) -> Iterator[LocalPage]:
    """Yield the page that a `dreamfleet` command serves; end the command by Ctrl-C, with exit code 0.

    ``ends_within``: the seconds that this may take.
    """
    command = [sys.executable, "-m", "dreamfleet.cluster.cli", *map(str, arguments), "--no-browser", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        first = process.stderr.readline()
        match = re.search(r"http://127\.0\.0\.1:(\d+)/([\w-]+)/", first)
        assert match, first + process.stderr.read()
        page = LocalPage(int(match[1]), match[2])
        yield page
        page.connection.close()
        process.send_signal(signal.SIGINT)
        page.output, _ = process.communicate(timeout=ends_within)
    assert process.returncode == 0
