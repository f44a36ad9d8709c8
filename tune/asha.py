"""The scheduler that stops trials early: Ray Tune's ASHA, with its state restored from the recorded trials."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, Protocol

from dreamfleet.trainers.recipe import Recipe
from dreamfleet.tune.trial_store import TrialStore

UNLIMITED = 10**9  # steps; ASHA must not end a trial at its last step, before the artifacts have been written


GRACE_SHARE = 3  # of a trial's steps, one in so many pass before it may be stopped: see docs/searches.md


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
            grace_period=search.grace_period or default_grace(recipe),
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


def default_grace(recipe: Recipe) -> int:
    """Return the optimizer steps that every trial may train: a third of all, and at least one validation round."""
    return max(recipe.validation.steps, -(-(recipe.train.max_train_steps or 0) // GRACE_SHARE))


def make_scheduler(store: TrialStore) -> Scheduler:
    """Return the scheduler named by ``search.scheduler``, with the recorded rounds."""
    return NoScheduler() if store.search.scheduler == "none" else Asha(store)
