"""Ray Train's controller for workers that come and go: the others train on while one is replaced."""

from __future__ import annotations

import logging
import time
from typing import Any

import ray

from dreamfleet.trainers.distributed.membership import GroupBroke, Observer
from dreamfleet.trainers.driver.member_group import MemberGroup
from dreamfleet.trainers.driver.ray_internals import (
    ElasticScalingPolicy,
    FailureDecision,
    FinishedState,
    FixedScalingPolicy,
    NoopDecision,
    RestartingState,
    RunningState,
    ShuttingDownState,
    TrainController,
    TrainControllerLoopIterationResult,
    WorkerGroupError,
    WorkerGroupPollStatus,
)

log = logging.getLogger(__name__)

POLL_SECONDS = 2.0
REPLACING_SECONDS = 0.5  # between polls while a worker is being replaced
END_SECONDS = 20.0  # for the last workers, after one has completed the run
LEFT = "left"  # key of the result of a worker that left the run


class MemberController(TrainController):
    """Replaces workers singly, adds workers where there is room, and starts all again only if all are gone.

    ``coordinator``: address and key of the run's coordinator; ``most``: the largest number of workers.
    """

    worker_group_cls = MemberGroup

    def __init__(self, *, coordinator: tuple[tuple[str, int], bytes], most: int, **kwargs: Any):
        self._coordinator = coordinator
        self._most = most
        self._view: dict[str, Any] = {"members": {}, "lost": {}}
        self._handled: set[str] = set()  # lost members whose worker has been ended
        self._observer: Observer | None = None
        self._completed_at: float | None = None
        super().__init__(**kwargs)

    async def _step(self) -> TrainControllerLoopIterationResult:
        if not isinstance(self.get_state(), RunningState):
            return await super()._step()
        if self._observer is None:
            self._observer = Observer(*self._coordinator, on_view=self._see)
        group = self.get_worker_group()
        assert isinstance(group, MemberGroup)
        self._health_check_interval_s = REPLACING_SECONDS if group.vacancies else POLL_SECONDS
        status = await self._poll_workers()
        return self._judge(group, status)

    def _see(self, view: dict[str, Any]) -> None:
        self._view = view

    def _judge(self, group: MemberGroup, status: WorkerGroupPollStatus) -> TrainControllerLoopIterationResult:
        """Return what follows from a poll: training goes on, is complete, or starts again from a checkpoint."""
        statuses = status.worker_statuses
        ended = {number: one for number, one in statuses.items() if not one.running and one.error is None}
        results = [one.return_value for one in ended.values() if LEFT not in (one.return_value or {})]
        alive = [number for number, one in statuses.items() if one.running and number not in group.vacancies]
        if results:
            self._completed_at = self._completed_at or time.monotonic()
            if not alive or time.monotonic() - self._completed_at > END_SECONDS:
                self._return_value = results[0]
                return self._go_to(ShuttingDownState(next_state=FinishedState()))
            return self._go_to(RunningState())
        errors = status.errors
        if errors:
            failed = WorkerGroupError(error_message=status.get_error_string(), worker_failures=errors)
            decision = self._failure_policy.make_decision(training_failed_error=failed)
            if decision == FailureDecision.RAISE:
                return self._execute_failure_decision(decision, training_failed_error=failed)
            if not alive or any(isinstance(error, GroupBroke) for error in errors.values()):
                return self._restart(failed)
        for number in errors:
            group.vacate(number)
            self._handle(number)
        for number in ended:
            group.vacate(number, avoided=group.get_workers()[number].metadata.node_id)
            self._handle(number)
        if not alive:  # all have left: their state is in the checkpoint that they saved
            return self._restart(WorkerGroupError("every worker was lost or left", worker_failures={}))
        self._end_cut_off(group)
        group.add_places(self._most)
        for number in group.fill():
            log.info("worker %d was started", number)
        self._scaling_policy._maybe_send_resource_request()
        return self._go_to(RunningState())

    def _end_cut_off(self, group: MemberGroup) -> None:
        """End workers that the others have cut off, such as silent ones, so that they are replaced."""
        living = set(self._view["members"].values())
        for name in [name for name in self._view["lost"] if name not in self._handled]:
            self._handled.add(name)
            number = int(name.partition("-")[0])
            if number not in living and number not in group.vacancies and number < len(group.get_workers()):
                ray.kill(group.get_workers()[number].actor)

    def _handle(self, number: int) -> None:
        self._handled |= {name for name in self._view["lost"] if int(name.partition("-")[0]) == number}

    def _restart(self, error: WorkerGroupError) -> TrainControllerLoopIterationResult:
        """Start all workers again, from the newest checkpoint."""
        self._shutdown_worker_group()
        return self._go_to(RestartingState(training_failed_error=error))

    def _go_to(self, state: Any) -> TrainControllerLoopIterationResult:
        return TrainControllerLoopIterationResult(
            run_attempt_id=self._get_run_attempt_id(), previous_state=self.get_state(), next_state=state
        )


class StartSizePolicy(ElasticScalingPolicy):
    """Starts with as many workers as there is room for; later changes are made by the controller."""

    def make_decision_for_running_worker_group(
        self, worker_group_state: Any, worker_group_status: Any
    ) -> Any:
        """Keep the group."""
        return NoopDecision()


def scaling_policy(scaling_config: Any) -> Any:
    """Return Ray Train's policy for the size of the group at a start."""
    kind = StartSizePolicy if scaling_config.elasticity_enabled else FixedScalingPolicy
    return kind(scaling_config=scaling_config)
