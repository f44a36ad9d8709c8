"""Saves the checkpoints of a run; keeps the newest ones and the best by a figure of its validation rounds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from dreamfleet.datasets.errors import RunFailed
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.report.metrics_log import read_metrics
from dreamfleet.trainers.run.build import Parts
from dreamfleet.trainers.run.checkpoint import Checkpoints, find_not_finite, folder_name
from dreamfleet.trainers.run.provenance import run_identity
from dreamfleet.trainers.run.stopwatch import Clock
from dreamfleet.trainers.run.versions import versions
from dreamfleet.trainers.step_metrics import diverged


class Checkpointing:
    """Saves the checkpoints of a run: every rank calls :meth:`save` and :meth:`keep_best`, rank 0 writes.

    ``saved`` is the step of the newest complete checkpoint, the same on every rank; None before the first
    one. ``after_save`` is called on rank 0 after each save.
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
        self.metric = parts.recipe.validation.metric_for_best
        self.sign = -1 if parts.recipe.validation.maximises else 1
        self.best_loss = math.inf  # the best value so far, negated where higher is better

    def recall_best(self, run: Storage) -> None:
        """Find the best existing checkpoint in the metrics of a resumed run; rank 0 only."""
        kept = set(self.checkpoints.steps())
        measured = [
            (self.sign * line[self.metric], line["step"])
            for line in read_metrics(run)
            if line.get(self.metric) is not None and line["step"] in kept and line["step"] > 0
        ]
        if measured:
            self.best_loss, self.checkpoints.best = min(measured)

    def save(self, step: int) -> None:
        """Save the checkpoint of ``step`` unless it was just saved; return on every rank once it is complete.

        Raises RunFailed if weights, EMA weights or optimizer moments are infinite or NaN, which the loss
        shows one step later, and StorageError if the files cannot be written.
        """
        if step == self.saved:
            return
        # Every rank calls these: an engine that shards the parameters gathers them here.
        learned, engine = self.parts.engine.weights(), self.parts.engine.state()
        self.parts.distributed.on_rank_0(lambda: self._write(step, learned, engine))
        self.saved = step

    def keep_best(self, step: int, figures: Mapping[str, float]) -> None:
        """Save ``step`` if its figures contain the best ``validation.metric_for_best`` so far; release the one before.

        The previous best is kept only within the limit, and if the schedule saves its step or the run was
        resumed from it. Rank 0's figures decide. Step 0 and a value that is not finite are never the best.
        """
        distributed = self.parts.distributed
        loss = self.sign * figures.get(self.metric, math.inf * self.sign)
        if not distributed.broadcast(step > 0 and math.isfinite(loss) and loss < self.best_loss):
            return
        # Set `best` before saving: `save` removes the checkpoints beyond the limit, except the best.
        before, self.checkpoints.best, self.best_loss = self.checkpoints.best, step, loss
        self.save(step)
        distributed.on_rank_0(lambda: self._release(before, newest=step))

    def regroup(self, *, took_over: bool = False) -> None:
        """Agree on the newest checkpoint with the ranks of a new process group, after workers were lost or joined.

        ``took_over``: this rank writes from now on, and cannot know which saves the one before completed.
        """

        def newest() -> int | None:
            stored = max(self.checkpoints.steps(), default=None)
            known = None if took_over else self.saved
            return max((step for step in (stored, known) if step is not None), default=None)

        self.saved = self.parts.distributed.on_rank_0(newest)

    @property
    def best(self) -> str | None:
        """Folder name of the best checkpoint, or of the newest if there is no best; None without any."""
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
