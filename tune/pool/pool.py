"""Runs the tasks of a search or a fleet: in this process, on Ray actors that pack several each, or by Ray Train."""

from __future__ import annotations

import logging
import queue
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Literal

from dreamfleet.datasets.errors import UserError
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.config.packing import find_unpackable
from dreamfleet.trainers.config.scaling import worker_resources
from dreamfleet.trainers.driver.preflight import this_machine
from dreamfleet.trainers.driver.progress import watch_for_stop
from dreamfleet.trainers.driver.session import ray_session, uses_cluster
from dreamfleet.trainers.driver.shared_paths import PathsByKey, check_machines, shared_paths, written_paths
from dreamfleet.trainers.packing.task import Task, TaskSource
from dreamfleet.trainers.recipe import Recipe
from dreamfleet.trainers.run.checkpoint import Checkpoints
from dreamfleet.trainers.run.fence import Owner
from dreamfleet.trainers.run.signals import Stop
from dreamfleet.trainers.tracking.tracker import variables_for
from dreamfleet.tune.pool.dispatch import Dispatcher, Events
from dreamfleet.tune.pool.room import Demand, Room, limit_slots, plan_room
from dreamfleet.tune.pool.run_logs import without_run_logs
from dreamfleet.tune.pool.slots import fit_slots
from dreamfleet.tune.pool.worker import Worker

log = logging.getLogger(__name__)


def run_pool(
    source: TaskSource,
    recipe: Recipe,
    *,
    stop: Stop,
    say: Callable[[str], None],
    tasks: int | None = None,
    max_concurrent: int | None = None,
    max_packed: int | None = None,
    workers_per_task: int | None = None,
    resources: Mapping[str, float] | None = None,
    reads: PathsByKey | None = None,
    address: str | None = None,
    shared: Sequence[str] = (),
    should_stop: Callable[[], bool] = lambda: False,
    on_room: Callable[[Room], None] = lambda room: None,
    owner: Owner | None = None,
) -> Literal["completed", "interrupted"]:
    """Run all tasks of a source; return "interrupted" if they were stopped before the last had ended.

    ``recipe`` is what the tasks have in common: its scaling, engine, method, shared paths and its ``output_dir``, the
    folder of the search or the fleet, whose stop file ends the pool. The caller has checked its inputs and owns it.

    ``workers_per_task``, by default ``scaling.num_workers``: 0 runs the tasks in this process, without Ray; 1 in Ray
    actors, each of which packs up to ``scaling.slots_per_worker`` tasks; more as runs of Ray Train, one task per group
    of workers. ``resources``: Ray resources of a worker, by default ``scaling.resources_per_worker``. ``tasks`` is the
    most tasks that there will be, if known; ``max_concurrent`` the most that run at once, and ``max_packed`` the most
    that run at once only because processes can be shared. ``reads``: paths that all machines must see in addition to
    the recipe's, by key. ``shared``: folders that all machines of a cluster that grows can access. ``say`` receives
    lines for the user, ``on_room`` the size of the pool. ``owner``: of the folder of the search or the fleet.

    All calls of the source come from this thread, and every task that it gives out gets exactly one ``on_end``. A task
    whose process died is started again and continues from its newest checkpoint, unless it died more than
    ``scaling.max_failures`` times since then.
    A signal, the stop file and ``should_stop`` make the running tasks save a checkpoint and end as interrupted.

    Raises ResourceError if a task fits on no machine, StorageError if machines do not share the folders, RunFailed if
    workers cannot be started. A task's own error is not raised: it is in its ``on_end``.
    """
    workers = recipe.scaling.pool_size if workers_per_task is None else workers_per_task
    demand = _demand(recipe, workers, say, resources, (tasks, max_concurrent, max_packed))
    with watch_for_stop(Storage(recipe.output_dir)) as is_marked, without_run_logs():

        def is_stopped() -> bool:
            return stop.requested.is_set() or is_marked() or should_stop()

        if workers == 0:
            is_complete = _run_here(source, recipe, demand, is_stopped, say, on_room, owner)
        else:
            checked = {**shared_paths(recipe), **(reads or {})}
            with _joined_cluster(recipe, demand, stop, say, checked, address, shared) as room:
                on_room(room)
                is_complete = _dispatcher(source, recipe, room, demand, shared, owner).run(is_stopped)
    return "completed" if is_complete else "interrupted"


def _demand(
    recipe: Recipe,
    workers: int,
    say: Callable[[str], None],
    resources: Mapping[str, float] | None,
    limits: tuple[int | None, int | None, int | None],
) -> Demand:
    scaling = recipe.scaling
    tasks, max_concurrent, max_packed = limits
    one_worker = scaling.model_copy(update={"num_workers": 1})
    reason = find_unpackable(recipe.model_copy(update={"scaling": one_worker}))
    if reason and workers < 2 and scaling.slots_per_worker != 1:
        say(f"one training at a time in each process: {reason}")
    return Demand(
        scaling,
        packs=reason is None,
        tasks=tasks,
        max_concurrent=max_concurrent,
        max_packed=max_packed,
        workers_per_task=max(1, workers),
        resources=resources or scaling.resources_per_worker,
    )


@contextmanager
def _joined_cluster(
    recipe: Recipe,
    demand: Demand,
    stop: Stop,
    say: Callable[[str], None],
    reads: PathsByKey,
    address: str | None,
    shared: Sequence[str],
) -> Iterator[Room]:
    """Connect to Ray, check its machines, and yield the size of the pool on them."""
    if not uses_cluster(address):  # report missing resources before Ray is started
        plan_room(demand, [this_machine()])
    preload = ("ray.train.torch",) if demand.workers_per_task > 1 else ()
    with ray_session(address, preload=preload) as session:
        stop.listen()
        check_machines(session, reads=reads, writes=written_paths(recipe), shared=shared)
        nodes = [node.resources for node in session.nodes()]
        room = plan_room(demand, nodes, limit=session.growth_limit())
        say(str(room))
        yield room


def _run_here(
    source: TaskSource,
    recipe: Recipe,
    demand: Demand,
    is_stopped: Callable[[], bool],
    say: Callable[[str], None],
    on_room: Callable[[Room], None],
    owner: Owner | None,
) -> bool:
    from dreamfleet.trainers.packing.runner import run_tasks

    share = worker_resources(demand.scaling, [this_machine()])
    slots = limit_slots(demand, groups=1, uses_gpu=share.uses_gpu)
    room = Room(share, 1, fit_slots(recipe, limit=slots, uses_gpu=share.uses_gpu))
    say(f"in this process{f', up to {room.slots} trainings packed' if room.slots > 1 else ''}")
    on_room(room)
    device = "cuda" if share.uses_gpu else "cpu"
    run_tasks(source, capacity=room.slots, device=device, should_stop=is_stopped, owner=owner)
    return not is_stopped()


def _dispatcher(
    source: TaskSource,
    recipe: Recipe,
    room: Room,
    demand: Demand,
    shared: Sequence[str],
    owner: Owner | None,
) -> Dispatcher:
    events: Events = queue.SimpleQueue()
    return Dispatcher(
        source,
        _worker_maker(recipe, room, demand, events, shared, owner),
        events,
        num_workers=room.groups,
        slots=room.slots,
        max_concurrent=demand.max_concurrent,
        max_failures=recipe.scaling.max_failures,
        newest_checkpoint=_newest_checkpoint,
    )


def _newest_checkpoint(task: Task) -> int | None:
    """Return the step of the newest checkpoint of a task's run; None without one, or if that is not known."""
    try:
        return max(Checkpoints(Storage(task.recipe["output_dir"])).steps(), default=None)
    except UserError as error:
        log.warning("the checkpoints of %s are not known: %s", task.name, error)
        return None


def _worker_maker(
    recipe: Recipe,
    room: Room,
    demand: Demand,
    events: Events,
    shared: Sequence[str],
    owner: Owner | None,
) -> Callable[[], Worker]:
    """Return a function that starts a worker."""
    import ray

    from dreamfleet.trainers.driver.worker import worker_environment
    from dreamfleet.trainers.launch import fit
    from dreamfleet.tune.pool.actor import ActorWorker, Settings
    from dreamfleet.tune.pool.group import Group

    share = room.share
    if room.workers_per_task > 1:
        # Ray Train would give all CPUs to one group.
        resources = share.resources if demand.resources or not share.uses_gpu else None
        return partial(
            Group,
            events,
            num_workers=room.workers_per_task,
            resources=resources,
            shared=shared,
            train=partial(fit, owner=owner),
        )
    settings = Settings(
        slots=room.slots,
        threads=share.threads,
        uses_gpu=share.uses_gpu,
        gpu_share=share.gpu_share,
        environment=worker_environment(share.threads),
        sent=variables_for(recipe),
        recipe=recipe.model_dump(mode="json", exclude={"search", "fleet"}),
        host_share=1 / room.per_machine,
        owner=owner,
    )
    return partial(ActorWorker, share, ray.put(settings), events)
