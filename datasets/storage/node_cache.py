"""A cache of files from buckets, shared by the processes of one machine: each file is downloaded once per machine.

Entries lie in ``$DREAMFLEET_CACHE``, by default ``$XDG_CACHE_HOME/dreamfleet`` or ``~/.cache/dreamfleet``, in a folder
for each address and version (names, sizes and ETags of the files). A lock file makes other processes wait for a
download. An entry whose files changed in the bucket is removed a day after its last use.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from dreamfleet.datasets.errors import StorageError
from dreamfleet.datasets.storage.bucket_keys import bucket_versions
from dreamfleet.datasets.storage.object_store import bucket_at
from dreamfleet.datasets.storage.storage import Storage

log = logging.getLogger(__name__)
FOLDER_VARIABLE = "DREAMFLEET_CACHE"
KEPT_SECONDS = (
    24 * 3600.0
)  # after the last use of an outdated entry, which another process may still be reading


def cache_folder() -> Path:
    """Return the folder of this machine's cache; it need not exist."""
    if own := os.environ.get(FOLDER_VARIABLE):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dreamfleet"


@contextmanager
def node_copy(address: str) -> Iterator[Path]:
    """Yield a local path of the file or folder at ``address``: its own on disk, else that of this machine's copy.

    The copy must not be changed. If the cache folder cannot be written, the copy is temporary. Raises StorageError if
    the address does not exist or cannot be read.
    """
    storage = Storage(address)
    if storage.is_local:
        with storage.local_copy() as path:
            yield path
        return
    home = _home(storage)
    if home is None:
        with storage.local_copy() as path:
            yield path
        return
    yield _cached(storage, home)


def _home(storage: Storage) -> Path | None:
    """Return the folder of all versions of an address; None if it cannot be created."""
    home = cache_folder() / "files" / hashlib.sha256(storage.url.encode()).hexdigest()[:32]
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        log.warning("%s cannot be used as a cache (%s): every process downloads %s", home, error, storage.url)
        return None
    return home


def _cached(storage: Storage, home: Path) -> Path:
    """Return the path of the copy of the present version, which is downloaded first if necessary."""
    bucket = bucket_at(storage.url)
    versions = bucket.run("read", storage.url, bucket_versions)
    text = "\n".join(f"{name}\0{version}" for name, version in sorted(versions.items()))
    entry = home / hashlib.sha256(text.encode()).hexdigest()[:32]
    content, complete = entry / storage.url.rsplit("/", 1)[1], entry / ".complete"
    with FileLock(home / ".lock"):
        if not complete.exists():
            _remove_outdated(home)
            shutil.rmtree(entry, ignore_errors=True)  # left by an interrupted download
            storage.download("", content)
            if bucket.run("read", storage.url, bucket_versions) != versions:
                raise StorageError(f"{storage.url} changed while it was downloaded; run the command again")
            log.info("downloaded %s for all processes of this machine: %s", storage.url, content)
        complete.touch()  # the time of the last use
    return content


def _remove_outdated(home: Path) -> None:
    for entry in home.iterdir():
        used = entry / ".complete"
        if used.exists() and time.time() - used.stat().st_mtime > KEPT_SECONDS:
            shutil.rmtree(entry, ignore_errors=True)
