"""Test the labelling page: its keys, the label file, and which requests the server accepts."""

from __future__ import annotations

import http.client
import io
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from local_pages import served_page
from PIL import Image
from typer.testing import CliRunner

from dreamfleet.cluster.cli import program
from dreamfleet.cluster.labeling.labels import LONGEST_SIDE, Labelling
from dreamfleet.cluster.labeling.server import PageServer
from dreamfleet.datasets.errors import DataError, ResourceError, UserError


class Page:
    """A client that sends the requests of the page's script."""

    def __init__(self, server: PageServer):
        self.server, self.view = server, {"at": None}

    def ask(
        self, method: str, path: str, body: bytes | None = None, **headers: str
    ) -> tuple[int, bytes, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.server.server_port, timeout=10)
        try:
            connection.putrequest(method, path, skip_host="Host" in headers)
            if body is not None:
                headers = {"Content_Type": "application/json", "Content_Length": str(len(body)), **headers}
            for name, value in headers.items():
                connection.putheader(name.replace("_", "-"), value)
            connection.endheaders(body)
            answer = connection.getresponse()
            return answer.status, answer.read(), answer.headers
        finally:
            connection.close()

    def press(self, action: str, number: int | None = None) -> dict[str, Any]:
        body = {"action": action, "at": self.view["at"], "class": number}
        status, content, _ = self.ask("POST", f"/{self.server.token}/act", json.dumps(body).encode())
        assert status == 200, content
        self.view = json.loads(content)
        return self.view


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with four images, one of them in a subfolder, and one unreadable file."""
    tiny.make_images(tmp_path / "p", 3)
    tiny.make_images(tmp_path / "p" / "sea", 1, seed=9)
    (tmp_path / "p" / "001x.png").write_bytes(b"not an image")
    (tmp_path / "p" / ".hidden.png").write_bytes(b"")
    (tmp_path / "secret.png").write_bytes((tmp_path / "p" / "000.png").read_bytes())
    return tmp_path / "p"


@pytest.fixture
def page(folder: Path) -> Iterator[Page]:
    server = PageServer(Labelling(str(folder), str(folder / "dataset.json"), ["other", "good"]))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield Page(server)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def saved(folder: Path) -> dict[str, int]:
    return json.loads((folder / "dataset.json").read_text())


# ---- the keys ---------------------------------------------------------------------------------------------


def test_digits_label_and_every_label_is_in_the_file(page: Page, folder: Path) -> None:
    assert page.press("show")["name"] == "000.png" and not (folder / "dataset.json").exists()
    view = page.press("label", 1)
    assert saved(folder) == {"000.png": 1} and view["name"] == "001.png" and view["counts"] == [0, 1]
    view = page.press("label", 0)
    assert view["name"] == "002.png" and view["unreadable"] == ["001x.png"] and view["total"] == 4
    page.press("skip")
    view = page.press("label", 1)
    assert view["name"] is None and saved(folder) == {"000.png": 1, "001.png": 0, "sea/000.png": 1}
    assert page.press("skip")["name"] is None and page.press("open")["name"] == "002.png"
    assert page.press("label", 0)["name"] == "sea/000.png" and page.press("open")["name"] is None
    assert page.press("show")["labelled"] == 4


def test_back_and_undo(page: Page, folder: Path) -> None:
    page.press("show")
    for number in (1, 1, 0):
        page.press("label", number)
    assert page.press("back")["name"] == "002.png" and page.view["label"] == 0
    assert page.press("back")["name"] == "001.png", "the unreadable image between is skipped"
    page.press("label", 0)
    assert saved(folder)["001.png"] == 0
    assert page.press("undo")["name"] == "001.png" and saved(folder)["001.png"] == 1 == page.view["label"]
    for _ in range(3):
        page.press("undo")
    assert saved(folder) == {} and page.view["name"] == "000.png" and not page.view["can_undo"]
    assert page.press("undo")["name"] == "000.png" == page.press("back")["name"] and not page.view["can_back"]


def test_an_existing_file_is_continued(page: Page, folder: Path) -> None:
    before = {"000.png": 0, "elsewhere.png": 3}
    (folder / "dataset.json").write_text(json.dumps(before))
    again = Labelling(str(folder), str(folder / "dataset.json"), ["other", "good"])
    view = again.act("show", None, None)
    assert view["name"] == "001.png" and view["classes"] == ["other", "good", "class 2", "class 3"]
    again.act("label", view["at"], 1)
    assert saved(folder) == {**before, "001.png": 1}
    page.press("show")
    status, content, _ = page.ask(
        "POST", f"/{page.server.token}/act", b'{"action": "label", "at": 0, "class": 1}'
    )
    assert status == 409 and b"changed by another program" in content
    assert saved(folder) == {**before, "001.png": 1}


@pytest.mark.parametrize("text", ['{"000.png": 1', '{"name": "other file"}', "[]", ""])
def test_a_broken_or_foreign_file_is_reported_and_not_modified(text: str, folder: Path) -> None:
    (folder / "dataset.json").write_text(text)
    result = CliRunner().invoke(program.app, ["data", "label", str(folder), "--no-browser"])
    assert result.exit_code == 2 and "dataset.json" in result.output
    assert (folder / "dataset.json").read_text() == text


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b'{"action": "label", "at": 0, "class": 2}', 409),
        (b'{"action": "label", "at": 0, "class": null}', 409),
        (b'{"action": "label", "at": 5, "class": 1}', 409),
        (b'{"action": "label", "at": -1, "class": 1}', 409),
        (b'{"action": "label", "at": 99, "class": 1}', 409),
        (b'{"action": "label", "at": "0", "class": 1}', 400),
        (b'{"action": "label", "at": true, "class": 1}', 400),
        (b'{"action": ["label"]}', 409),
        (b'{"at": 0}', 400),
        (b"[1]", 400),
        (b"\xff{", 400),
        (b"[" * 4000, 400),
        (b" " * 5000, 413),
    ],
)
def test_invalid_requests_change_nothing(body: bytes, status: int, page: Page, folder: Path) -> None:
    found, content, _ = page.ask("POST", f"/{page.server.token}/act", body)
    assert found == status and json.loads(content)["error"]
    assert not (folder / "dataset.json").exists()


# ---- the server --------------------------------------------------------------------------------------------


def test_the_page_loads_nothing_from_other_hosts(page: Page) -> None:
    status, content, headers = page.ask("GET", f"/{page.server.token}/")
    text = content.decode()
    assert status == 200 and "text/html" in headers["Content-Type"]
    assert not re.search(r"(?:src|href)=|https?://|@import|url\(", text)
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and policy.count(page.server.nonce) == 2 == text.count(
        page.server.nonce
    )
    assert headers["X-Content-Type-Options"] == "nosniff" and headers["Referrer-Policy"] == "no-referrer"
    assert "alt=" in text and 'role="status"' in text and ":focus-visible" in text


def test_only_clients_with_the_token_are_served(page: Page, folder: Path) -> None:
    token = page.server.token
    assert len(token) >= 32 and page.server.server_address[0] == "127.0.0.1"
    body = b'{"action": "label", "at": 0, "class": 1}'
    for path in ("", "wrong", token[:-1], token + "x", token.swapcase(), "%2e%2e"):
        assert page.ask("GET", f"/{path}/")[0] == page.ask("GET", f"/{path}/image/0")[0] == 404
        assert page.ask("POST", f"/{path}/act", body)[0] == 404
    assert page.ask("GET", f"/{token}")[0] == 404
    assert not (folder / "dataset.json").exists()


def test_other_hosts_and_origins_are_refused(page: Page, folder: Path) -> None:
    token, port = page.server.token, page.server.server_port
    body = b'{"action": "label", "at": 0, "class": 1}'
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1", f"127.0.0.1:{port + 1}", ""):
        assert page.ask("GET", f"/{token}/", Host=host)[0] == 403
        assert page.ask("POST", f"/{token}/act", body, Host=host)[0] == 403
    for origin in (
        "http://evil.example",
        f"http://127.0.0.1:{port + 1}",
        "null",
        f"https://127.0.0.1:{port}",
    ):
        assert page.ask("POST", f"/{token}/act", body, Origin=origin)[0] == 403
    assert page.ask("POST", f"/{token}/act", body, Content_Type="text/plain")[0] == 415
    assert not (folder / "dataset.json").exists()
    own = {"Host": f"localhost:{port}", "Origin": f"http://localhost:{port}"}
    assert page.ask("POST", f"/{token}/act", body, **own)[0] == 200 and saved(folder) == {"000.png": 1}


@pytest.mark.parametrize(
    "place",
    ["image/../../secret.png", "image/..%2f..%2fsecret.png", "image//etc/passwd", "image/5", "image/-1",
     "image/%C2%B2", "image/000.png", "image/", "image/0/", "image/00000000001", "dataset.json",
     "../", "act"],
)  # fmt: skip
def test_only_images_are_served(place: str, page: Page) -> None:
    status, content, _ = page.ask("GET", f"/{page.server.token}/{place}")
    assert status == 404 and json.loads(content)["error"]


def test_images_are_upright_scaled_and_broken_ones_named(tmp_path: Path) -> None:
    large = Image.new("RGB", (3200, 800), "red")
    large.paste("blue", (0, 0, 1600, 800))
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation 6: rotated by 90 degrees clockwise
    large.save(tmp_path / "a.jpg", exif=exif)
    (tmp_path / "b.png").write_bytes(b"not an image")
    labelling = Labelling(str(tmp_path), str(tmp_path / "l.json"), ["x", "y"])
    content, kind = labelling.image(0)
    shown = Image.open(io.BytesIO(content)).convert("RGB")
    assert kind == "image/jpeg" and shown.size == (400, LONGEST_SIDE)
    assert shown.getpixel((200, 100))[2] > 200 and shown.getpixel((200, 1500))[0] > 200
    assert labelling.act("skip", 0, None)["name"] is None
    assert "b.png: not a" in labelling.report()["unreadable"]["b.png"]


# ---- the command -------------------------------------------------------------------------------------------


def test_ctrl_c_ends_the_command_with_a_complete_file(folder: Path) -> None:
    with served_page("data", "label", folder) as page:
        assert page.act(json.dumps({"action": "label", "at": 0, "class": 1})).status == 200
    report = json.loads(page.output)
    assert (
        report["labelled"] == 1 and report["classes"] == {"other": 0, "good": 1} and report["pictures"] == 5
    )
    assert saved(folder) == {"000.png": 1}


def test_errors_of_the_command(folder: Path, page: Page, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for words, message in (
        ([tmp_path / "empty"], "empty"),
        ([tmp_path / "gone"], "not a folder"),
        (["s3://bucket/images"], "address"),
        ([folder, "--classes", "one"], "two"),
        ([folder, "--port", page.server.server_port], str(page.server.server_port)),
    ):
        result = CliRunner().invoke(program.app, ["data", "label", "--no-browser", *map(str, words)])
        assert result.exit_code == 2 and message in result.output, result.output
    with pytest.raises(DataError, match=r"no (picture|image)"):
        Labelling(str(tmp_path / "empty"), "x.json", ["a", "b"])
    with pytest.raises(ResourceError):
        PageServer(page.server.content, page.server.server_port)
    with pytest.raises(UserError, match="action"):
        page.server.content.act("dance", 0, None)
