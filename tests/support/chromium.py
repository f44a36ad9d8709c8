"""Drives a headless Chromium through its debugging pipe, for tests of local pages: no package is needed."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

KEYS = {"Enter": 13, "Escape": 27, " ": 32, "PageUp": 33, "PageDown": 34, "End": 35, "Home": 36, "ArrowLeft": 37,
        "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Tab": 9}  # fmt: skip
ALT, CTRL, SHIFT = 1, 2, 8


class Tab:
    """One page. JavaScript errors and console errors are collected in :attr:`errors`."""

    def __init__(self, read: int, write: int):
        self._read, self._write = read, write
        self._buffer, self._number, self._session = b"", 0, ""
        self.errors: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command of the DevTools protocol and return its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer["error"]
                return answer["result"]  # type: ignore[no-any-return]

    def open(self, url: str, *, width: int = 1400, height: int = 1000, dark: bool = False) -> None:
        """Load a page in a window of a size in pixels."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=url)

    def run(self, script: str) -> Any:
        """Return the value of an expression; promises are awaited."""
        found = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, condition: str, *, seconds: float = 120) -> Any:
        """Wait until an expression is true, and return its value; while it raises it is not true."""
        condition = f"(() => {{ try {{ return {condition} }} catch {{ return null }} }})()"
        limit = time.monotonic() + seconds
        while time.monotonic() < limit:
            if value := self.run(condition):
                return value
            time.sleep(0.05)
        raise AssertionError(f"never true: {condition}; errors: {self.errors}")

    def press(self, key: str, *, modifiers: int = 0) -> None:
        """Press and release a key, such as "a" or "Enter"."""
        text = "\r" if key == "Enter" else key if len(key) == 1 and not modifiers & (ALT | CTRL) else ""
        code = KEYS.get(key, ord(key.upper()[0]))
        shared = {"key": key, "windowsVirtualKeyCode": code, "modifiers": modifiers}
        self.call("Input.dispatchKeyEvent", type="keyDown", **shared, **({"text": text} if text else {}))
        self.call("Input.dispatchKeyEvent", type="keyUp", **shared)

    def type(self, text: str) -> None:
        """Enter text into the focused field."""
        self.call("Input.insertText", text=text)

    def drag(self, *points: tuple[float, float]) -> None:
        """Press the mouse button at the first point, move along the others and release it at the last."""
        kinds = ["mousePressed", *["mouseMoved"] * (len(points) - 1)]
        for kind, (x, y) in zip(kinds, points, strict=True):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=1, clickCount=1)
        x, y = points[-1]
        self.call("Input.dispatchMouseEvent", type="mouseReleased", x=x, y=y, button="left", clickCount=1)

    def screenshot(self, path: Path) -> None:
        """Write what the window shows as a PNG file."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            part = os.read(self._read, 1 << 20)
            assert part, "Chromium has ended"
            self._buffer += part
        message, _, self._buffer = self._buffer.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        if found.get("method") == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(found["params"]["exceptionDetails"]))
        if found.get("method") == "Log.entryAdded" and found["params"]["entry"]["level"] == "error":
            self.errors.append(
                found["params"]["entry"]["text"] + " " + found["params"]["entry"].get("url", "")
            )
        return found


@contextmanager
def chromium(profile: Path) -> Iterator[Tab]:
    """Start Chromium and yield a page; ``profile``: folder of its files."""
    to_read, to_write = os.pipe()
    from_read, from_write = os.pipe()
    command = [
        "chromium",
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--remote-debugging-pipe",
    ]
    command += [f"--user-data-dir={profile}", "--no-first-run", "--disable-extensions", "about:blank"]

    def connect() -> None:  # Chromium reads commands from descriptor 3 and writes answers to 4
        reader, writer = os.dup(to_read), os.dup(from_write)
        os.dup2(reader, 3)
        os.dup2(writer, 4)

    with subprocess.Popen(
        command, preexec_fn=connect, close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        os.close(to_read)
        os.close(from_write)
        tab = None
        try:
            tab = Tab(from_read, to_write)
            yield tab
        finally:
            if tab is not None:
                tab._session = ""
                tab.call("Browser.close")
            process.wait(timeout=60)
            os.close(from_read)
            os.close(to_write)
