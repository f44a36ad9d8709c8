"""Names the internals of Ray Train that watching a run needs; a test compares them with the installed version."""

from __future__ import annotations

from typing import Any

from ray._private.state import state as _cluster_state
from ray.train.torch.config import TorchConfig, _TorchBackend
from ray.train.v2._internal.constants import get_env_vars_to_propagate
from ray.train.v2._internal.exceptions import (
    UserExceptionWithTraceback,
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)
from ray.train.v2._internal.execution.callback import ReplicaGroupCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.controller.controller import (
    TrainController,
    TrainControllerLoopIterationResult,
)
from ray.train.v2._internal.execution.controller.state import (
    FinishedState,
    RestartingState,
    RunningState,
    ShuttingDownState,
)
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2._internal.execution.scaling_policy import (
    ElasticScalingPolicy,
    FixedScalingPolicy,
    NoopDecision,
)
from ray.train.v2._internal.execution.worker_group import Worker, WorkerGroup, WorkerGroupPollStatus
from ray.train.v2._internal.execution.worker_group.execution_group import ReplicaGroup
from ray.train.v2._internal.execution.worker_group.poll import WorkerStatus
from ray.train.v2._internal.util import bundle_to_remote_args
from ray.train.v2.api.exceptions import WorkerGroupError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

__all__ = [
    "ElasticScalingPolicy",
    "FailureDecision",
    "FinishedState",
    "FixedScalingPolicy",
    "MemberBackend",
    "MemberConfig",
    "NoopDecision",
    "PlacementGroupSchedulingStrategy",
    "ReplicaGroup",
    "RestartingState",
    "RunningState",
    "ShuttingDownState",
    "TrainController",
    "TrainControllerLoopIterationResult",
    "WorkerGroupError",
    "WorkerStatus",
    "bundle_to_remote_args",
    "get_env_vars_to_propagate",
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


class MemberBackend(_TorchBackend):
    """Leaves process groups to the workers; Ray Train may replace single workers (replica groups)."""

    has_replica_groups = True

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        """Open no process group."""

    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
        """Close no process group: the workers have done that, or are dead."""


class MemberConfig(TorchConfig):
    """Selects :class:`MemberBackend`."""

    @property
    def backend_cls(self) -> type[MemberBackend]:
        """The backend's class."""
        return MemberBackend
