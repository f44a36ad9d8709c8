"""The checkpoint with the lowest held-out loss: kept beside the newest ones, and named in the summary."""

from __future__ import annotations

import math
from collections.abc import Callable

from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.report.metrics_log import read_metrics
from dreamfleet.trainers.run.checkpoint import Checkpoints, folder_name


class BestCheckpoint:
    """Remembers the lowest held-out loss of which there is a checkpoint, and protects that checkpoint.

    ``is_due(step)`` says whether a step is saved anyway; another one is dropped once it is no longer the best.
    """

    def __init__(self, checkpoints: Checkpoints, *, is_due: Callable[[int], bool]):
        self.checkpoints, self.is_due = checkpoints, is_due
        self.loss = math.inf

    def recall(self, run: Storage) -> None:
        """Find the best one in the metrics of a run that is resumed."""
        kept = set(self.checkpoints.steps())
        measured = [
            (line["holdout_loss"], line["step"])
            for line in read_metrics(run)
            if line.get("holdout_loss") is not None and line["step"] in kept
        ]
        if measured:
            self.loss, self.checkpoints.best = min(measured)

    def is_beaten_by(self, loss: float) -> bool:
        """Say whether a held-out loss is lower; one that is not finite never is."""
        return math.isfinite(loss) and loss < self.loss

    def replace(self, loss: float, step: int) -> int | None:
        """Make ``step`` the best one, from before its checkpoint is written; returns the one before, to let go."""
        before, self.loss, self.checkpoints.best = self.checkpoints.best, loss, step
        return before

    def let_go(self, before: int | None, *, newest: int) -> None:
        """Keep the checkpoint that was the best one only where it was due, and is within the limit."""
        if before is not None and not self.is_due(before):
            self.checkpoints.drop(before)
        self.checkpoints.prune(newest)

    @property
    def name(self) -> str | None:
        """The folder of the best checkpoint; the newest one's where none was measured."""
        steps = self.checkpoints.steps()
        best = self.checkpoints.best
        return folder_name(best if best in steps else steps[-1]) if steps else None
