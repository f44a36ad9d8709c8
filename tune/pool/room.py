"""Decides how many workers a pool has, with which resources, and how many tasks each runs at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dreamfleet.datasets.errors import ResourceError
from dreamfleet.trainers.config.scaling import (
    Resources,
    ScalingConfig,
    WorkerShare,
    describe,
    worker_resources,
    workers_that_fit,
)


@dataclass(frozen=True)
class Demand:
    """What a pool is asked for. ``packs``: whether several tasks can be trained at once in one process.

    ``tasks``: the most tasks that there will be; None if unknown. ``workers_per_task``: processes of one task.
    ``max_packed``: the most tasks that run at once only because processes can be shared; None without a limit.
    ``resources``: Ray resources of a worker; None: a GPU each, or a share of the CPUs.
    """

    scaling: ScalingConfig
    packs: bool = False
    tasks: int | None = None
    max_concurrent: int | None = None
    max_packed: int | None = None
    workers_per_task: int = 1
    resources: Mapping[str, float] | None = None

    @property
    def bound(self) -> int | None:
        """The most tasks that may run at once; None without a limit."""
        return min((n for n in (self.tasks, self.max_concurrent) if n is not None), default=None)

    def slots(self, *, uses_gpu: bool) -> int:
        """Return the most tasks that one process trains at once."""
        if not self.packs or self.workers_per_task > 1:
            return 1
        if self.scaling.slots_per_worker == "auto":
            from dreamfleet.trainers.memory.slots import MAX_SLOTS

            slots = MAX_SLOTS[
                "cuda" if uses_gpu else "cpu"
            ]  # a worker has fewer if they do not fit into memory
        else:
            slots = self.scaling.slots_per_worker
        return min(slots, self.bound or slots)


@dataclass(frozen=True)
class Room:
    """The size of a pool: ``groups`` of ``workers_per_task`` workers, each of which runs ``slots`` tasks at once."""

    share: WorkerShare
    groups: int
    slots: int
    workers_per_task: int = 1
    per_machine: int = 1  # groups on one machine at most

    @property
    def gpus(self) -> float:
        """The GPUs of one group."""
        return self.share.resources.get("GPU", 0.0) * self.workers_per_task

    def __str__(self) -> str:
        resources = describe(self.share.resources)
        many = "s" * (self.groups > 1)
        if self.workers_per_task > 1:
            return f"{self.groups} group{many} of {self.workers_per_task} workers with {resources} each"
        packed = f", up to {self.slots} trainings packed in each" if self.slots > 1 else ""
        each = " each" * (self.groups > 1)
        return f"{self.groups} worker{many} with {resources}{each}{packed}"


def plan_room(demand: Demand, nodes: Sequence[Resources], *, limit: Resources | None = None) -> Room:
    """Return the size of a pool on machines with the resources ``nodes``; ``limit``: the most an autoscaler adds.

    Tasks are spread over the GPUs, or over the CPUs, before several share a process: this is faster, and one process
    per device loads the model once. Raises ResourceError if a task fits on no machine.
    """
    machines = [limit] if limit else list(nodes)
    share = _share(demand, nodes, machines, limit)
    groups = groups_that_fit(
        share.resources, machines, demand.workers_per_task, demand.scaling.placement_strategy
    )
    if not groups:
        have = "; ".join(describe(machine) for machine in machines) or "none"
        each = f"{demand.workers_per_task} workers" if demand.workers_per_task > 1 else "a worker"
        raise ResourceError(
            f"{each} with {describe(share.resources)} each fits on no machine ({have}). "
            "Lower search.resources_per_trial or scaling.resources_per_worker, or use a larger cluster (--address)"
        )
    groups = min(groups, demand.bound or groups)
    slots = limit_slots(demand, groups=groups, uses_gpu=share.uses_gpu)
    per_machine = max(workers_that_fit(share.resources, [machine]) for machine in nodes or machines)
    return Room(share, groups, slots, demand.workers_per_task, min(groups, max(1, per_machine)))


def limit_slots(demand: Demand, *, groups: int, uses_gpu: bool) -> int:
    """Return the tasks that each of ``groups`` processes trains at once."""
    slots = demand.slots(uses_gpu=uses_gpu)
    if demand.bound is not None:
        slots = min(slots, -(-demand.bound // groups))
    if demand.max_packed is not None:
        slots = min(slots, max(1, demand.max_packed // groups))
    return slots


def groups_that_fit(resources: Resources, machines: Sequence[Resources], size: int, strategy: str) -> int:
    """Return the number of groups of ``size`` workers with these ``resources`` that fit on idle machines."""
    rooms = [workers_that_fit(resources, [machine]) for machine in machines]
    if size == 1:
        return sum(rooms)
    if strategy == "STRICT_PACK":
        return sum(room // size for room in rooms)
    if strategy == "STRICT_SPREAD":  # at most one worker of a group on each machine
        groups = sum(rooms) // size
        while groups and sum(min(room, groups) for room in rooms) < groups * size:
            groups -= 1
        return groups
    return sum(rooms) // size


def _share(
    demand: Demand, nodes: Sequence[Resources], machines: Sequence[Resources], limit: Resources | None
) -> WorkerShare:
    has_gpu = demand.scaling.use_gpu is not False and any(machine.get("GPU", 0) for machine in machines)
    cpus = max(1, int(sum(machine.get("CPU", 0) for machine in machines)))
    if has_gpu:
        processes = demand.workers_per_task
    elif demand.slots(uses_gpu=False) == 1 and demand.max_concurrent is not None and demand.bound:
        processes = demand.bound * demand.workers_per_task  # also more than there are CPUs
    else:
        at_most = max(1, cpus // demand.workers_per_task)
        processes = min(at_most, demand.bound or at_most) * demand.workers_per_task
    return worker_resources(
        ScalingConfig(
            num_workers=processes,
            use_gpu=demand.scaling.use_gpu,
            cpus_per_worker=demand.scaling.cpus_per_worker,
            resources_per_worker=dict(demand.resources) if demand.resources else None,
        ),
        nodes,
        limit=limit,
    )
