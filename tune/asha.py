"""The scheduler that stops trials early: Ray Tune's ASHA, with its state restored from the recorded trials."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, Protocol

from dreamfleet.tune.trial_store import TrialStore

UNLIMITED = 10**9  # steps; ASHA must not end a trial at its last step, before the artifacts have been written


class Scheduler(Protocol):
    """Decides after each validation round whether a trial is stopped."""

    def stops(self, name: str, figures: dict[str, Any]) -> bool:
        """Record a round of the trial called ``name``: ``step`` and figures; return whether the trial is stopped."""
        ...


class Asha:
    """Ray Tune's ASHA; its time unit is a step. A round that was recorded before never stops a trial."""

    def __init__(self, store: TrialStore):
        from ray.tune.schedulers import ASHAScheduler

        recipe, search = store.recipe, store.search
        self.asha: Any = ASHAScheduler(
            time_attr="step",
            metric=search.objective,
            mode="max" if search.maximise else "min",
            grace_period=search.grace_period or recipe.validation.steps,
            reduction_factor=search.reduction_factor,
            max_t=UNLIMITED,
        )
        self.known: set[str] = set()
        for trial in store.trials:
            for figures in trial.rounds:
                self.stops(trial.name, figures)

    def stops(self, name: str, figures: dict[str, Any]) -> bool:
        trial = SimpleNamespace(trial_id=name)  # by name, so that a resumed trial keeps its rungs
        if name not in self.known:
            self.known.add(name)
            self.asha.on_trial_add(None, trial)
        return bool(self.asha.on_trial_result(None, trial, figures) == self.asha.STOP)


class NoScheduler:
    """Stops no trial."""

    def stops(self, name: str, figures: dict[str, Any]) -> bool:
        return False


def make_scheduler(store: TrialStore) -> Scheduler:
    """Return the scheduler named by ``search.scheduler``, with the recorded rounds."""
    return NoScheduler() if store.search.scheduler == "none" else Asha(store)
