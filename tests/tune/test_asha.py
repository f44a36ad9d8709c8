"""The scheduler: decisions with the rounds recorded before an interruption."""

from __future__ import annotations

from searches import make_recipe, make_trials

from dreamfleet.tune.asha import make_scheduler
from dreamfleet.tune.trial_store import TrialStore


class Running:
    """A Ray Tune trial as a scheduler uses it."""

    def __init__(self, name: str):
        self.config = {"name": name}


def test_asha_compares_with_recorded_trials() -> None:
    recipe = make_recipe(reduction_factor=2)
    lagging = {"step": 10, "holdout_loss": 0.8}
    decisions = []
    for trials in (make_trials()[:2], []):
        asha = make_scheduler(TrialStore(recipe, trials))
        asha.on_trial_add(None, Running("new"))
        assert asha.on_trial_result(None, Running("new"), {"step": 0, "holdout_loss": 0.9}) == asha.CONTINUE
        decisions.append(asha.on_trial_result(None, Running("new"), lagging))
    assert decisions == [asha.STOP, asha.CONTINUE]


def test_asha_does_not_decide_on_a_recorded_round_again() -> None:
    """Trial 3 is worse than the others now, but it passed its rung before they reached it."""
    trials = make_trials()[:4]
    trials[3].rounds.append({"step": 10, "holdout_loss": 0.8})
    asha = make_scheduler(TrialStore(make_recipe(reduction_factor=2), trials))
    asha.on_trial_add(None, Running("trial-003"))
    repeated = {"step": 10, "holdout_loss": 0.8}
    assert asha.on_trial_result(None, Running("trial-003"), repeated) == asha.CONTINUE
