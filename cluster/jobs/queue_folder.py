"""The folder of a queue: its entries, packages and code, in a bucket or a folder that all machines share.

::

    entries/ID.json    an entry; written by the job that adds it, and then only by the queue
    packages/ID.zip    its recipe and files
    code/DIGEST.zip    the dreamfleet that runs it
    cancel/ID          a request to stop it
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from dreamfleet.cluster.jobs.code import code_files, write_code
from dreamfleet.cluster.jobs.queue import Entry
from dreamfleet.datasets.json_text import json_text
from dreamfleet.datasets.storage.storage import Storage


class QueueFolder:
    """Reads and writes the state of a queue. All methods raise StorageError if the storage fails."""

    def __init__(self, folder: Storage):
        self.folder = folder
        self._known: dict[str, Entry] = {}

    def entries(self) -> list[Entry]:
        """Return all entries."""
        found = []
        for name in self.folder.list("entries"):
            given: dict[str, Any] = json.loads(self.folder.read_text(f"entries/{name}"))
            options, variables = tuple(given.pop("options")), tuple(map(tuple, given.pop("variables")))
            found.append(Entry(**given, options=options, variables=variables))
        return found

    def write(self, entry: Entry) -> None:
        """Write an entry, unless it is stored already as it is."""
        if self._known.get(entry.id) != entry:
            self.folder.write_text(f"entries/{entry.id}.json", json_text(dataclasses.asdict(entry), indent=1))
            self._known[entry.id] = entry

    def add_package(self, entry: Entry, package: bytes) -> None:
        """Store the files of an entry."""
        self.folder.write_bytes(f"packages/{entry.id}.zip", package)

    def add_code(self) -> str:
        """Store the running dreamfleet, unless it is stored already; return its digest."""
        digest = hashlib.sha256()
        files = code_files()
        for name, path in sorted(files.items()):
            digest.update(name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
        name = digest.hexdigest()[:16]
        if not self.folder.exists(f"code/{name}.zip"):
            self.folder.write_bytes(f"code/{name}.zip", _zipped())
        return name

    def unpack(self, entry: Entry, into: Path) -> tuple[Path, list[Path]]:
        """Write an entry's package and code into a folder; return the package's path and the code's folders."""
        package = into / f"{entry.id}.zip"
        package.write_bytes(self.folder.read_bytes(f"packages/{entry.id}.zip"))
        archive = into / "code.zip"
        archive.write_bytes(self.folder.read_bytes(f"code/{entry.code}.zip"))
        with zipfile.ZipFile(archive) as file:
            file.extractall(into / "code")
        return package, sorted((into / "code").iterdir())

    def cancelled(self) -> set[str]:
        """Return the IDs of the entries to stop."""
        return set(self.folder.list("cancel"))

    def cancel(self, entry_id: str) -> None:
        """Ask the queue to stop an entry."""
        self.folder.write_text(f"cancel/{entry_id}", "")

    def forget_cancel(self, entry_id: str) -> None:
        """Remove the request to stop an entry."""
        self.folder.remove(f"cancel/{entry_id}")


def _zipped() -> bytes:

    buffer = io.BytesIO()
    with tempfile.TemporaryDirectory(prefix="dreamfleet-") as folder, zipfile.ZipFile(buffer, "w") as archive:
        write_code(Path(folder))
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file():
                archive.write(path, path.relative_to(folder).as_posix(), zipfile.ZIP_DEFLATED)
    return buffer.getvalue()
