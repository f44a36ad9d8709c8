"""Saves the checkpoints of a run; keeps the newest ones and the best by a figure of its validation rounds."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from dreamfleet.datasets.errors import RunFailed
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.report.events import EventLog
from dreamfleet.trainers.report.metrics_log import read_metrics
from dreamfleet.trainers.run.build import Parts
from dreamfleet.trainers.run.checkpoint import Checkpoints, folder_name
from dreamfleet.trainers.run.finite import find_not_finite
from dreamfleet.trainers.run.host_copy import HostCopy
from dreamfleet.trainers.run.provenance import run_identity
from dreamfleet.trainers.run.saves import Saves
from dreamfleet.trainers.run.stopwatch import Clock
from dreamfleet.trainers.run.versions import versions
from dreamfleet.trainers.step_metrics import diverged


class Checkpointing:
    """Saves the checkpoints of a run: every rank calls :meth:`save`, :meth:`keep_best` and :meth:`finish`.

    A save copies the state to host memory and returns; threads of rank 0 write it while the run continues (see
    :class:`Saves`). ``saved`` is the step of the newest state that was taken, the same on every rank; None before the
    first one. It is complete when the next :meth:`save`, :meth:`finish` or the end of the context has returned.
    ``after_save`` is called on rank 0, by a thread, after each complete save.
    """

    def __init__(
        self,
        parts: Parts,
        checkpoints: Checkpoints,
        clock: Clock,
        *,
        start_step: int = 0,
        after_save: Callable[[], None] = lambda: None,
        events: EventLog | None = None,
    ):
        self.parts, self.checkpoints, self.clock = parts, checkpoints, clock
        self.start_step = start_step
        self.saved = start_step or None
        self.metric = parts.recipe.validation.metric_for_best
        self.sign = -1 if parts.recipe.validation.maximises else 1
        self.released = set[
            int
        ]()  # steps that were saved only for rounds in another process, which are finished
        self.best_loss = math.inf  # the best value so far, negated where higher is better
        self.bests: list[int] = []  # the steps of the best checkpoints so far, the newest last
        self.host = HostCopy()
        self.saves = Saves(
            checkpoints,
            bests=self.bests,
            released=self.released,
            is_due=self._is_due,
            after_save=after_save,
            events=events,
        )

    def recall_best(self, run: Storage) -> None:
        """Find the best existing checkpoint in the metrics of a resumed run; rank 0 only."""
        kept = set(self.checkpoints.steps())
        measured = [
            (self.sign * line[self.metric], line["step"])
            for line in read_metrics(run)
            if line.get(self.metric) is not None and line["step"] in kept and line["step"] > 0
        ]
        if measured:
            self.best_loss, best = min(measured)
            self.bests.append(best)

    def save(self, step: int) -> None:
        """Take the state of ``step`` for its checkpoint, unless that was just done; return on every rank.

        Raises on every rank RunFailed if weights, EMA weights or optimizer moments are infinite or NaN, which the loss
        shows one step later, and StorageError if the files of the save before could not be written.
        """
        if step == self.saved:
            return
        began = time.monotonic()
        # Every rank calls these: an engine that shards the parameters gathers them here.
        learned, engine = self.parts.engine.weights(), self.parts.engine.state()
        self.parts.distributed.on_rank_0(lambda: self._take(step, learned, engine, began))
        self.saved = step

    def keep_best(self, step: int, figures: Mapping[str, float]) -> None:
        """Save ``step`` if its figures contain the best ``validation.metric_for_best`` so far; release the one before.

        The previous best is kept only within the limit, and if the schedule saves its step or the run was
        resumed from it. It is removed when the new one is complete. Rank 0's figures decide. Step 0 and a value that
        is not finite are never the best.
        """
        distributed = self.parts.distributed
        loss = self.sign * figures.get(self.metric, math.inf * self.sign)
        if not distributed.broadcast(step > 0 and math.isfinite(loss) and loss < self.best_loss):
            return
        # Before saving, which removes the checkpoints beyond the limit, except the best.
        self.bests.append(step)
        self.best_loss = loss
        self.save(step)
        if distributed.is_main:
            self.saves.tidy(step)

    def finish(self) -> None:
        """Wait on every rank until all saves are complete. Raises the error of a save that failed."""
        self.parts.distributed.on_rank_0(self.saves.finish)

    def __enter__(self) -> Checkpointing:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Complete the saves of a run that fails, so that it can be continued from the newest; log their errors."""
        if error is not None:  # an interrupt or a closed generator waits for the disk, not for a bucket
            self.saves.close(patiently=isinstance(error, Exception))

    @property
    def has_failed(self) -> bool:
        """Whether a save of this rank failed for good, so that :meth:`save` and :meth:`finish` raise its error."""
        return self.saves.has_failed

    def regroup(self, *, took_over: bool = False) -> None:
        """Agree on the newest checkpoint with the ranks of a new process group, after workers were lost or joined.

        ``took_over``: this rank writes from now on, and cannot know which saves the one before completed.
        """

        def newest() -> int | None:
            stored = max(self.checkpoints.steps(), default=None)
            known = None if took_over else self.saved
            return max((step for step in (stored, known) if step is not None), default=None)

        self.saved = self.parts.distributed.on_rank_0(newest)

    def settle(self, step: int, figures: Mapping[str, float]) -> None:
        """Keep or release the checkpoint of ``step`` after its round in another process; rank 0 only.

        As :meth:`keep_best`; the checkpoint exists already, and is released if it was saved for the round alone.
        """
        self.checkpoints.in_use.discard(step)
        loss = self.sign * figures.get(self.metric, math.inf * self.sign)
        if step > 0 and math.isfinite(loss) and loss < self.best_loss:
            self.bests.append(step)
            self.best_loss = loss
        elif not self._is_due(step):
            self.released.add(step)
        self.saves.tidy(self.saved or step)

    @property
    def best(self) -> str | None:
        """Folder name of the best checkpoint, or of the newest if there is no best; None without any."""
        steps = self.checkpoints.steps()
        best = next((step for step in reversed(self.bests) if step in steps), None)
        return folder_name(best if best is not None else steps[-1]) if steps else None

    def _take(self, step: int, learned: dict[str, Tensor], engine: dict[str, Any], began: float) -> None:
        self.saves.require_room()
        state = {"learned": learned, "engine": engine}
        if bad := find_not_finite(state):
            raise RunFailed(diverged(f"{bad} is no longer finite after step {step}", self.saved))
        if not self.parts.engine.gathers_state:
            state = self.host.take(state)
        meta = {
            "method": self.parts.recipe.method.name,
            "workers": self.parts.distributed.world,
            "steps_before": self.parts.method.steps_before,
            "seconds": self.clock.lap(),
            **run_identity(self.parts),
            "versions": versions(),
        }
        self.saves.start(step, lambda: self._complete(state), meta, seconds=time.monotonic() - began)

    def _complete(self, state: dict[str, Any]) -> dict[str, Any]:
        self.host.wait()
        return state

    def _is_due(self, step: int) -> bool:
        return step == self.start_step or self.parts.schedule.saves_at(step)
