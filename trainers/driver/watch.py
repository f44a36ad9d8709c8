"""Watches a run from Ray Train's controller: failures, nodes that are drained, and workers that hang."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from dreamfleet.datasets.environment import apply_variables
from dreamfleet.datasets.errors import RunFailed, UserError
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.config.scaling import ScalingConfig
from dreamfleet.trainers.distributed.pulse import Beat
from dreamfleet.trainers.driver import worker_process
from dreamfleet.trainers.driver.causes import find_cause
from dreamfleet.trainers.driver.failures import Failure, FailureBudget
from dreamfleet.trainers.driver.hangs import Hang, Heard, find_hang
from dreamfleet.trainers.driver.ray_internals import (
    PREEMPTION_WATCHER,
    ReplicaGroupCallback,
    Worker,
    WorkerGroup,
    WorkerGroupCallback,
    WorkerGroupPollStatus,
    draining_nodes,
)
from dreamfleet.trainers.driver.ray_metrics import publish_runs
from dreamfleet.trainers.report.events import CONTROLLER, EventLog
from dreamfleet.trainers.run.checkpoint import Checkpoints

ANSWER_SECONDS = 1.0  # for the workers that are alive when another one failed
STACK_SECONDS = 20.0  # for a task on each node that reads stacks
HANGS = "hangs"  # folder of stacks in the run folder
log = logging.getLogger(__name__)


class RunWatch(WorkerGroupCallback, ReplicaGroupCallback):
    """Called by Ray Train's controller at each poll of the workers, about every two seconds.

    A failure that ends the run is raised here: Ray Train restarts the workers after an exception in a worker, but not
    after one in a callback, which reaches the driver as the cause of a ControllerError. ``sent``: variables that
    storage needs, from ``environment.variables_to_send``.
    """

    def __init__(self, run: Storage, sent: Mapping[str, str], scaling: ScalingConfig):
        os.environ.setdefault(PREEMPTION_WATCHER, "0")  # in the driver, which passes it to the controller
        self.run, self.sent = run, sent
        self.budget, self.hang_timeout = FailureBudget(scaling.max_failures), scaling.hang_timeout
        self.group: WorkerGroup | None = None
        self.heard: dict[str, Heard] = {}  # these by _key(worker)
        self.asked: dict[str, Any] = {}
        self.processes: dict[str, Any] = {}
        self.noticed: set[str] = set()
        self.hung: set[str] = set()
        self.drained: set[str] = set()  # nodes

    @cached_property
    def events(self) -> EventLog:
        """The events of the controller, which is another process than the driver."""
        apply_variables(self.sent)
        publish_runs()
        return EventLog(self.run, CONTROLLER)

    def after_worker_group_start(self, worker_group: WorkerGroup) -> None:
        """Watch a new group of workers."""
        self.group = worker_group
        for known in (self.heard, self.asked, self.processes, self.noticed, self.hung):
            known.clear()
        self.after_execution_group_start(worker_group)

    def after_execution_group_start(self, execution_group: Any) -> None:
        """Prepare the processes of new workers."""
        for worker in execution_group.get_workers():
            self.processes[_key(worker)] = worker.execute_async(worker_process.prepare)

    def after_worker_group_poll_status(self, worker_group_status: WorkerGroupPollStatus) -> None:
        """Count failures; otherwise give notice to workers on nodes that are drained, and end those that hang."""
        if self.group is None:
            return
        workers = self.group.get_workers()
        if worker_group_status.errors:
            self._judge(worker_group_status, workers)
            return
        self._listen(workers)
        self._give_notices(workers)
        vacant = getattr(self.group, "vacancies", ())  # places whose worker is being replaced
        living = {rank: worker for rank, worker in enumerate(workers) if rank not in vacant}
        heard = {rank: self.heard[_key(worker)] for rank, worker in living.items()}
        if worker_group_status.finished or any(_key(worker) in self.hung for worker in living.values()):
            return  # the end of a worker that hung is reported by one of the next polls
        if hang := find_hang(heard, time.monotonic(), self.hang_timeout):
            self._end_hang(hang, workers)

    # progress

    def _listen(self, workers: list[Worker]) -> None:
        """Note the workers' answers to the last question, and ask those that answered again."""
        now = time.monotonic()
        for worker in workers:
            self.heard.setdefault(_key(worker), Heard(None, now))
            asked = self.asked.get(_key(worker))
            if asked is not None and ray.wait([asked], timeout=0)[0]:
                self._note(worker, asked)
            if _key(worker) not in self.asked:
                self.asked[_key(worker)] = worker.execute_async(worker_process.read_beat)

    def _note(self, worker: Worker, answer: Any) -> None:
        self.asked.pop(_key(worker), None)
        try:
            beat = ray.get(answer)
        except Exception as error:  # noqa: BLE001 - a dead worker is reported by the poll
            log.debug("worker does not answer: %s", error)
            return
        self.heard[_key(worker)] = Heard(beat, time.monotonic())
        if beat is not None:
            self.budget.note_saved(beat.saved)

    def _beats(self, workers: list[Worker]) -> dict[int, Beat]:
        """Return the newest progress of each rank that is known; of workers that are alive, that of now."""
        asked = {_key(worker): worker.execute_async(worker_process.read_beat) for worker in workers}
        ready, _ = ray.wait(list(asked.values()), num_returns=len(asked), timeout=ANSWER_SECONDS)
        for worker in workers:
            if asked[_key(worker)] in ready:
                self._note(worker, asked[_key(worker)])
        found = {rank: self.heard.get(_key(worker)) for rank, worker in enumerate(workers)}
        return {rank: one.beat for rank, one in found.items() if one is not None and one.beat is not None}

    # failures

    def _judge(self, status: WorkerGroupPollStatus, workers: list[Worker]) -> None:
        """Count a failure; raise the reason if it ends the run."""
        errors = status.errors
        for rank, error in sorted(errors.items()):
            if isinstance(error, UserError | RunFailed):
                text = f"{type(error).__name__}: {error}"[:1000]
                self.events.add("failure", cause="mistake", rank=rank, error=text, action="end")
                raise error
        hung = [rank for rank, worker in enumerate(workers) if _key(worker) in self.hung]
        drained = [rank for rank, worker in enumerate(workers) if worker.metadata.node_id in self.drained]
        reported = find_cause(errors, hung=hung, drained=drained)
        beats = self._beats(workers)
        failed = beats.get(reported.rank)
        if (
            reported.cause != "error" or failed is None
        ):  # what is known of a dead worker may be two seconds old
            failed = max(beats.values(), key=lambda beat: beat.step, default=None)
        step = failed.step if failed is not None else None
        failure = Failure(
            reported.cause,
            reported.error,
            step=step,
            saved=max((beat.saved for beat in beats.values() if beat.saved is not None), default=None),
            rank=reported.rank,
            node=workers[reported.rank].metadata.node_ip if reported.rank < len(workers) else None,
        )
        if self.budget.is_spent:
            # A checkpoint that was complete just before the failure may not have been heard of.
            self.budget.note_saved(self._newest_checkpoint())
        decision = self.budget.see(failure)
        self.events.add(
            "failure",
            step=step,
            cause=failure.cause,
            rank=failure.rank,
            node=failure.node,
            error=failure.error,
            counted=decision.counted,
            action=decision.action,
            traceback=_traceback(status.worker_statuses[reported.rank].error),
        )
        if decision.action == "end":
            raise RunFailed(
                f"{decision.reason}. The traceback is in {self.run.path('events', 'controller.jsonl')}"
            )

    def _newest_checkpoint(self) -> int | None:
        try:
            return max(Checkpoints(self.run).steps(), default=None)
        except UserError as error:
            log.warning("the newest checkpoint is not known: %s", error)
            return None

    # preemption

    def _give_notices(self, workers: list[Worker]) -> None:
        """Have workers on nodes that are being drained save a checkpoint and leave."""
        try:
            draining = draining_nodes()
        except Exception as error:  # noqa: BLE001 - the head may be away for a moment
            log.debug("draining nodes are not known: %s", error)
            return
        self.drained |= set(draining)
        for rank, worker in enumerate(workers):
            node = worker.metadata.node_id
            if node not in draining or _key(worker) in self.noticed:
                continue
            self.noticed.add(_key(worker))
            seconds = max(0.0, draining[node] / 1000 - time.time()) if draining[node] else None
            beat = self.heard[_key(worker)].beat
            self.events.add(
                "preemption",
                step=beat.step if beat else None,
                rank=rank,
                node=worker.metadata.node_ip,
                cause="node drained",
                deadline_seconds=seconds,
            )
            worker.execute_async(worker_process.give_notice, "node drained", seconds)

    # hangs

    def _end_hang(self, hang: Hang, workers: list[Worker]) -> None:
        """Write the stacks of all workers into the run folder, and end those that hang."""
        beats = [self.heard[_key(worker)].beat for worker in workers]
        step = max((beat.step for beat in beats if beat is not None), default=0)
        self.hung |= {_key(workers[rank]) for rank in hang.ranks}
        stacks = self._read_stacks(workers, hang)
        for rank, text in stacks.items():
            name = f"{HANGS}/step-{step:06d}-rank-{rank}.txt"
            try:
                self.run.write_text(name, f"worker {rank}: {beats[rank]}\n\n{text}\n")
            except UserError as error:
                log.warning("%s is not written: %s", name, error)
        first = workers[hang.ranks[0]]
        self.events.add(
            "hang",
            step=step,
            seconds=hang.seconds,
            rank=hang.ranks[0],
            ranks=list(hang.ranks),
            node=first.metadata.node_ip,
            cause="no answer" if hang.silent else "no progress",
        )
        for rank in hang.ranks:
            ray.kill(workers[rank].actor)

    def _read_stacks(self, workers: list[Worker], hang: Hang) -> dict[int, str]:
        """Return the stacks of each rank, read on its node; the processes that hang are then killed."""
        read = ray.remote(num_cpus=0, max_retries=0)(worker_process.read_stacks)
        found = dict.fromkeys(range(len(workers)), "no stacks: its node does not answer")
        tasks = {}
        for rank, worker in enumerate(workers):
            prepared = self.processes.get(_key(worker))
            if prepared is None or not ray.wait([prepared], timeout=0)[0]:
                found[rank] = "no stacks: the process was not ready yet"
                continue
            at = NodeAffinitySchedulingStrategy(worker.metadata.node_id, soft=False)
            tasks[rank] = read.options(scheduling_strategy=at).remote(prepared, rank in hang.ranks)
        ready, _ = (
            ray.wait(list(tasks.values()), num_returns=len(tasks), timeout=STACK_SECONDS)
            if tasks
            else ([], [])
        )
        for rank, task in tasks.items():
            if task in ready:
                try:
                    found[rank] = ray.get(task)
                except Exception as error:  # noqa: BLE001 - for example a lost node
                    found[rank] = f"no stacks: {type(error).__name__}: {error}"
        return found


def _key(worker: Worker) -> str:
    return str(worker.actor._actor_id.hex())


def _traceback(error: BaseException | None) -> str | None:
    text = getattr(error, "_traceback_str", None)
    return str(text)[-4000:] if text else None
