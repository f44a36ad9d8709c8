"""The folder on a machine's disk where checkpoints wait until they are stored in a bucket."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from dreamfleet.datasets.errors import StorageError
from dreamfleet.datasets.json_text import json_text
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.run.checkpoint import Checkpoints
from dreamfleet.trainers.run.fence import Fence
from dreamfleet.trainers.run.lease import Holder, is_alive, this_process

ORIGIN = "origin.json"


def spool_root() -> Path:
    """Return the folder of this user for all spools, in the folder for temporary files (``TMPDIR``)."""
    return Path(tempfile.gettempdir()) / f"dreamfleet-spool-{os.getuid()}"


@dataclass(frozen=True)
class Origin:
    """The process that a spool belongs to, and its attempt of the run: number, and when it began (ISO 8601)."""

    holder: Holder
    attempt: int
    since: str

    @classmethod
    def read(cls, spool: Path) -> Origin | None:
        """Return the origin of a spool; None if it is missing or damaged."""
        try:
            tree = json.loads((spool / ORIGIN).read_text(encoding="utf-8"))
            return cls(Holder(**tree["holder"]), int(tree["attempt"]), str(tree["since"]))
        except (OSError, ValueError, TypeError, KeyError):
            return None

    @property
    def is_running(self) -> bool:
        """Whether the process is another one of this machine that still runs."""
        me = this_process()
        return self.holder.machine == me.machine and self.holder.pid != me.pid and is_alive(self.holder)


class Spool:
    """The checkpoints of one run that are complete on this machine's disk and not yet in its bucket.

    Each process has its own folder, which :meth:`close` removes, unless checkpoints are left in it: the next start of
    the run on this machine stores the newest of them (:mod:`left_spools`). ``run``: what the folders are named by.
    """

    def __init__(self, run: Storage):
        self.folder = _folder_of(run) / f"{os.getpid()}-{secrets.token_hex(4)}"
        self._signed = -1  # the attempt in the folder's origin
        try:
            self.folder.mkdir(parents=True, mode=0o700)
        except OSError as error:
            raise StorageError(
                f"cannot create {self.folder}, where checkpoints wait for the bucket: {error.strerror}. Set TMPDIR "
                "to a folder that can be written"
            ) from error
        self.checkpoints = spooled_checkpoints(self.folder)

    def sign(self, fence: Fence | None) -> None:
        """Write whose checkpoints these are, unless that is known: the attempt of ``fence``."""
        attempt, since = (fence.attempt, fence.since) if fence is not None else (0, "")
        if attempt != self._signed:
            origin = Origin(this_process(), attempt, since)
            Storage(self.folder).write_text(ORIGIN, json_text(asdict(origin), indent=1))
            self._signed = attempt

    def path(self, name: str) -> str:
        """Return the local path of a checkpoint's folder."""
        return self.checkpoints.storage.path(name)

    def close(self) -> None:
        """Remove the folder if no checkpoint is left in it."""
        with contextlib.suppress(StorageError, OSError):
            if not self.checkpoints.steps():
                shutil.rmtree(self.folder)
                self.folder.parent.rmdir()


def left_spools(run: Storage) -> list[Path]:
    """Return the folders of this user's spools of a run whose processes have ended, as far as this machine knows."""
    found = []
    with contextlib.suppress(OSError):
        for path in sorted(_folder_of(run).iterdir()):
            status = path.lstat()  # others may write into the folder for temporary files
            if path.is_dir() and not path.is_symlink() and status.st_uid == os.getuid():
                origin = Origin.read(path)
                if origin is None or not origin.is_running:
                    found.append(path)
    return found


def spooled_checkpoints(spool: Path) -> Checkpoints:
    """Return the checkpoints in a spool's folder."""
    return Checkpoints(Storage(spool))


def _folder_of(run: Storage) -> Path:
    return spool_root() / hashlib.sha256(run.url.encode()).hexdigest()[:12]
