"""Tells from the exceptions of Ray Train's workers what happened: an error of the run, or of a machine."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError

from dreamfleet.datasets.errors import RunFailed, UserError
from dreamfleet.trainers.distributed.context import OtherRankFailed
from dreamfleet.trainers.distributed.pulse import Preempted
from dreamfleet.trainers.driver.failures import Cause
from dreamfleet.trainers.driver.ray_internals import (
    UserExceptionWithTraceback,
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)

#: parts of the messages of gloo, NCCL and sockets when another worker is gone
_LOST_CONNECTION = (
    "connection closed by peer",
    "connection reset",
    "connection refused",
    "broken pipe",
    "socket timeout",
    "timed out waiting",
    "remote process exited",
    "nccl communicator was aborted",
    "store->get",
)
#: which failure explains the others, if several workers report one at the same time
_ORDER: tuple[Cause, ...] = ("mistake", "preempted", "hung", "memory", "died", "error", "lost")


class Reported(NamedTuple):
    """What a worker's exception means, in words."""

    cause: Cause
    rank: int
    error: str


def find_cause(
    errors: Mapping[int, BaseException], *, hung: Collection[int] = (), drained: Collection[int] = ()
) -> Reported:
    """Return the failure that explains the exceptions of workers, by rank.

    ``hung``: ranks that were ended because they hung; ``drained``: ranks on nodes that are being drained.
    """
    found = []
    for rank, error in sorted(errors.items()):
        cause, text = _classify(error)
        if rank in hung and cause in ("died", "lost"):
            cause, text = "hung", "it made no progress and was ended"
        if rank in drained and cause in ("died", "lost"):
            cause, text = "preempted", f"its node was drained: {text}"
        found.append(Reported(cause, rank, text))
    return min(found, key=lambda one: _ORDER.index(one.cause))


def _classify(error: BaseException) -> tuple[Cause, str]:
    if isinstance(error, UserExceptionWithTraceback):
        error = error._base_exc
    if isinstance(error, WorkerHealthCheckFailedError):
        return _classify_death(error.health_check_failure)
    if isinstance(error, UserError | RunFailed):
        return "mistake", str(error)
    if isinstance(error, Preempted):
        return "preempted", str(error)
    if isinstance(error, WorkerHealthCheckTimeoutError):
        return "hung", "it does not answer"
    if isinstance(error, RayActorError | OutOfMemoryError):
        return _classify_death(error)
    lines = str(error).strip().splitlines()
    text = ": ".join([type(error).__name__, *lines[:1]])[:500]
    is_collateral = isinstance(error, OtherRankFailed) or any(
        words in str(error).lower() for words in _LOST_CONNECTION
    )
    return ("lost", f"its connection to another worker broke: {text}") if is_collateral else ("error", text)


def _classify_death(error: BaseException) -> tuple[Cause, str]:
    text = str(error).lower()
    if isinstance(error, RayActorError) and error.preempted:
        return "preempted", "its node was drained"
    if isinstance(error, OutOfMemoryError) or "low on memory" in text:
        return "memory", "its process was killed because the machine ran out of memory"
    if isinstance(error, NodeDiedError) or "node has died" in text or "node died" in text:
        return "died", "its node was lost"
    return "died", "its process was killed or crashed"
