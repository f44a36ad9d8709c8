"""Saves the checkpoints of a run, and keeps the one with the lowest held-out loss beside the newest ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from dreamfleet.datasets.errors import RunFailed
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.loop import diverged
from dreamfleet.trainers.report.metrics_log import read_metrics
from dreamfleet.trainers.run.build import Parts
from dreamfleet.trainers.run.checkpoint import Checkpoints, find_not_finite, folder_name
from dreamfleet.trainers.run.provenance import run_identity
from dreamfleet.trainers.run.stopwatch import Clock
from dreamfleet.trainers.run.versions import versions


class Checkpointing:
    """Saves checkpoints; every rank calls each method, rank 0 writes.

    ``saved`` is the step of the newest complete checkpoint, the same on every rank. ``after_save`` runs on rank 0.
    """

    def __init__(
        self,
        parts: Parts,
        checkpoints: Checkpoints,
        clock: Clock,
        *,
        start_step: int = 0,
        after_save: Callable[[], None] = lambda: None,
    ):
        self.parts, self.checkpoints, self.clock = parts, checkpoints, clock
        self.start_step, self.after_save = start_step, after_save
        self.saved = start_step or None
        self.best_loss = math.inf

    def recall_best(self, run: Storage) -> None:
        """Find the best checkpoint in the metrics of a resumed run; on rank 0."""
        kept = set(self.checkpoints.steps())
        measured = [
            (line["holdout_loss"], line["step"])
            for line in read_metrics(run)
            if line.get("holdout_loss") is not None and line["step"] in kept
        ]
        if measured:
            self.best_loss, self.checkpoints.best = min(measured)

    def save(self, step: int) -> None:
        """Save a checkpoint unless ``step`` has one; returns on every rank once it is complete.

        Raises RunFailed when a step has made weights, averages or optimizer moments infinite or NaN: the loss would
        show it at the next step only.
        """
        if step == self.saved:
            return
        # On every rank: an engine that shards gathers here.
        learned, engine = self.parts.engine.weights(), self.parts.engine.state()
        self.parts.distributed.on_rank_0(lambda: self._write(step, learned, engine))
        self.saved = step

    def keep_best(self, step: int, loss: float) -> None:
        """Save ``step`` when ``loss`` is the lowest held-out loss so far; the previous best may be removed.

        It stays where the schedule saved it anyway and the limit allows. A loss that is not finite is never the best.
        """
        distributed = self.parts.distributed
        if not distributed.broadcast(step > 0 and math.isfinite(loss) and loss < self.best_loss):
            return
        # Protected before it is written: writing removes what is beyond the limit.
        before, self.checkpoints.best, self.best_loss = self.checkpoints.best, step, loss
        self.save(step)
        distributed.on_rank_0(lambda: self._release(before, newest=step))

    @property
    def best(self) -> str | None:
        """The folder name of the best checkpoint; of the newest where no held-out loss was measured."""
        steps = self.checkpoints.steps()
        best = self.checkpoints.best
        return folder_name(best if best in steps else steps[-1]) if steps else None

    def _write(self, step: int, learned: dict[str, Tensor], engine: dict[str, Any]) -> None:
        if bad := find_not_finite({"learned": learned, "engine": engine}):
            raise RunFailed(diverged(f"{bad} is no longer finite after step {step}", self.saved))
        self.checkpoints.save(
            step,
            learned=learned,
            engine=engine,
            meta={
                "method": self.parts.recipe.method.name,
                "workers": self.parts.distributed.world,
                "steps_before": self.parts.method.steps_before,
                "seconds": self.clock.lap(),
                **run_identity(self.parts),
                "versions": versions(),
            },
        )
        self.after_save()

    def _release(self, step: int | None, *, newest: int) -> None:
        is_due = step == self.start_step or (step is not None and self.parts.schedule.saves_at(step))
        if step is not None and not is_due:
            self.checkpoints.drop(step)
        self.checkpoints.prune(newest)
