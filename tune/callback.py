"""Writes down what Ray Tune's trials tell."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ray.tune import Callback

from dreamfleet.datasets.errors import UserError
from dreamfleet.trainers.run.run_folder import STOP_FILE
from dreamfleet.tune.trial_store import Trial, TrialStore, common_error


class StoreCallback(Callback):
    """Keeps the record while trials run; lives in the driver.

    ``on_progress`` gets every trial that changed. ``mistake`` is an error that all trials of the ``planned`` ones would
    meet: the search ends there.
    """

    def __init__(self, store: TrialStore, on_progress: Callable[[Trial], None]):
        self.store, self.on_progress = store, on_progress
        self.mistake: UserError | None = None
        self.planned = 1
        self._seconds_before: dict[str, float] = {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Note that a trial runs (again)."""
        row = self._row(trial)
        row.status, row.error, row.kind = "running", None, None
        self._seconds_before[row.name] = row.seconds
        self._note(row)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Note a validation round, or how a trial ended."""
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
        self._note(row)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Note that a trial's process died once too often."""
        error = trial.get_error()
        lines = str(getattr(error, "cause", None) or error).strip().splitlines() or [type(error).__name__]
        self._fail(self._row(trial), f"its process died: {lines[-1]}", "RunFailed")

    def __reduce__(self) -> tuple[Any, ...]:
        # As for SearchAlgorithm: Tune's own copy of this is never read.
        return (object, ())

    def _fail(self, row: Trial, error: str, kind: str) -> None:
        row.status, row.error, row.kind = "failed", error, kind
        if self.mistake is None and (mistake := common_error(self.store.trials, self.planned)):
            self.mistake = mistake
            self.store.folder.write_text(STOP_FILE, "")
        self._note(row)

    def _row(self, trial: Any) -> Trial:
        return self.store.trial(trial.config["name"])

    def _note(self, row: Trial) -> None:
        self.store.save()
        self.on_progress(row)
