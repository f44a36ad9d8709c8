"""Runs tasks in one process: those in its slots share the passes of one model, and a free slot is refilled at once."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch

from dreamfleet.datasets.errors import UserError
from dreamfleet.trainers.config.packing import find_unpackable, pack_key
from dreamfleet.trainers.distributed.context import DistributedContext
from dreamfleet.trainers.distributed.device import TRAINING, explain_out_of_memory, on_device
from dreamfleet.trainers.engines.passes import Pass
from dreamfleet.trainers.memory.engine_selection import limit_card
from dreamfleet.trainers.memory.slots import choose_slots
from dreamfleet.trainers.methods.base import method_class
from dreamfleet.trainers.packing.pack import Pack
from dreamfleet.trainers.packing.shared_models import SharedModels
from dreamfleet.trainers.packing.slot import Slot
from dreamfleet.trainers.packing.task import End, Task, TaskSource
from dreamfleet.trainers.recipe import Recipe, build_recipe
from dreamfleet.trainers.run.fence import Owner

log = logging.getLogger(__name__)

IDLE_SECONDS = 0.02  # between two questions to a source that has no task, or no decision, yet


def run_tasks(
    source: TaskSource,
    *,
    capacity: int,
    device: torch.device | str = "cpu",
    gpu_share: float = 1.0,
    host_share: float = 1.0,
    should_stop: Callable[[], bool] = lambda: False,
    owner: Owner | None = None,
) -> None:
    """Run the tasks of a source until it is done, at most ``capacity`` at a time.

    Tasks whose recipes can be packed (:func:`find_unpackable`) and agree (:func:`pack_key`) share one copy of the
    frozen model and its passes; a task that cannot be packed runs alone, on the same loaded model. Each task is an
    ordinary run that resumes from its newest checkpoint. A task that fails ends alone. ``should_stop``: running tasks
    save a checkpoint and end as interrupted, and no more are started. ``gpu_share``: the fraction of the GPU's memory
    that all tasks together may use; ``host_share``: of this machine's. With ``scaling.slots_per_worker: auto`` no more
    tasks are started than their memory is predicted to allow. ``owner``: of the folder that all tasks are in.
    """
    with on_device(device, remedies=TRAINING) as settled:
        distributed = DistributedContext(device=settled, gpu_share=gpu_share)
        _Runner(source, capacity, distributed, should_stop, host_share, owner).run()


def train_packed(
    recipes: Sequence[Recipe], *, capacity: int, device: torch.device | str = "cpu"
) -> list[End]:
    """Train recipes in this process, at most ``capacity`` at a time; return how each one ended, in their order."""
    source = _List([Task(recipe.output_dir, recipe.model_dump(mode="json")) for recipe in recipes])
    run_tasks(source, capacity=capacity, device=device)
    return [source.ends[recipe.output_dir] for recipe in recipes]


class _List:
    """A source of given tasks, all of which run to their end."""

    def __init__(self, tasks: Sequence[Task]):
        self.tasks, self.ends = list(tasks), dict[str, End]()

    @property
    def is_done(self) -> bool:
        return not self.tasks

    def next_task(self) -> Task | None:
        return self.tasks.pop(0) if self.tasks else None

    def on_start(self, task: Task) -> None:
        pass

    def on_round(self, task: Task, figures: dict[str, Any]) -> None:
        pass

    def decision(self, task: Task) -> bool:
        return False

    def on_end(self, task: Task, end: End) -> None:
        self.ends[task.name] = end


class _Runner:
    def __init__(
        self,
        source: TaskSource,
        capacity: int,
        distributed: DistributedContext,
        should_stop: Callable[[], bool],
        host_share: float = 1.0,
        owner: Owner | None = None,
    ):
        self.source, self.capacity, self.distributed, self.owner = source, capacity, distributed, owner
        self.should_stop, self.host_share = should_stop, host_share
        self.fits = capacity  # slots that the memory holds, counted for the recipes of this key:
        self._counted: Hashable = None
        self.models = SharedModels()
        self.slots: list[Slot] = []
        self.pack: Pack | None = None  # None while the only task runs alone
        self._key: Hashable = None
        self._waiting: tuple[Task, Recipe] | None = None  # a task that does not pack with the running ones

    def run(self) -> None:
        """Run until the source is done and every slot is empty."""
        try:
            while True:
                self._refill()
                if not self.slots and (self.should_stop() or (self.source.is_done and not self._waiting)):
                    if self._waiting is not None:
                        self.source.on_end(self._waiting[0], End("interrupted"))
                    return
                for slot in self.slots:
                    slot.ask()
                ready = [slot for slot in self.slots if slot.is_ready]
                if ready:
                    self._advance(ready)
                self._collect_ends()
                if not ready:
                    time.sleep(IDLE_SECONDS)
        finally:
            for slot in self.slots:  # after an error that ends the whole process
                slot.abandon()

    def _advance(self, slots: Sequence[Slot]) -> None:
        passes = [slot.pending for slot in slots if slot.pending is not None]
        if self.pack is not None:
            results = self.pack.compute(passes)
        else:
            results = [_alone(one) for one in passes]
        for slot, result in zip(slots, results, strict=True):
            slot.pending = None
            slot.advance(result)

    def _refill(self) -> None:
        while len(self.slots) < min(self.capacity, self.fits) and not self.should_stop():
            if self._waiting is None:
                task = self.source.next_task()
                if task is None:
                    return
                recipe = self._recipe_of(task)
                if recipe is None:
                    continue
                self._waiting = task, recipe
            task, recipe = self._waiting
            reason = find_unpackable(recipe)
            if self.slots and (reason is not None or self.pack is None or pack_key(recipe) != self._key):
                return  # it starts when the running tasks have ended
            self._waiting = None
            self._start(task, recipe, reason)
            self._collect_ends()

    def _recipe_of(self, task: Task) -> Recipe | None:
        try:
            return build_recipe(task.recipe, source=task.name)
        except Exception as error:  # noqa: BLE001 - reported as the end of the task
            self.source.on_start(task)
            self.source.on_end(task, End("failed", error=str(error), kind=type(error).__name__))
            return None

    def _start(self, task: Task, recipe: Recipe, reason: str | None) -> None:
        self.source.on_start(task)
        options: dict[str, Any] = {"load": self.models.lend_to_train, "owner": self.owner}
        if reason is None:
            options |= {"load": self.models.lend, "settle": self._settle_packed}
            if not self.slots and (self.pack is None or pack_key(recipe) != self._key):
                self.pack, self._key = None, pack_key(recipe)
                self.models.clear()
                needs = method_class(recipe.method).needs
                try:
                    model = self.models.lend(recipe.model, needs)
                except UserError as error:
                    self.source.on_end(task, End("failed", error=str(error), kind=type(error).__name__))
                    return
                self.pack = Pack(model, recomputes=recipe.train.gradient_checkpointing)
        else:
            if self.pack is not None:
                self.pack, self._key = None, None
                self.models.clear()
            log.info("%s is trained alone: %s", task.name, reason)
        if self.pack is not None and self._key != self._counted:
            self.fits, self._counted = self._count_fitting(recipe), self._key
        self.slots.append(
            Slot(task, recipe, self.source, self.distributed, should_stop=self.should_stop, **options)
        )

    def _count_fitting(self, recipe: Recipe) -> int:
        fits = choose_slots(recipe, self.distributed, host_share=self.host_share, limit=self.capacity)
        if fits < self.capacity:
            log.info("%d trainings at once in this process: more would not fit into its memory", fits)
        return fits

    def _settle_packed(self, recipe: Recipe, distributed: DistributedContext) -> tuple[Recipe, str]:
        """Select plain torch for a packed run; on a GPU, enforce the memory limit."""
        if distributed.device.type == "cuda":
            limit_card(distributed.device, recipe.engine.gpu_limit, distributed.gpu_share)
        return recipe, f"packed with up to {self.capacity - 1} others"

    def _collect_ends(self) -> None:
        ended = [slot for slot in self.slots if slot.end is not None]
        self.slots = [slot for slot in self.slots if slot.end is None]
        for slot in ended:
            if self.pack is None:
                self.models.restore()
            assert slot.end is not None
            self.source.on_end(slot.task, slot.end)


def _alone(one: Pass) -> Any:
    """Run the pass of a training that is not packed; return its result, or the error that ends it."""
    try:
        with explain_out_of_memory():
            return one.compute()
    except Exception as error:  # noqa: BLE001 - thrown into its training, which closes its files
        return error
