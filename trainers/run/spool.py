"""The folder on a machine's disk where checkpoints wait until they are stored in a bucket."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import shutil
import tempfile
from pathlib import Path

from dreamfleet.datasets.errors import StorageError
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.run.checkpoint import Checkpoints


def spool_root() -> Path:
    """Return the folder of this user for all spools, in the folder for temporary files (``TMPDIR``)."""
    return Path(tempfile.gettempdir()) / f"dreamfleet-spool-{os.getuid()}"


class Spool:
    """The checkpoints of one run that are complete on this machine's disk and not yet in its bucket.

    Each process has its own folder, which :meth:`close` removes, unless checkpoints are left in it.
    """

    def __init__(self, run: Storage):
        name = hashlib.sha256(run.url.encode()).hexdigest()[:12]
        self.folder = spool_root() / name / f"{os.getpid()}-{secrets.token_hex(4)}"
        try:
            self.folder.mkdir(parents=True, mode=0o700)
        except OSError as error:
            raise StorageError(
                f"cannot create {self.folder}, where checkpoints wait for the bucket: {error.strerror}. Set TMPDIR "
                "to a folder that can be written"
            ) from error
        self.checkpoints = Checkpoints(Storage(self.folder))

    def path(self, name: str) -> str:
        """Return the local path of a checkpoint's folder."""
        return self.checkpoints.storage.path(name)

    def close(self) -> None:
        """Remove the folder if no checkpoint is left in it."""
        with contextlib.suppress(StorageError, OSError):
            if not self.checkpoints.steps():
                shutil.rmtree(self.folder)
                self.folder.parent.rmdir()
