"""Checks what a folder on disk or in a bucket allows from this machine."""

from __future__ import annotations

import time
import uuid
from typing import Any

from dreamfleet.datasets.errors import StorageError
from dreamfleet.datasets.storage.conditional import supports_conditions
from dreamfleet.datasets.storage.storage import Storage


def probe_storage(url: str, name: str = "") -> dict[str, Any]:
    """Return ``seconds`` of each operation on a small file that is removed again, and the first ``error``.

    ``conditional``: whether of two conditional writes exactly one succeeds, which the exclusive ownership of run
    folders needs; None if it could not be tried. ``name`` is part of the file's name.
    """
    found: dict[str, Any] = {"seconds": {}, "error": None, "failed": None, "conditional": None}
    file, content = f".dreamfleet-probe-{name}-{uuid.uuid4().hex[:8]}", uuid.uuid4().hex
    doing = "open"
    try:
        folder = Storage(url)

        def read() -> None:
            if folder.read_text(file) != content:
                raise StorageError(f"{folder.path(file)} was read with other content than was written")

        def find() -> None:
            if file not in folder.list():
                raise StorageError(f"{folder.path(file)} was written, but is not listed")

        operations = {
            "write": lambda: folder.write_text(file, content),
            "read": read,
            "list": find,
            "remove": lambda: folder.remove(file),
        }
        for doing, operation in operations.items():
            began = time.perf_counter()
            operation()
            found["seconds"][doing] = time.perf_counter() - began
        doing = "write conditionally"
        found["conditional"] = supports_conditions(folder)
    except StorageError as error:
        found |= {"failed": doing, "error": str(error)}
    return found
