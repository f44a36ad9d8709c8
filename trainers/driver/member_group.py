"""A group of Ray Train workers of which single ones are replaced, and to which workers are added, while they train.

Ray's own replacement waits until the new worker has a place, which blocks its controller for as long as a machine is
missing. Here each step of a replacement is started and looked at again at the next poll.
"""

from __future__ import annotations

import contextlib
import logging
import time
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)

from dreamfleet.trainers.driver.ray_internals import (
    PlacementGroupSchedulingStrategy,
    ReplicaGroup,
    Worker,
    WorkerGroup,
    WorkerStatus,
    bundle_to_remote_args,
    draining_nodes,
)

log = logging.getLogger(__name__)

RETRY_SECONDS = 5.0  # before another try, if a new worker could not be started
AVOIDED_SECONDS = 10.0  # how long the node of a worker that left gets no new one, unless Ray drains it


@dataclass
class Vacancy:
    """A place in the group whose worker died, left, or has not been started yet.

    ``place``: the placement group and bundle; ``avoided``: the node that the old worker left because it may go away, at
    ``left`` seconds of the monotonic clock.
    """

    number: int
    place: tuple[PlacementGroup, int]
    old: Worker | None = None
    avoided: str = ""
    left: float = field(default_factory=time.monotonic)
    actor: Any = None
    metadata: Any = None  # reference to the new worker's answer
    not_before: float = 0.0


class MemberGroup(WorkerGroup):
    """Workers by number; :meth:`vacate` a number, :meth:`add_places`, and call :meth:`fill` at every poll."""

    _worker_group_state: Any

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.vacancies: dict[int, Vacancy] = {}
        self._added: dict[int, PlacementGroup] = {}  # one for each place beyond the first ones

    def vacate(self, number: int, *, avoided: str = "") -> None:
        """Give up a worker that failed or left; its place is filled as soon as Ray has room for it."""
        self._replica_groups[number].shutdown()
        self._world_rank_to_ongoing_poll.pop(number, None)
        place = (self._added[number], 0) if number in self._added else (self._first_places(), number)
        worker = self.get_workers()[number]
        if number not in self._added and worker.placement_group_bundle_index is not None:
            place = (place[0], worker.placement_group_bundle_index)
        self.vacancies[number] = Vacancy(number, place, old=worker, avoided=avoided)

    def add_places(self, total: int) -> None:
        """Ask Ray for room for workers beyond the present ones, up to ``total``."""
        for number in range(len(self.get_workers()) + len(self._added_without_worker()), total):
            place = placement_group([self._worker_group_context.resources_per_worker], strategy="PACK")
            self._added[number] = place
            self.vacancies[number] = Vacancy(number, (place, 0))

    def fill(self) -> list[int]:
        """Continue every replacement by one step; return the numbers of workers that started to train."""
        started = []
        for vacancy in sorted(self.vacancies.values(), key=lambda one: one.number):
            if time.monotonic() < vacancy.not_before or vacancy.number > len(self.get_workers()):
                continue
            try:
                if vacancy.actor is None:
                    if self._has_place(vacancy):
                        self._start_actor(vacancy)
                elif ray.wait([vacancy.metadata], timeout=0)[0]:
                    self._start_training(vacancy)
                    del self.vacancies[vacancy.number]
                    started.append(vacancy.number)
            except Exception as error:  # noqa: BLE001 - its node may be lost at any moment
                log.warning("a worker could not be started, trying again: %s", str(error).splitlines()[0])
                self._give_up(vacancy)
        return started

    def shutdown(self) -> None:
        """Shut all workers down, and give back the places that were added."""
        self._drop_added()
        super().shutdown()

    def abort(self) -> None:
        """Abort all workers, and give back the places that were added."""
        self._drop_added()
        super().abort()

    def _poll_workers_and_collect_errors(self, timeout: float | None) -> list[WorkerStatus]:
        """Poll the workers; one that is being replaced counts as running, since its end has been reported."""
        found = super()._poll_workers_and_collect_errors(timeout)
        return [
            WorkerStatus(running=True) if number in self.vacancies else status
            for number, status in enumerate(found)
        ]

    def _first_places(self) -> PlacementGroup:
        return self._worker_group_state.placement_group_handle.placement_group

    def _added_without_worker(self) -> list[int]:
        return [number for number in self.vacancies if number >= len(self.get_workers())]

    def _has_place(self, vacancy: Vacancy) -> bool:
        """Return whether Ray has placed the bundle, on a node that stays.

        A worker leaves when it gets SIGTERM or its node is drained. A node that lives on after SIGTERM was not meant.
        """
        group, bundle = vacancy.place
        table = placement_group_table(group)
        if table["state"] != "CREATED":
            return False
        node = table["bundles_to_node_id"].get(bundle)
        if not node or node != vacancy.avoided:
            return bool(node)
        return time.monotonic() - vacancy.left > AVOIDED_SECONDS and node not in draining_nodes()

    def _start_actor(self, vacancy: Vacancy) -> None:
        group, bundle = vacancy.place
        resources = self._worker_group_context.resources_per_worker
        environment = self._get_worker_runtime_env(
            custom_runtime_env=self._train_run_context.run_config.worker_runtime_env
        )
        kind = ray.remote(runtime_env=environment, **bundle_to_remote_args(resources))(self._worker_cls)
        strategy = PlacementGroupSchedulingStrategy(
            placement_group=group, placement_group_bundle_index=bundle
        )
        vacancy.actor = kind.options(scheduling_strategy=strategy).remote()
        vacancy.metadata = vacancy.actor.get_metadata.remote()

    def _start_training(self, vacancy: Vacancy) -> None:
        number, context = vacancy.number, self._worker_group_context
        worker = Worker(
            vacancy.actor,
            ray.get(vacancy.metadata),
            context.resources_per_worker,
            placement_group_bundle_index=vacancy.place[1],
        )
        total = max(len(self.get_workers()), number + 1)
        self._assign_worker_ranks([worker], number, total, 1)
        self._init_train_context([worker], self._worker_group_state.sync_actor)
        group = ReplicaGroup([worker], context.resources_per_worker, self._replica_group_callbacks)
        group.start_training(context)
        workers: list[Worker] = list(self.get_workers())
        workers[number : number + 1] = [worker]
        self._worker_group_state = replace(self._worker_group_state, workers=workers)
        self._replica_groups[number : number + 1] = [group]
        self._worker_rank_to_replica_group_rank[number] = number

    def _give_up(self, vacancy: Vacancy) -> None:
        if vacancy.actor is not None:
            with contextlib.suppress(Exception):
                ray.kill(vacancy.actor)
        vacancy.actor = vacancy.metadata = None
        vacancy.not_before = time.monotonic() + RETRY_SECONDS

    def _drop_added(self) -> None:
        for vacancy in self.vacancies.values():
            self._give_up(vacancy)
        self.vacancies.clear()
        for group in self._added.values():
            with contextlib.suppress(Exception):
                remove_placement_group(group)
        self._added.clear()
