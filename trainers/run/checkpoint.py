"""Checkpoint files: the complete state that a resume needs, verified by a manifest that is written last."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from dreamfleet.datasets.errors import CheckpointError, StorageError
from dreamfleet.datasets.json_text import json_text
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.run.fence import Fence
from dreamfleet.trainers.run.finite import find_not_finite
from dreamfleet.trainers.run.lease import LeaseFile
from dreamfleet.trainers.run.manifests import MANIFEST, attempt_of, find_manifest, path_of, stored_name

log = logging.getLogger(__name__)
ENGINE, EXPORTED = (
    "engine.pt",
    "ema.pt",
)  # the engine's state, and the part of it that is left without its optimizer


@dataclass
class Checkpoint:
    """The state of a run after optimizer step ``step``.

    ``learned``: the trainable parameters by name; ``engine``: the rest of the engine's state, such as
    optimizer moments and EMA weights; ``meta``: identity, versions and durations of the run. ``resumable``: False if
    the optimizer state was dropped, so that the checkpoint can be exported but not continued.
    """

    step: int
    learned: dict[str, Tensor]
    engine: dict[str, Any]
    meta: dict[str, Any]
    resumable: bool = True


class Checkpoints:
    """The ``checkpoints/`` folder of a run, on disk or in a bucket.

    A checkpoint is valid if it has a manifest, which is written after the files that it names, and if the
    files have the sizes and hashes of the manifest. Incomplete or changed checkpoints are skipped with a
    warning, and those of a process that had been replaced (:func:`is_superseded`) without one. ``fence``: of the
    process that saves.
    """

    def __init__(self, run: Storage, *, limit: int | None = None, fence: Fence | None = None):
        self.storage, self.limit, self.fence = run.child("checkpoints"), limit, fence
        self._lease = LeaseFile(run)
        self.best: int | None = None  # the step whose checkpoint is kept beyond the limit
        self.in_use = set[int]()  # steps whose checkpoints another process reads; they are kept as well

    def steps(self) -> list[int]:
        """Return the steps of the complete checkpoints that are not superseded, oldest first."""
        attempts = self._lease.read().attempts
        found = []
        for name in self.storage.list_dirs():
            step = name.removeprefix("step-")
            if step.isdigit() and find_manifest(self.storage.list(name), int(step), attempts):
                found.append(int(step))
        return sorted(found)

    def save(
        self, step: int, *, learned: dict[str, Tensor], engine: dict[str, Any], meta: dict[str, Any]
    ) -> str:
        """Write the checkpoint of ``step``, then remove those beyond the limit; return the folder's name.

        The best checkpoint is not removed. Raises StorageError if the files cannot be written, for example on
        a full disk; earlier checkpoints stay intact.
        """
        try:
            self.write(step, learned=learned, engine=engine, meta=meta)
        except StorageError as error:
            raise self.explain(step, error) from error
        self.prune(step)
        return folder_name(step)

    def write(
        self, step: int, *, learned: dict[str, Tensor], engine: dict[str, Any], meta: dict[str, Any]
    ) -> None:
        """Write the checkpoint of ``step``. Raises StorageError, and leaves no part of it, if that fails."""
        name = folder_name(step)
        writers: dict[str, Callable[[Path], object]] = {
            "learned.safetensors": lambda path: safetensors.torch.save_file(_plain(learned), path),
            ENGINE: lambda path: torch.save(engine, path),
            "meta.json": lambda path: path.write_text(
                json_text({**meta, "step": step}, indent=1), encoding="utf-8"
            ),
        }
        try:
            entries = {file: self._write(name, file, writer) for file, writer in writers.items()}
            self.publish(step, entries)
        except StorageError:
            for file in writers:
                self._remove_quietly(f"{name}/{stored_name(file, self.fence)}")
            if not self.storage.list(name):
                self._remove_quietly(name)
            raise

    def adopt(self, other: Checkpoints, step: int) -> None:
        """Copy the checkpoint of ``step`` from another, local folder; its manifest is written last."""
        name, files = folder_name(step), {}
        for file, entry in other._read_manifest(step)["files"].items():
            stored = stored_name(file, self.fence)
            self.storage.upload(other.storage.path(name, file), f"{name}/{stored}")
            files[file] = entry if stored == file else {**entry, "path": stored}
        self.publish(step, files)

    def explain(self, step: int, error: StorageError) -> StorageError:
        """Return the error of a save that failed, which names the newest intact checkpoint."""
        try:
            earlier = [saved for saved in self.steps() if saved != step]
        except StorageError:  # the storage cannot be read either
            earlier = []
        kept = f"; the checkpoint of step {earlier[-1]} is intact, continue with --resume" if earlier else ""
        return StorageError(f"checkpoint of step {step} could not be saved: {error}{kept}")

    def publish(self, step: int, files: dict[str, Any]) -> None:
        """Write the manifest of a checkpoint whose ``files`` are stored; then remove files of earlier attempts.

        Until then a checkpoint of the same step that an earlier attempt saved stays valid.
        """
        name, manifest = folder_name(step), stored_name(MANIFEST, self.fence)
        content: dict[str, Any] = {"step": step, "files": files}
        content["attempt"] = self.fence.attempt if self.fence else 0
        self.storage.write_text(f"{name}/{manifest}", json_text(content, indent=1))
        kept = {manifest, *(path_of(files, file) for file in files)}
        for file in self.storage.list(name):
            if file not in kept and attempt_of(file) < content["attempt"]:
                self.storage.remove(f"{name}/{file}")

    def prune(self, newest: int) -> None:
        """Remove checkpoints beyond the limit, counted from the one of step ``newest``, except the best."""
        # Later checkpoints do not count: the run was not resumed from them, so they are damaged.
        until_now = [step for step in self.steps() if step <= newest]
        for old in until_now[: -self.limit] if self.limit else []:
            if old != self.best and old not in self.in_use:
                self.drop(old)

    def drop(self, step: int) -> None:
        """Remove the checkpoint of ``step``; log a warning if it cannot be removed."""
        self._remove_quietly(folder_name(step))

    def drop_optimizer(self, step: int, *, has_ema: bool = True) -> None:
        """Remove the optimizer state of a checkpoint, which then can be exported but not continued.

        ``has_ema``: False if the run keeps no EMA weights, so that the state need not be read to look for them.
        An interrupted call leaves a valid checkpoint, and can be repeated. Raises CheckpointError for a checkpoint
        that cannot be read.
        """
        name = folder_name(step)
        manifest, stored_manifest = self._read_manifest(step), self._manifest_of(step)
        files = manifest["files"]
        path = path_of(files, ENGINE)
        if ENGINE in files and has_ema:
            with self.storage.local_copy(f"{name}/{path}") as local:
                try:
                    engine = torch.load(local, map_location="cpu", weights_only=True, mmap=True)
                except Exception as error:
                    raise CheckpointError(f"checkpoint {name} cannot be read: {error}") from error
                if "ema" in engine:
                    left = {"ema": engine["ema"]}
                    files[EXPORTED] = self._write(name, EXPORTED, lambda file: torch.save(left, file))
        if files.pop(ENGINE, None):
            self.storage.write_text(
                f"{name}/{stored_manifest}", json_text({**manifest, "files": files}, indent=1)
            )
        self.storage.remove(f"{name}/{path}")

    def load_latest(self) -> Checkpoint | None:
        """Read the newest valid checkpoint; None if there is none. Skip damaged ones with a warning."""
        for step in reversed(self.steps()):
            try:
                return self.load(step)
            except CheckpointError as error:
                log.warning("%s; trying the one before", error)
        return None

    def load_to_continue(self) -> Checkpoint | None:
        """Read the newest valid checkpoint, as :meth:`load_latest`.

        Raises CheckpointError if its optimizer state was dropped.
        """
        found = self.load_latest()
        if found is not None:
            require_optimizer(found, "continued")
        return found

    def load(self, step: int) -> Checkpoint:
        """Read the checkpoint of ``step``. Raises CheckpointError if it is missing, damaged or not finite."""
        name = folder_name(step)
        files = self._read_manifest(step)["files"]
        wanted = {file: (entry["size"], entry["sha256"]) for file, entry in files.items()}
        # Tensors are loaded from files: to read a file into bytes first would hold the model in memory twice.
        with ExitStack() as stack:
            paths = {}
            for file, expected in wanted.items():
                try:
                    stored = f"{name}/{path_of(files, file)}"
                    paths[file] = stack.enter_context(self.storage.local_copy(stored))
                    found = _measure(paths[file])
                except (StorageError, OSError) as error:
                    raise CheckpointError(f"checkpoint {name}: {file} cannot be read ({error})") from error
                if found != expected:
                    raise CheckpointError(
                        f"checkpoint {name}: {file} is damaged (its size or sha256 is not the manifest's)"
                    )
            try:
                state = paths.get(ENGINE, paths.get(EXPORTED))
                loaded = Checkpoint(
                    step=step,
                    learned=safetensors.torch.load_file(paths["learned.safetensors"]),
                    engine=torch.load(state, map_location="cpu", weights_only=True) if state else {},
                    meta=json.loads(paths["meta.json"].read_text(encoding="utf-8")),
                    resumable=ENGINE in paths,
                )
            except Exception as error:  # the hashes match, so the file was faulty when it was written
                raise CheckpointError(f"checkpoint {name} cannot be read: {error}") from error
        if bad := find_not_finite({"learned": loaded.learned, "engine": loaded.engine}):
            raise CheckpointError(f"checkpoint {name} was saved after the run diverged: {bad} is not finite")
        return loaded

    def digest(self, step: int) -> str:
        """Return the sha256 of a checkpoint's manifest, which contains the hashes of its files."""
        name = folder_name(step)
        return hashlib.sha256(self.storage.read_bytes(f"{name}/{self._manifest_of(step)}")).hexdigest()

    def _manifest_of(self, step: int) -> str:
        """Return the name of the manifest of a step; that of a missing one if there is none."""
        names = self.storage.list(folder_name(step))
        return find_manifest(names, step, self._lease.read().attempts) or MANIFEST

    def _read_manifest(self, step: int) -> dict[str, Any]:
        name = folder_name(step)
        try:
            manifest: dict[str, Any] = json.loads(self.storage.read_text(f"{name}/{self._manifest_of(step)}"))
            for entry in manifest["files"].values():
                entry["size"], entry["sha256"]
        except (StorageError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"checkpoint {name}: its manifest cannot be read ({error})") from error
        return manifest

    def _write(self, name: str, file: str, writer: Callable[[Path], object]) -> dict[str, Any]:
        """Write a file of a checkpoint; return its entry in the manifest.

        From the second attempt on its name contains the attempt: a write of a process that was replaced, which the
        network delivers late, then never changes a file of its successor.
        """
        stored = stored_name(file, self.fence)
        with self.storage.staging(f"{name}/{stored}") as path:
            writer(path)
            entry: dict[str, Any] = dict(zip(("size", "sha256"), _measure(path), strict=True))
        return entry if stored == file else {**entry, "path": stored}

    def _remove_quietly(self, name: str) -> None:
        try:
            self.storage.remove(name)
        except StorageError as error:
            log.warning("could not remove the checkpoint %s: %s", name, error)


def require_optimizer(found: Checkpoint, action: str) -> None:
    """Raise CheckpointError if the optimizer state of a checkpoint, which ``action`` needs, was dropped."""
    if not found.resumable:
        raise CheckpointError(
            f"the checkpoint of step {found.step} cannot be {action}: its optimizer state was removed when its trial "
            "of a search ended. It can be exported and sampled; to train these settings again, use the best.yaml of "
            "the search with another output_dir"
        )


def folder_name(step: int) -> str:
    """Return the name of the folder of a step's checkpoint."""
    return f"step-{step:06d}"


def _measure(path: Path) -> tuple[int, str]:
    """Return a file's size in bytes and its sha256."""
    with path.open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    return path.stat().st_size, digest


def _plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    # safetensors needs contiguous tensors; `contiguous` copies only where necessary
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
