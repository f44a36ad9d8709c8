"""Names the internals of Ray Train that watching a run needs; a test compares them with the installed version."""

from __future__ import annotations

from ray._private.state import state as _cluster_state
from ray.train.v2._internal.exceptions import (
    UserExceptionWithTraceback,
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)
from ray.train.v2._internal.execution.callback import ReplicaGroupCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.worker_group import Worker, WorkerGroup, WorkerGroupPollStatus

__all__ = [
    "ReplicaGroupCallback",
    "UserExceptionWithTraceback",
    "Worker",
    "WorkerGroup",
    "WorkerGroupCallback",
    "WorkerGroupPollStatus",
    "WorkerHealthCheckFailedError",
    "WorkerHealthCheckTimeoutError",
    "draining_nodes",
]

#: switches Ray's own watcher off: an actor for each group of workers, and none with replica groups
PREEMPTION_WATCHER = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"


def draining_nodes() -> dict[str, int]:
    """Return the nodes that are being drained, with the deadline in milliseconds since 1970; 0 for none."""
    return dict(_cluster_state.get_draining_nodes() or {})
