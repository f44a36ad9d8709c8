"""Test the retry policy for bucket requests with servers that fail in every way."""

from __future__ import annotations

import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from dreamfleet.datasets.errors import StorageError
from dreamfleet.datasets.storage import object_store, retry
from dreamfleet.datasets.storage.retry import PATIENCE_SECONDS, Outages, next_wait, patience
from dreamfleet.datasets.storage.storage import Storage

CONTENT = b"in the end"
LISTING = (
    b'<?xml version="1.0"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Name>bucket</Name>'
    b"<KeyCount>1</KeyCount><IsTruncated>false</IsTruncated><Contents><Key>x/a</Key><Size>10</Size>"
    b"<LastModified>2026-01-01T00:00:00.000Z</LastModified><ETag>e</ETag></Contents></ListBucketResult>"
)


FAILURES = 4  # fewer than the policy of these tests tries again


def waits_within(limit: float) -> list[float]:
    """Return the waits of a request that fails at once each time, by the policy alone."""
    waits: list[float] = []
    while (wait := next_wait(len(waits) + 1, sum(waits))) is not None:
        waits.append(wait)
        assert sum(waits) < limit
    return waits


def test_the_policy_is_bounded_in_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert waits_within(PATIENCE_SECONDS)[:7] == [0.25, 0.5, 1.0, 2.0, 4.0, 5.0, 5.0]
    assert sum(waits_within(PATIENCE_SECONDS)) > PATIENCE_SECONDS - 5
    assert next_wait(1, PATIENCE_SECONDS) is None, (
        "a server that is silent for minutes is not waited for again"
    )


def test_runs_of_one_process_wait_for_the_longest_of_their_patiences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    longer, shorter = patience(900.0), patience(5.0)
    with longer:
        shorter.__enter__()
        assert 895 < sum(waits_within(900)) < 900
    assert sum(waits_within(5)) < 5, "a patience below the usual one applies too"
    shorter.__exit__(None, None, None)
    assert sum(waits_within(PATIENCE_SECONDS)) > 50


def test_an_outage_is_reported_at_once_and_then_once_a_minute() -> None:
    clock, said = [0.0], list[str]()
    outages = Outages(lambda: clock[0], said.append)
    for second in range(150):
        clock[0] = float(second)
        assert outages.failed("a", "refused") == second, "requests of one outage count from its beginning"
    assert [line.split(" for ")[1].split(" s ")[0] for line in said] == ["0", "60", "120"]
    assert outages.is_open("a") and not outages.is_open("b")
    outages.succeeded("a")
    assert "answers again, after 149 s" in said.pop() and not outages.is_open("a")
    clock[0] = 500.0
    assert outages.failed("a", "refused") == 0
    outages.failed("http://me:password@server:9000", "refused")
    assert "http://***@server:9000" in said[-1], "a login in an address is not logged"


class Server(ThreadingHTTPServer):
    """An S3 server with one object; its first ``failures`` requests fail by calling ``fail``."""

    daemon_threads = True

    def __init__(self, fail: Callable[[Any], None], failures: float, methods: str):
        self.seen: list[str] = []
        self.fail, self.left, self.methods = fail, failures, methods
        super().__init__(("127.0.0.1", 0), Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that closed the connection."""


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.seen.append(self.command)
        if self.command in self.server.methods.split() and self.server.left > 0:
            self.server.left -= 1
            self.server.fail(self)
            return
        listing = "list-type" in self.path
        content = LISTING if listing else b"" if body else CONTENT
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", '"e"')
        self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_PUT = do_HEAD = do_POST = answer

    def log_message(self, *message: Any) -> None:
        """Log nothing."""


def busy(handler: Handler) -> None:
    message = (
        b"" if handler.command == "HEAD" else b"<Error><Code>SlowDown</Code><Message>less</Message></Error>"
    )
    handler.send_response(503)
    handler.send_header("Content-Length", str(len(message)))
    handler.end_headers()
    handler.wfile.write(message)


def hang_up(handler: Handler) -> None:
    handler.connection.shutdown(socket.SHUT_RDWR)
    handler.close_connection = True


def say_nothing(handler: Handler) -> None:
    time.sleep(30)


def begin(handler: Handler) -> None:
    """Send the header and the first bytes of the content."""
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(CONTENT)))
    handler.end_headers()
    handler.wfile.write(CONTENT[:3])
    handler.wfile.flush()


def break_off(handler: Handler) -> None:
    begin(handler)
    hang_up(handler)


def reset(handler: Handler) -> None:
    """Reset the connection in the middle of the content, as the end of a server process does."""
    begin(handler)
    time.sleep(0.05)
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    os.close(handler.connection.detach())
    handler.close_connection = True


def stall(handler: Handler) -> None:
    begin(handler)
    time.sleep(30)


@contextmanager
def serving(fail: Callable[[Any], None], failures: float, methods: str) -> Iterator[Server]:
    server = Server(fail, failures, methods)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_address[1]}")
            patch.delenv("AWS_ENDPOINT_URL_S3", raising=False)
            for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
                patch.setenv(name, "x")
            yield server
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the policy: at most 1.2 s after the first failure, 0.5 s per answer."""
    monkeypatch.setattr(retry, "FIRST_WAIT_SECONDS", 0.005)
    monkeypatch.setattr(retry, "LONGEST_WAIT_SECONDS", 0.3)
    monkeypatch.setattr(retry, "PATIENCE_SECONDS", 1.2)
    monkeypatch.setattr(object_store, "ANSWER_SECONDS", 0.5)


def read(storage: Storage) -> object:
    return storage.read_bytes("a")


def write(storage: Storage) -> object:
    return storage.write_bytes("a", CONTENT)


def names(storage: Storage) -> object:
    return storage.list(recursive=True)


def fetch(storage: Storage) -> object:
    with storage.local_copy("a") as path:
        return path.read_bytes()


ACTIONS = [(read, "GET", CONTENT), (write, "PUT", None), (names, "GET", ["a"]), (fetch, "GET", CONTENT)]


@pytest.mark.parametrize(
    ("action", "method", "result"), ACTIONS, ids=lambda value: getattr(value, "__name__", "")
)
@pytest.mark.parametrize("fail", [busy, hang_up])
def test_transient_failures_are_retried(fail: Any, action: Any, method: str, result: Any) -> None:
    with serving(fail, FAILURES, method) as server:
        assert action(Storage("s3://bucket/x")) == result
    assert server.seen.count(method) == FAILURES + 1


@pytest.mark.parametrize(
    ("action", "method", "result"), ACTIONS, ids=lambda value: getattr(value, "__name__", "")
)
@pytest.mark.parametrize("fail", [busy, hang_up])
def test_lasting_failures_are_given_up(fail: Any, action: Any, method: str, result: Any) -> None:
    with serving(fail, float("inf"), method) as server, pytest.raises(StorageError, match=r"127\.0\.0\.1"):
        action(Storage("s3://bucket/x"))
    # aiohttp resends a request immediately if its kept-alive connection turns out to be closed.
    most = 1 + len(waits_within(1.2))
    assert FAILURES < server.seen.count(method) <= (2 * most if fail is hang_up else most)


@pytest.mark.parametrize("action", [read, fetch])
@pytest.mark.parametrize("fail", [break_off, reset, stall])
def test_an_answer_that_breaks_off_is_requested_again(fail: Any, action: Any) -> None:
    with serving(fail, 1, "GET") as server:
        assert action(Storage("s3://bucket/x")) == CONTENT
    assert server.seen.count("GET") == 2


@pytest.mark.parametrize("fail", [say_nothing, stall])
@pytest.mark.parametrize("action", [read, names])
def test_a_silent_server_is_given_up_in_time(fail: Any, action: Any) -> None:
    """Test that a server that never answers fails the request in bounded time.

    The default policy makes at most two attempts that time out (60 s each); this one has shorter limits.
    """
    began = time.monotonic()
    with serving(fail, float("inf"), "GET HEAD" if fail is say_nothing else "GET") as server:
        with pytest.raises(StorageError, match="no answer"):
            action(Storage("s3://bucket/x"))
        took = time.monotonic() - began
    assert max(server.seen.count(method) for method in ("GET", "HEAD")) <= 4
    assert took < 1.2 + 0.5 + 2.0


def test_a_refusal_is_not_retried() -> None:
    with serving(refuse, float("inf"), "PUT GET HEAD") as server:
        with pytest.raises(StorageError, match="denied"):
            write(Storage("s3://bucket/x"))
        assert server.seen.count("PUT") == 1


def refuse(handler: Handler) -> None:
    handler.send_response(403)
    handler.send_header("Content-Length", "0")
    handler.end_headers()


def error_of(code: str, status: int) -> Callable[[Handler], None]:
    """Return a failure with an S3 error code."""

    def fail(handler: Handler) -> None:
        message = b"" if handler.command == "HEAD" else f"<Error><Code>{code}</Code></Error>".encode()
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(message)))
        handler.end_headers()
        handler.wfile.write(message)

    return fail


def test_every_kind_of_write_outlasts_a_server_that_reports_errors_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Test that errors that last longer than a few attempts do not end a run whose patience they do not exceed."""
    monkeypatch.setattr(retry, "LONGEST_WAIT_SECONDS", 0.02)
    (tmp_path / "file").write_bytes(CONTENT)
    actions: list[Callable[[Storage], object]] = [
        write,
        lambda run: run.write_text("recipe.yaml", "method: {}"),
        lambda run: run.append_text("metrics.jsonl", "{}"),
        lambda run: run.upload(tmp_path / "file", "samples/1.png"),
        lambda run: run.exists("STOP"),
        lambda run: run.remove("STOP"),
    ]
    for action in actions:
        with patience(30.0), serving(error_of("InternalError", 500), 12, "PUT GET HEAD POST"):
            action(Storage("s3://bucket/x"))


def test_a_server_that_starts_after_an_outage_may_refuse_at_first() -> None:
    """Test that keys and buckets that a starting server does not know yet are not final errors."""
    answers = iter([busy, refuse, error_of("NoSuchBucket", 404), error_of("InvalidAccessKeyId", 403)])
    with serving(lambda handler: next(answers)(handler), 4, "PUT") as server:
        write(Storage("s3://bucket/x"))
        assert server.seen.count("PUT") == 5


def test_an_outage_is_known_by_the_address_of_a_bucket_and_told_without_a_login(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from types import SimpleNamespace

    from dreamfleet.datasets.storage.object_store import is_failing

    said: list[str] = []
    monkeypatch.setattr(object_store, "OUTAGES", Outages(time.monotonic, said.append))
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://me:secret@127.0.0.1:9")
    assert not is_failing("s3://bucket/run")
    object_store._needs_retry(
        response=None,
        operation=SimpleNamespace(name="PutObject"),
        attempts=1,
        caught_exception=ConnectionError(),
        request_dict={"url_path": "/bucket/run/x", "context": {}},
    )
    assert is_failing("s3://bucket/run")
    assert "127.0.0.1:9" in said[0] and "secret" not in said[0]
