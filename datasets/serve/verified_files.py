"""Remembers which files on disk had the hash that the index records, so that later epochs need not hash them again."""

from __future__ import annotations

import hashlib
import os
import time
from typing import NamedTuple

MOST_FILES = 2**16  # that a process remembers, about 25 MB
SETTLED_SECONDS = 2.0  # a file that was changed more recently may change again without another time


class Stamp(NamedTuple):
    """What a change of a file changes: every write and rename sets the time ``ctime_ns``, which programs cannot set."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int


class VerifiedFiles:
    """The files of one process whose content had the expected SHA-256, by path, with their stamps at that time."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], Stamp] = {}

    def stamp(self, uri: str) -> Stamp | None:
        """Return the stamp of a file on disk; None for other addresses, and if it cannot be had."""
        if "://" in uri:
            return None
        try:
            status = os.stat(uri)
        except OSError:
            return None
        return Stamp(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)

    def has_hash(self, content: bytes, sha256: str, *, uri: str, before: Stamp | None) -> bool:
        """Return whether ``content``, which was read from ``uri`` just now, has a hash.

        ``before`` is the file's stamp before it was read. A file with the stamp that it had when its content was hashed
        is not hashed again: the stamp is taken once more here, after the content was read.
        """
        seen = self._known.get((uri, sha256))
        if seen is not None and seen == self.stamp(uri):
            return True
        if hashlib.sha256(content).hexdigest() != sha256:
            self._known.pop((uri, sha256), None)
            return False
        if before is not None and before.ctime_ns < (time.time() - SETTLED_SECONDS) * 1e9:
            self._known[uri, sha256] = before
            if len(self._known) > MOST_FILES:
                del self._known[next(iter(self._known))]
        return True


VERIFIED = VerifiedFiles()
