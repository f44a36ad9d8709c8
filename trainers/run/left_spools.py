"""Stores in the bucket the checkpoint that a process which ended left on this machine's disk."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from dreamfleet.datasets.errors import CheckpointError, StorageError
from dreamfleet.trainers.run.checkpoint import Checkpoints
from dreamfleet.trainers.run.fence import Fence
from dreamfleet.trainers.run.lease import Lease, is_superseded
from dreamfleet.trainers.run.spool import Origin, left_spools, spooled_checkpoints

log = logging.getLogger(__name__)


def store_left_checkpoint(checkpoints: Checkpoints, fence: Fence) -> int | None:
    """Store the newest checkpoint of this run that waits in spools of this machine; return its step.

    It is stored by a new attempt of ``fence``, and only if the bucket has none that is as new, and no later attempt
    began before its step. Spools of processes that still run are not touched; the others are removed, with a warning
    for each checkpoint that is not used. None if none is stored. Raises StorageError if the bucket fails, LeaseLost.
    """
    spools = left_spools(checkpoints.storage)
    if not spools:
        return None
    lease, newest = fence.read(), max(checkpoints.steps(), default=0)
    stored = None
    waiting = [(step, spool) for spool in spools for step in _steps(spool)]
    for step, spool in sorted(waiting, key=lambda item: -item[0]):
        if reason := _reason_against(step, spool, lease, newest=newest if stored is None else stored):
            log.warning("the checkpoint of step %d in %s is not used: %s", step, spool, reason)
            continue
        fence.begin(step=step)
        checkpoints.adopt(spooled_checkpoints(spool), step)
        stored = step
        log.info("the checkpoint of step %d, left in %s by a process that ended, is stored now", step, spool)
    for spool in spools:
        shutil.rmtree(spool, ignore_errors=True)
    return stored


def _steps(spool: Path) -> list[int]:
    """Return the steps of a spool's complete checkpoints; log a warning if it has none."""
    try:
        steps = spooled_checkpoints(spool).steps()
    except (StorageError, CheckpointError) as error:
        log.warning("%s, left by a process that ended, cannot be read: %s", spool, error)
        return []
    if not steps:
        log.warning("%s, left by a process that ended, has no complete checkpoint", spool)
    return steps


def _reason_against(step: int, spool: Path, lease: Lease, *, newest: int) -> str:
    """Return why a spooled checkpoint must not be stored; empty if it may be."""
    origin = Origin.read(spool)
    if origin is None or not any(
        attempt.number == origin.attempt and attempt.since == origin.since for attempt in lease.attempts
    ):
        return "no attempt of this run wrote it"
    if step <= newest:
        return f"the bucket has that of step {newest}"
    if is_superseded(lease.attempts, attempt=origin.attempt, step=step):
        return "the run went on from an older one"
    try:
        spooled_checkpoints(spool).load(step)
    except CheckpointError as error:
        return str(error)
    return ""
