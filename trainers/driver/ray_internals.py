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

from dreamfleet.trainers.distributed.internals import Internal

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

_GROUP = "ray.train.v2._internal.execution.worker_group:WorkerGroup"
_CONTROLLER = "ray.train.v2._internal.execution.controller.controller:TrainController"
_TRAINER = "ray.train.v2.api.data_parallel_trainer:DataParallelTrainer"


#: What the subclasses of Ray Train's classes in this package use or replace
INTERNALS = (
    Internal(_GROUP, "_replica_groups"),
    Internal(_GROUP, "_replica_group_callbacks"),
    Internal(_GROUP, "_world_rank_to_ongoing_poll"),
    Internal(_GROUP, "_worker_rank_to_replica_group_rank"),
    Internal(_GROUP, "_worker_group_context"),
    Internal(_GROUP, "_worker_group_state"),
    Internal(_GROUP, "_train_run_context"),
    Internal(_GROUP, "_worker_cls"),
    Internal(_GROUP, "_get_worker_runtime_env", ("custom_runtime_env",)),
    Internal(
        _GROUP, "_assign_worker_ranks", ("workers", "starting_world_rank", "world_size", "replica_group_size")
    ),
    Internal(_GROUP, "_init_train_context", ("workers", "sync_actor")),
    Internal(_GROUP, "_poll_workers_and_collect_errors", ("timeout",)),
    Internal(_GROUP, "shutdown", ()),
    Internal(_GROUP, "abort", ()),
    Internal(_CONTROLLER, "worker_group_cls"),
    Internal(_CONTROLLER, "_health_check_interval_s"),
    Internal(_CONTROLLER, "_failure_policy"),
    Internal(_CONTROLLER, "_scaling_policy"),
    Internal(_CONTROLLER, "_return_value"),
    Internal(_CONTROLLER, "_step", ()),
    Internal(_CONTROLLER, "_poll_workers", ()),
    Internal(_CONTROLLER, "_shutdown_worker_group", ()),
    Internal(_CONTROLLER, "_get_run_attempt_id", ()),
    Internal(
        _CONTROLLER,
        "_execute_failure_decision",
        ("failure_decision", "training_failed_error", "invoke_failure_decision_callbacks"),
    ),
    Internal(
        "ray.train.v2._internal.execution.scaling_policy:ScalingPolicy", "_maybe_send_resource_request", ()
    ),
    Internal(_TRAINER, "_create_default_callbacks", ()),
    Internal(_TRAINER, "_initialize_and_run_controller", ()),
    Internal("ray.train.backend:Backend", "has_replica_groups"),
)

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
