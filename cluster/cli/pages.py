"""Serves a local page until Ctrl-C, for the commands that ask a person for answers."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from dreamfleet.cluster.labeling.server import LocalPage

Port = Annotated[int, typer.Option(help="Port of the page; 0: any free port.", min=0, max=65535)]
Browser = Annotated[bool, typer.Option("--browser/--no-browser", help="Open the page in a browser.")]


def serve(
    content: LocalPage,
    *,
    port: int,
    title: str,
    browser: bool,
    modes: Mapping[str, LocalPage] = MappingProxyType({}),
    max_request_bytes: int | None = None,
) -> None:
    """Serve a page until Ctrl-C; print its URL with ``title`` ("label the images"), and open it in a browser.

    ``modes``: further pages, at ``NAME/`` below its URL.
    """
    from dreamfleet.cluster.labeling.server import MAX_REQUEST_BYTES, PageServer

    server = PageServer(content, port, modes=modes, max_request_bytes=max_request_bytes or MAX_REQUEST_BYTES)
    print(f"{title} at {server.url}\nEvery answer is saved immediately; stop with Ctrl-C", flush=True)
    if browser:
        _open(server.url)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()


def _open(url: str) -> None:
    """Open the page in a browser if there is a desktop; a text browser would take over the terminal."""
    import webbrowser

    if sys.platform in ("darwin", "win32") or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"):
        webbrowser.open(url)
