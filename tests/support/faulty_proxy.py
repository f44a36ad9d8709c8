"""A proxy in front of an S3 server that lets chosen reads of objects fail, for tests."""

from __future__ import annotations

import http.client
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

SLOW_SECONDS = 1.0
# (name of the object, number of earlier reads of it, number of earlier reads of all) -> a fault, "" for none
Rule = Callable[[str, int, int], str]


class FaultyProxy(ThreadingHTTPServer):
    """Forwards requests to ``endpoint``; reads of objects fail as ``rule`` says: `slow`, `cut`, `busy` or `denied`."""

    daemon_threads = True

    def __init__(self, endpoint: str, rule: Rule) -> None:
        self.target, self.rule = urlsplit(endpoint).netloc, rule
        self.reads: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self._lock = threading.Lock()
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def endpoint(self) -> str:
        """The address of the proxy."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def fault(self, name: str) -> str:
        """Count a read of an object, and return its fault."""
        with self._lock:
            found = self.rule(name, self.reads[name], self.reads.total())
            self.reads[name] += 1
            self.faults[found] += 1
        return found

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that closed the connection."""


@contextmanager
def faulty_proxy(endpoint: str, rule: Rule) -> Iterator[FaultyProxy]:
    """Run a proxy within this context."""
    proxy = FaultyProxy(endpoint, rule)
    threading.Thread(target=proxy.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield proxy
    finally:
        proxy.shutdown()
        proxy.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: FaultyProxy
    protocol_version = "HTTP/1.1"

    def forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = urlsplit(self.path).path
        is_read = self.command == "GET" and path.endswith(".png")
        fault = self.server.fault(path.rpartition("/")[2]) if is_read else ""
        if fault == "busy":
            return self.answer(503, _error("SlowDown"))
        if fault == "denied":
            return self.answer(403, _error("AccessDenied"))
        if fault == "slow":
            time.sleep(SLOW_SECONDS)
        connection = http.client.HTTPConnection(self.server.target, timeout=30)
        try:  # with the client's own headers: the signature covers Host
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                connection.putheader(name, value)
            connection.endheaders(body or None)
            found = connection.getresponse()
            self.answer(found.status, found.read(), dict(found.getheaders()), is_cut=fault == "cut")
        finally:
            connection.close()

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = forward

    def answer(
        self, status: int, content: bytes, headers: dict[str, str] | None = None, *, is_cut: bool = False
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            if name.lower() not in ("content-length", "transfer-encoding", "connection", "date", "server"):
                self.send_header(name, value)
        length = (headers or {}).get("Content-Length") if self.command == "HEAD" else None
        self.send_header("Content-Length", length or str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if is_cut else content)
        self.close_connection = self.close_connection or is_cut

    def log_message(self, *message: Any) -> None:
        """Log nothing."""


def _error(code: str) -> bytes:
    return f"<Error><Code>{code}</Code><Message>planned</Message></Error>".encode()
