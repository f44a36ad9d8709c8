"""The scheduler that stops trials early: Ray Tune's ASHA, with its state restored from the recorded trials."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

from dreamfleet.tune.trial_store import TrialStore

UNLIMITED = 10**9  # steps; ASHA must not end a trial at its last step, before the artifacts have been written


class Asha(ASHAScheduler):
    """ASHA that identifies trials by the names in the trial store, so that a resumed trial keeps its rungs."""

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Register a trial."""
        super().on_trial_add(tune_controller, _named(trial))

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Return Ray Tune's decision whether a trial continues after a validation round."""
        return super().on_trial_result(tune_controller, _named(trial), result)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Record the end of a trial."""
        super().on_trial_complete(tune_controller, _named(trial), result)

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        """Remove a trial that never ran."""
        super().on_trial_remove(tune_controller, _named(trial))


def make_scheduler(store: TrialStore) -> Any:
    """Return the scheduler named by ``search.scheduler``, with the recorded rounds; its time unit is a step."""
    recipe, search = store.recipe, store.search
    if search.scheduler == "none":
        return FIFOScheduler()
    asha = Asha(
        time_attr="step",
        metric=search.objective,
        mode="max" if search.maximise else "min",
        grace_period=search.grace_period or recipe.validation.steps,
        reduction_factor=search.reduction_factor,
        max_t=UNLIMITED,
    )
    for trial in store.trials:
        recorded = SimpleNamespace(config={"name": trial.name})
        asha.on_trial_add(None, recorded)
        for figures in trial.rounds:
            asha.on_trial_result(None, recorded, figures)
    return asha


def _named(trial: Any) -> Any:
    return SimpleNamespace(trial_id=trial.config["name"])
