"""A Ray Tune callback that records the trials of a search."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ray.tune import Callback

from dreamfleet.datasets.errors import UserError
from dreamfleet.trainers.run.run_folder import STOP_FILE
from dreamfleet.tune.trial_store import Trial, TrialStore, common_error


class StoreCallback(Callback):
    """Updates the trial store while trials run, in the driver process.

    ``on_progress`` is called with every trial that changed. If the first of the ``planned`` trials fail with an error
    that all trials would raise, ``error`` is set and the search stopped.
    """

    def __init__(self, store: TrialStore, on_progress: Callable[[Trial], None]):
        self.store, self.on_progress = store, on_progress
        self.error: UserError | None = None
        self.planned = 1
        self._seconds_before: dict[str, float] = {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Record the start or restart of a trial."""
        row = self._row(trial)
        row.status, row.error, row.kind = "running", None, None
        self._seconds_before[row.name] = row.seconds
        self._save(row)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Record a validation round or the end of a trial."""
        row = self._row(trial)
        row.seconds = self._seconds_before[row.name] + result["time_total_s"]
        if "error" in result:
            self._fail(row, result["error"], result["kind"])
            return
        row.add_round({name: result[name] for name in ("step", *self.store.figures) if name in result})
        if reason := result.get("exit_reason"):
            row.status = reason
        elif result["done"]:
            row.status = "stopped"
        self._save(row)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Record a trial whose process died more than ``scaling.max_failures`` times."""
        error = trial.get_error()
        lines = str(getattr(error, "cause", None) or error).strip().splitlines() or [type(error).__name__]
        self._fail(self._row(trial), f"its process died: {lines[-1]}", "RunFailed")

    def __reduce__(self) -> tuple[Any, ...]:
        # Tune pickles its callbacks for its own resume feature, which is not used.
        return (object, ())

    def _fail(self, row: Trial, error: str, kind: str) -> None:
        row.status, row.error, row.kind = "failed", error, kind
        if self.error is None and (common := common_error(self.store.trials, self.planned)):
            self.error = common
            self.store.folder.write_text(STOP_FILE, "")
        self._save(row)

    def _row(self, trial: Any) -> Trial:
        return self.store.trial(trial.config["name"])

    def _save(self, row: Trial) -> None:
        self.store.save()
        self.on_progress(row)
