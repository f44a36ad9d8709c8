"""Support for ZeRO-3 offload to an NVMe disk: the swap folder, and access to tensors that are swapped out."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch import Tensor

from dreamfleet.datasets.errors import ResourceError
from dreamfleet.trainers.engines import deepspeed_internals as internals
from dreamfleet.trainers.engines.zero_setup import build_op
from dreamfleet.trainers.engines.zero_shards import Shards

log = logging.getLogger(__name__)
PREFIX = "dreamfleet-swap-"


class SwapFolder:
    """A folder under ``engine.nvme_path`` that only this process uses; :meth:`close` removes it.

    DeepSpeed names its files by rank only, so two runs or trials would overwrite each other's files in a shared folder.
    Folders of killed processes are removed when the next SwapFolder is created. Raises ResourceError if the path is
    not writable.
    """

    def __init__(self, parent: str):
        try:
            Path(parent).mkdir(parents=True, exist_ok=True)
            # One process at a time: another one would remove this folder as stale before it is locked.
            with _lock_of(Path(parent) / f"{PREFIX}gate"):
                _remove_stale(Path(parent))
                self.path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
                self._lock = _lock_of(self.path / "lock")
                self._lock.acquire()
        except OSError as error:
            raise ResourceError(
                f"engine.nvme_path: {parent} cannot be written on this machine ({error.strerror}); give a folder on a "
                "fast local disk that every machine has"
            ) from error

    def close(self) -> None:
        """Remove the folder."""
        if self._lock.is_locked:
            self._lock.release()
            shutil.rmtree(self.path, ignore_errors=True)


def build_swapping() -> None:
    """Compile DeepSpeed's asynchronous I/O, unless it was compiled on this machine before. Takes minutes.

    Raises ResourceError if it cannot be compiled.
    """
    from deepspeed.ops.op_builder import AsyncIOBuilder
    from deepspeed.ops.op_builder.pin_memory import PinMemoryBuilder

    # AsyncIOBuilder also builds the first op. Build them separately, so that build_op removes stale locks of both.
    for builder in (PinMemoryBuilder(), AsyncIOBuilder()):
        build_op(
            builder,
            what="engine: offload to nvme compiles DeepSpeed's asynchronous I/O",
            needs="g++, ninja and libaio (apt-get install g++ libaio-dev; pip install ninja), and a machine with a GPU "
            "the CUDA toolkit (nvcc, found by CUDA_HOME)",
            instead="offload to cpu",
        )


class SwappedShards(Shards):
    """Shards whose weights and moments are in files, of which one sub-group is in memory at a time.

    Accessing the parameters in order reads each file once.
    """

    _here: int | None = None
    _changed = False
    _shown: str | None = None

    @contextmanager
    def showing(self, moment: str) -> Iterator[None]:
        self._shown = moment
        try:
            yield
        finally:
            self._shown = None

    def rest(self) -> None:
        if self._here is None:
            return
        internals.swap_out(self.outer, self._here, changed=self._changed)
        self._here, self._changed = None, False

    def _mark_written(self) -> None:
        self._changed = True

    def _flat(self, number: int) -> Tensor:
        flat: Any = self.flats[number]
        if number != self._here:
            self.rest()
            if internals.is_swapped(self.outer, number):
                internals.swap_in(self.outer, number)
                self._here, self._changed = number, False
        return flat if self._shown is None else self.inner.state[flat][self._shown]


def _remove_stale(parent: Path) -> None:
    """Remove the swap folders of processes that no longer run."""
    for left in parent.glob(f"{PREFIX}*/"):
        with suppress(Timeout), _lock_of(left / "lock").acquire(blocking=False):
            log.warning("removing %s, left by a run that was killed", left)
            shutil.rmtree(left, ignore_errors=True)


def _lock_of(path: Path) -> FileLock:
    """Return a file lock that the system releases when the process ends and that any thread may release."""
    return FileLock(path, thread_local=False, fallback_to_soft=False)
