"""A worker that is a Ray actor: one process that trains several tasks at once, packed on one copy of the model."""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import traceback
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError

from dreamfleet.datasets.environment import apply_variables
from dreamfleet.trainers.config.engine import EngineConfig
from dreamfleet.trainers.config.engines import engine_spec
from dreamfleet.trainers.config.scaling import WorkerShare
from dreamfleet.trainers.driver.ray_metrics import publish_runs
from dreamfleet.trainers.packing.task import End, Task
from dreamfleet.trainers.run.fence import Owner
from dreamfleet.tune.pool.dispatch import Events
from dreamfleet.tune.pool.remote_source import RemoteSource
from dreamfleet.tune.pool.slots import fit_slots
from dreamfleet.tune.pool.worker import Died, Ended, Event, Ready

POLL_SECONDS = 5.0
JOIN_SECONDS = 10.0


@dataclass(frozen=True)
class Settings:
    """What the process of a worker needs. ``sent`` holds secrets, which are neither logged nor written to files.

    ``recipe``: what the tasks have in common, from which the slots that fit into memory are computed; ``slots`` is the
    most.
    """

    slots: int
    threads: int
    uses_gpu: bool
    gpu_share: float  # the fraction of a GPU that the worker may use
    environment: Mapping[str, str]
    sent: Mapping[str, str]  # from environment.variables_to_send
    recipe: Mapping[str, Any] | None = None
    host_share: float = 1.0  # the part of the machine's memory that the worker may use
    owner: Owner | None = None  # of the folder that the tasks are in


def is_reusable(
    engine: EngineConfig, end: End, *, modules: Collection[str], uses_gpu: bool, slots: int
) -> bool:
    """Return whether a process can run another task after one that ended with ``end``.

    DeepSpeed and compiled blocks leave memory and a process group behind; ``zero_stage: auto`` may have selected
    DeepSpeed, hence ``modules``, the names of the imported ones. A task that failed on a GPU may have left memory that
    the next one would miss, except in a pack, which frees it.
    """
    if not engine_spec(engine).shares_process(engine) or "deepspeed" in modules:
        return False
    return not (uses_gpu and slots == 1 and end.exit_reason == "failed")


class PoolActor:
    """Runs tasks in a thread of an actor's process; its methods are called by the driver, also at the same time."""

    def __init__(self) -> None:
        self.outbox: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.interrupted = threading.Event()
        self.source = RemoteSource(self.outbox.put, self._is_reusable)

    def begin(self, settings: Settings) -> list[Event]:
        """Prepare the process, import what a run needs, and start the runner."""
        os.environ.update(settings.environment)
        apply_variables(settings.sent)
        self.settings = settings
        publish_runs()
        import torch

        from dreamfleet.trainers.packing.runner import run_tasks
        from dreamfleet.trainers.recipe import build_recipe

        torch.set_num_threads(settings.threads)  # of this thread
        slots = settings.slots
        if settings.recipe is not None:
            slots = fit_slots(
                build_recipe(settings.recipe),
                limit=slots,
                uses_gpu=settings.uses_gpu,
                gpu_share=settings.gpu_share,
                host_share=settings.host_share,
            )
        threading.Thread(target=self._work, args=(run_tasks, slots), daemon=True, name="pool-runner").start()
        return [Ready(slots)]

    def next_events(self) -> list[Event]:
        """Wait for events, up to POLL_SECONDS, and return all that are there."""
        found: list[Event] = []
        with contextlib.suppress(queue.Empty):
            found.append(self.outbox.get(timeout=POLL_SECONDS))
            while True:
                found.append(self.outbox.get_nowait())
        return found

    def give(self, task: Task) -> None:
        """Add a task."""
        self.source.give(task)

    def answer(self, name: str, stop: bool) -> None:
        """Continue or stop a task after its last round."""
        self.source.answer(name, stop)

    def interrupt(self) -> None:
        """Have the running tasks save a checkpoint and end."""
        self.interrupted.set()
        self.source.close()

    def leave(self) -> None:
        """End the process, which has no task. Ray would report a process that is killed as an error."""
        self.source.close()
        self.outbox.put(Ready())  # ends the wait of `next_events`
        ray.actor.exit_actor()

    def _work(self, run_tasks: Callable[..., None], slots: int) -> None:
        import torch

        settings = self.settings
        torch.set_num_threads(settings.threads)  # of this thread
        try:
            run_tasks(
                self.source,
                capacity=slots,
                device="cuda" if settings.uses_gpu else "cpu",
                gpu_share=settings.gpu_share,
                host_share=settings.host_share,
                should_stop=self.interrupted.is_set,
                owner=settings.owner,
            )
        except Exception as error:  # noqa: BLE001 - sent to the driver
            traceback.print_exc()
            self.outbox.put(Died(f"{type(error).__name__}: {error}"))

    def _is_reusable(self, task: Task, end: End) -> bool:
        import sys

        return is_reusable(
            EngineConfig(**task.recipe.get("engine", {})),
            end,
            modules=sys.modules.keys(),
            uses_gpu=self.settings.uses_gpu,
            slots=self.settings.slots,
        )


class ActorWorker:
    """The driver's side of a PoolActor. A thread passes its events on, and its death."""

    def __init__(self, share: WorkerShare, settings: ray.ObjectRef[Settings], events: Events):
        resources = dict(share.resources)
        options: dict[str, Any] = {
            "num_cpus": resources.pop("CPU", 0),
            "num_gpus": resources.pop("GPU", 0),
            "memory": resources.pop("memory", None),
            "resources": resources,
        }
        self.events, self.closed = events, False
        self.ready, self.tasks = False, set[str]()
        self.actor: Any = ray.remote(PoolActor).options(max_concurrency=4, max_restarts=0, **options).remote()
        self.thread = threading.Thread(target=self._listen, args=(settings,), daemon=True, name="pool-worker")
        self.thread.start()

    def start(self, task: Task) -> None:
        self.tasks.add(task.name)
        self.actor.give.remote(task)

    def answer(self, name: str, stop: bool) -> None:
        self.actor.answer.remote(name, stop)

    def stop(self) -> None:
        self.actor.interrupt.remote()

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        if self.ready and not self.tasks:
            self.actor.leave.remote()
        else:
            ray.kill(self.actor)
        self.thread.join(JOIN_SECONDS)  # Ray must not be shut down while the thread waits for it

    def _listen(self, settings: ray.ObjectRef[Settings]) -> None:
        waiting = self.actor.begin.remote(settings)
        while not self.closed:
            try:
                found = ray.get(waiting)
            except RayError as error:
                self.events.put(
                    (self, Died(_reason(error), preempted=bool(getattr(error, "preempted", False))))
                )
                return
            for event in found:
                self.ready = True
                if isinstance(event, Ended):
                    self.tasks.discard(event.name)
                self.events.put((self, event))
            waiting = self.actor.next_events.remote()


def _reason(error: RayError) -> str:
    """Return the last line of Ray's description of a death, or of an exception in the actor."""
    lines = str(getattr(error, "cause", None) or error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__
