"""The scheduler that stops lagging trials: Ray Tune's ASHA, told of the trials from before an interruption."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

from dreamfleet.tune.trial_store import TrialStore

NO_END = 10**9  # a trial that has come to its last step ends by itself, with its artefacts written


class Asha(ASHAScheduler):
    """ASHA by our names of the trials: one that goes on is the one from before, and keeps the rungs that it passed."""

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Take in a trial."""
        super().on_trial_add(tune_controller, _named(trial))

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Decide after a round whether the trial goes on."""
        return super().on_trial_result(tune_controller, _named(trial), result)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Note a trial that ended."""
        super().on_trial_complete(tune_controller, _named(trial), result)

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        """Forget a trial that never ran."""
        super().on_trial_remove(tune_controller, _named(trial))


def make_scheduler(store: TrialStore) -> Any:
    """Return the scheduler that the search asks for; ASHA measures time in optimizer steps."""
    recipe, search = store.recipe, store.search
    if search.scheduler == "none":
        return FIFOScheduler()
    asha = Asha(
        time_attr="step",
        metric=search.metric,
        mode="max" if search.maximise else "min",
        grace_period=search.grace_period or recipe.validation.steps,
        reduction_factor=search.reduction_factor,
        max_t=NO_END,
    )
    for trial in store.trials:
        before = SimpleNamespace(config={"name": trial.name})
        asha.on_trial_add(None, before)
        for figures in trial.rounds:
            asha.on_trial_result(None, before, figures)
    return asha


def _named(trial: Any) -> Any:
    return SimpleNamespace(trial_id=trial.config["name"])
