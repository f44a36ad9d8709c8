"""Tests of conditional writes and guards, on disk, on a real S3 server, and on servers without conditions."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from servers import S3Server, s3_server  # noqa: F401  (a fixture)

from dreamfleet.datasets.errors import LeaseLost, StorageError
from dreamfleet.datasets.storage import conditional, object_store
from dreamfleet.datasets.storage.conditional import supports_conditions
from dreamfleet.datasets.storage.retry import Outages
from dreamfleet.datasets.storage.storage import Storage


@pytest.fixture(params=["disk", pytest.param("s3", marks=pytest.mark.s3)])
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
    if request.param == "disk":
        return Storage(tmp_path / "store")
    server: S3Server = request.getfixturevalue("s3_server")
    server.set_environment(monkeypatch)
    return Storage(server.new_folder())


def test_a_file_is_written_only_in_the_version_that_was_read(folder: Storage) -> None:
    assert folder.read_version("a/lease.json") == (b"", "")
    assert folder.write_if("a/lease.json", b"one", version="")
    assert not folder.write_if("a/lease.json", b"two", version="")
    content, version = folder.read_version("a/lease.json")
    assert content == b"one"
    assert folder.write_if("a/lease.json", b"three", version=version)
    assert not folder.write_if("a/lease.json", b"four", version=version)
    folder.remove_if("a/lease.json", version=version)
    assert folder.read_bytes("a/lease.json") == b"three"
    assert folder.list("", recursive=True) == ["a/lease.json"], "locks are not listed"
    folder.remove_if("a/lease.json", version=folder.read_version("a/lease.json")[1])
    folder.remove_if("a/lease.json", version=version)
    assert not folder.exists("a/lease.json")
    assert not folder.write_if("a/lease.json", b"five", version=version)


def test_one_of_many_writers_succeeds(folder: Storage) -> None:
    for version in ("", "of the first"):
        if version:
            version = folder.read_version("lease.json")[1]
        outcomes: list[tuple[bool, bytes]] = []
        start = threading.Barrier(6)

        def write(data: bytes, version: str = version, outcomes: Any = outcomes, start: Any = start) -> None:
            own = Storage(folder)
            start.wait()
            outcomes.append((own.write_if("lease.json", data, version=version), data))

        threads = [threading.Thread(target=write, args=(f"{version} {n}".encode(),)) for n in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [data for written, data in outcomes if written] == [folder.read_bytes("lease.json")]


def test_a_probe_finds_conditional_writes_and_leaves_nothing(folder: Storage) -> None:
    folder.write_text("recipe.yaml", "x")
    assert supports_conditions(folder)
    assert folder.list("", recursive=True) == ["recipe.yaml"]
    if folder.is_local:
        assert [path.name for path in Path(folder.path()).iterdir()] == ["recipe.yaml"]


def test_a_guard_refuses_every_write(folder: Storage, tmp_path: Path) -> None:
    folder.write_text("a/old.txt", "old")
    (tmp_path / "local.txt").write_text("local")
    asked: list[bool] = []

    def refuse(fresh: bool) -> None:
        asked.append(fresh)
        raise LeaseLost("taken over")

    below = folder.guarded(refuse).child("a")

    def stage() -> None:
        with below.staging("new.txt") as path:
            path.write_text("new")

    writes = [
        lambda: below.write_text("old.txt", "new"),
        lambda: below.append_text("new.txt", "new"),
        stage,
        lambda: below.upload(tmp_path / "local.txt", "new.txt"),
        lambda: below.remove("old.txt"),
        lambda: below.write_if("new.txt", b"new", version=""),
    ]
    for write in writes:
        with pytest.raises(LeaseLost):
            write()
    assert asked == [True, False, True, True, True, True]
    assert below.read_text("old.txt") == "old" and folder.list("a") == ["old.txt"]


def test_a_disk_without_locks_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Any, *arguments: Any, **options: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(conditional.FileLock, "acquire", refuse)
    folder = Storage(tmp_path)
    assert not supports_conditions(folder)
    assert folder.write_if("a", b"1", version="") and not folder.write_if("a", b"2", version="")


class _Bucket(BaseHTTPRequestHandler):
    """One bucket of an S3 server; ``server.conditions``: honoured, ignored or refused."""

    server: Any
    protocol_version = "HTTP/1.1"

    def do_PUT(self) -> None:
        data, objects = self.rfile.read(int(self.headers["Content-Length"])), self.server.objects
        if "chunked" in self.headers.get("Content-Encoding", ""):
            data = data.split(b"\r\n")[1]
        if self.server.is_down:
            self.server.requests += 1
            return self._answer(503, _error("SlowDown"))
        found = objects.get(self.path)
        match, absent = self.headers.get("If-Match"), self.headers.get("If-None-Match")
        if match or absent:
            if self.server.conditions == "refused":
                return self._answer(501, _error("NotImplemented"))
            is_met = found is None if absent else found is not None and _etag(found) == match
            if self.server.conditions == "honoured" and not is_met:
                return self._answer(412, _error("PreconditionFailed"))
        objects[self.path] = data
        if self.server.lost_answers:  # after the object was written
            self.server.lost_answers -= 1
            return self._answer(503, _error("SlowDown"))
        self._answer(200, b"", ETag=_etag(data))

    def do_GET(self) -> None:
        if "list-type=2" in self.path:
            keys = "".join(
                f"<Contents><Key>{path.partition('/bucket/')[2]}</Key><Size>8</Size></Contents>"
                for path in self.server.objects
            )
            return self._answer(200, f"<ListBucketResult>{keys}</ListBucketResult>".encode())
        found = self.server.objects.get(self.path.partition("?")[0])
        if found is None:
            return self._answer(404, _error("NoSuchKey"))
        self._answer(200, found, ETag=_etag(found))

    do_HEAD = do_GET

    def do_POST(self) -> None:  # of DeleteObjects
        self.rfile.read(int(self.headers["Content-Length"]))
        self.server.objects.clear()
        self._answer(200, b"<DeleteResult/>")

    def do_DELETE(self) -> None:
        self.server.objects.pop(self.path, None)
        self._answer(204, b"")

    def _answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None:
        pass


def _etag(data: bytes) -> str:
    import hashlib

    return f'"{hashlib.md5(data).hexdigest()}"'


def _error(code: str) -> bytes:
    return f"<Error><Code>{code}</Code><Message>{code}</Message></Error>".encode()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    made: Any = ThreadingHTTPServer(("127.0.0.1", 0), _Bucket)
    made.objects, made.conditions, made.lost_answers = {}, "honoured", 0
    made.is_down, made.requests = False, 0
    threading.Thread(target=made.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{made.server_port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "x")
    yield made
    made.shutdown()
    made.server_close()


@pytest.mark.parametrize(
    ("conditions", "expected"), [("honoured", True), ("ignored", False), ("refused", False)]
)
def test_a_server_without_conditions_is_noticed(server: Any, conditions: str, expected: bool) -> None:
    server.conditions = conditions
    assert supports_conditions(Storage("s3://bucket/run")) is expected


def test_a_write_whose_answer_was_lost_counts_as_written(server: Any) -> None:
    folder = Storage("s3://bucket/run")
    server.lost_answers = 1
    assert folder.write_if("lease.json", b"mine", version=""), (
        "the second request finds the first one's object"
    )
    assert server.lost_answers == 0
    assert not folder.write_if("lease.json", b"other", version="")


@pytest.mark.parametrize("other_server_fails", [False, True])
def test_a_write_that_an_outage_delays_is_checked_again(
    server: Any, monkeypatch: pytest.MonkeyPatch, other_server_fails: bool
) -> None:
    """Test that the write is repeated with its check, also if another server has been failing for an hour."""
    monkeypatch.setattr(object_store, "RECHECK_SECONDS", 0.5)
    outages = Outages(time.monotonic)
    monkeypatch.setattr(object_store, "OUTAGES", outages)
    if other_server_fails:
        outages.now = lambda: time.monotonic() - 3600
        outages.failed("http://other:9000", "503 SlowDown")
        outages.now = time.monotonic
    server.is_down = True

    def check(fresh: bool) -> None:
        if server.requests >= 2:
            raise LeaseLost("replaced during the outage")

    with pytest.raises(LeaseLost):
        Storage("s3://bucket/run").guarded(check).write_text("summary.json", "late")


def test_a_bucket_that_cannot_be_written_is_not_called_one_without_conditions(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        supports_conditions(Storage(tmp_path / "file" / "folder"))
