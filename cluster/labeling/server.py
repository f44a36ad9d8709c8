"""Serves the labelling page (`label.html`) on this machine alone, to who has its token; nothing but the pictures."""

from __future__ import annotations

import hmac
import json
import secrets
import sys
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from dreamfleet.cluster.labeling.labels import Labelling
from dreamfleet.datasets.errors import DataError, ResourceError, StorageError, UserError
from dreamfleet.datasets.json_text import json_text

HERE = "127.0.0.1"
MOST_BYTES = 4096  # of a question


class LabelServer(ThreadingHTTPServer):
    """Serves the page on this machine alone, to whoever has the token in its address."""

    daemon_threads = True

    def __init__(self, labelling: Labelling, port: int = 0):
        self.labelling, self.token, self.nonce = (
            labelling,
            secrets.token_urlsafe(24),
            secrets.token_urlsafe(16),
        )
        self.page = Path(__file__).with_name("label.html").read_text("utf-8").replace("NONCE", self.nonce)
        try:
            super().__init__((HERE, port), _Handler)
        except OSError as error:
            raise ResourceError(
                f"port {port} cannot be had ({error.strerror}); give another --port, or none"
            ) from error

    @property
    def url(self) -> str:
        """The page's address."""
        return f"http://{HERE}:{self.server_port}/{self.token}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Pass over a browser that went away in the middle; anything else is told."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: LabelServer
    server_version, sys_version = "dreamfleet", ""
    timeout = 60  # seconds that a connection may stay silent

    def do_GET(self) -> None:
        place = self._asked()
        if place == "":
            self._send(HTTPStatus.OK, self.server.page.encode(), "text/html; charset=utf-8")
        elif place is not None and place.startswith("picture/"):
            self._send_image(place.removeprefix("picture/"))
        elif place is not None:
            self._refuse(HTTPStatus.NOT_FOUND, "nothing here")

    def do_POST(self) -> None:
        place = self._asked()
        if place is None:
            return
        if place != "act":
            self._refuse(HTTPStatus.NOT_FOUND, "nothing here")
            return
        if self.headers.get_content_type() != "application/json":  # a form of another page sends no JSON
            self._refuse(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "JSON is expected")
            return
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit()) or int(length) > MOST_BYTES:
            self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"at most {MOST_BYTES} bytes are expected")
            return
        try:
            asked = json.loads(self.rfile.read(int(length)))
            action, at, number = asked["action"], asked.get("at"), asked.get("class")
            if not all(value is None or type(value) is int for value in (at, number)):
                raise ValueError(f"{at!r}, {number!r}")
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            self._refuse(HTTPStatus.BAD_REQUEST, "not understood")
            return
        try:
            view = self.server.labelling.act(action, at, number)
        except UserError as error:
            self._refuse(HTTPStatus.CONFLICT, str(error))
            return
        self._send(HTTPStatus.OK, json_text(view).encode(), "application/json")

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: the token is in every line."""

    def _asked(self) -> str | None:
        """Return what is asked for, behind the token; None when the question was refused."""
        port = self.server.server_port
        known = {f"{host}:{port}" for host in (HERE, "localhost")}
        # Another site's name that points here, or another site's page.
        origin = self.headers.get("Origin")
        if self.headers.get("Host") not in known or (origin and origin.removeprefix("http://") not in known):
            self._refuse(HTTPStatus.FORBIDDEN, "asked under another name")
            return None
        token, slash, place = self.path.partition("?")[0].removeprefix("/").partition("/")
        if not slash or not hmac.compare_digest(token.encode(), self.server.token.encode()):
            self._refuse(HTTPStatus.NOT_FOUND, "nothing here; the whole address is needed, with its token")
            return None
        return place

    def _send_image(self, number: str) -> None:
        labelling = self.server.labelling
        if not (number.isascii() and number.isdigit() and len(number) < 10) or int(number) >= len(
            labelling.names
        ):
            self._refuse(HTTPStatus.NOT_FOUND, "no such picture")
            return
        try:
            content, kind = labelling.image(int(number))
        except (DataError, StorageError) as error:
            self._refuse(HTTPStatus.UNPROCESSABLE_ENTITY, str(error))
            return
        self._send(HTTPStatus.OK, content, kind)

    def _refuse(self, status: HTTPStatus, reason: str) -> None:
        self.close_connection = True
        self._send(status, json_text({"error": reason}).encode(), "application/json")

    def _send(self, status: HTTPStatus, content: bytes, kind: str) -> None:
        self.send_response(status)
        nonce = f"'nonce-{self.server.nonce}'"
        for name, value in {
            "Content-Type": kind,
            "Content-Length": str(len(content)),
            "Cache-Control": "no-store" if not kind.startswith("image/") else "private, max-age=3600",
            "Content-Security-Policy": f"default-src 'none'; img-src 'self'; connect-src 'self'; script-src {nonce}; "
            f"style-src {nonce}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Resource-Policy": "same-origin",
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)
