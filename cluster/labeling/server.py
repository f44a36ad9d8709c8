"""HTTP server of a local page that records answers, such as labels or votes: loopback interface only, with a token."""

from __future__ import annotations

import hmac
import json
import secrets
import sys
from collections.abc import Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import MappingProxyType
from typing import Any, Protocol

from dreamfleet.datasets.errors import ResourceError, UserError
from dreamfleet.datasets.json_text import json_text

LOOPBACK = "127.0.0.1"
MAX_REQUEST_BYTES = 4096


class LocalPage(Protocol):
    """A page with images whose script sends the person's answers as JSON."""

    def html(self, nonce: str) -> str:
        """Return the page; its scripts and styles carry ``nonce``."""

    def answer(self, request: Any) -> dict[str, Any]:
        """Record one answer, given as parsed JSON, and return the next state of the page.

        Raises ValueError, TypeError, KeyError or AttributeError for a request that the page never sends, and UserError
        for one that cannot be carried out.
        """

    def find_image(self, name: str) -> tuple[bytes, str] | None:
        """Return the content and media type of an image; None for a wrong name. Raises UserError if unreadable."""


class PageServer(ThreadingHTTPServer):
    """Serves a page on the loopback interface to clients whose URL contains the token.

    ``modes``: further pages, at ``NAME/`` below the first one's URL.
    """

    daemon_threads = True

    def __init__(
        self,
        content: LocalPage,
        port: int = 0,
        *,
        modes: Mapping[str, LocalPage] = MappingProxyType({}),
        max_request_bytes: int = MAX_REQUEST_BYTES,
    ):
        self.content, self.modes, self.max_request_bytes = content, dict(modes), max_request_bytes
        self.token, self.nonce = secrets.token_urlsafe(24), secrets.token_urlsafe(16)
        try:
            super().__init__((LOOPBACK, port), _Handler)
        except OSError as error:
            raise ResourceError(
                f"port {port} is not available ({error.strerror}); choose another --port, or omit it to use any "
                "free port"
            ) from error

    @property
    def url(self) -> str:
        """The URL of the page, with its token."""
        return f"http://{LOOPBACK}:{self.server_port}/{self.token}/"

    def find_page(self, place: str) -> tuple[LocalPage, str]:
        """Return the page that a path after the token belongs to, and the path within that page."""
        name, slash, rest = place.partition("/")
        return (self.modes[name], rest) if slash and name in self.modes else (self.content, place)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log an error, except that the browser closed the connection."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: PageServer
    server_version, sys_version = "dreamfleet", ""
    timeout = 60  # seconds after which an idle connection is closed

    def do_GET(self) -> None:
        path = self._requested_path()
        if path is None:
            return
        page, place = self.server.find_page(path)
        if place == "":
            self._send(HTTPStatus.OK, page.html(self.server.nonce).encode(), "text/html; charset=utf-8")
        elif place.startswith("image/"):
            self._send_image(page, place.removeprefix("image/"))
        else:
            self._refuse(HTTPStatus.NOT_FOUND, "not found")

    def do_POST(self) -> None:
        path = self._requested_path()
        if path is None:
            return
        page, place = self.server.find_page(path)
        if place != "act":
            self._refuse(HTTPStatus.NOT_FOUND, "not found")
            return
        if self.headers.get_content_type() != "application/json":  # a form of another site cannot send JSON
            self._refuse(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "JSON expected")
            return
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit()) or int(length) > self.server.max_request_bytes:
            most = self.server.max_request_bytes
            self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"at most {most} bytes expected")
            return
        try:
            view = page.answer(json.loads(self.rfile.read(int(length))))
        except UserError as error:
            self._refuse(HTTPStatus.CONFLICT, str(error))
            return
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            self._refuse(HTTPStatus.BAD_REQUEST, "invalid request")
            return
        self._send(HTTPStatus.OK, json_text(view).encode(), "application/json")

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: every line would contain the token."""

    def _requested_path(self) -> str | None:
        """Return the path after the token; None if the request was refused."""
        port = self.server.server_port
        known = {f"{host}:{port}" for host in (LOOPBACK, "localhost")}
        # Refuse DNS rebinding (another host name) and requests from pages of other sites.
        origin = self.headers.get("Origin")
        if self.headers.get("Host") not in known or (origin and origin.removeprefix("http://") not in known):
            self._refuse(HTTPStatus.FORBIDDEN, "wrong host or origin")
            return None
        token, slash, place = self.path.partition("?")[0].removeprefix("/").partition("/")
        if not slash or not hmac.compare_digest(token.encode(), self.server.token.encode()):
            self._refuse(HTTPStatus.NOT_FOUND, "not found; the complete URL with its token is needed")
            return None
        return place

    def _send_image(self, page: LocalPage, name: str) -> None:
        try:
            found = page.find_image(name)
        except UserError as error:
            self._refuse(HTTPStatus.UNPROCESSABLE_ENTITY, str(error))
            return
        if found is None:
            self._refuse(HTTPStatus.NOT_FOUND, "no such image")
            return
        self._send(HTTPStatus.OK, *found)

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
            "Content-Security-Policy": f"default-src 'none'; img-src 'self' data:; connect-src 'self'; "
            f"script-src {nonce}; style-src {nonce}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Resource-Policy": "same-origin",
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)
