"""The scheduler: decisions with the rounds recorded before an interruption."""

from __future__ import annotations

from searches import make_recipe, make_trials

from dreamfleet.tune.asha import default_grace, make_scheduler
from dreamfleet.tune.trial_store import TrialStore


def test_asha_compares_with_recorded_trials() -> None:
    recipe = make_recipe(reduction_factor=2, grace_period=10)
    lagging = {"step": 10, "holdout_loss": 0.8}
    decisions = []
    for trials in (make_trials()[:2], []):
        asha = make_scheduler(TrialStore(recipe, trials))
        assert not asha.stops("new", {"step": 0, "holdout_loss": 0.9})
        decisions.append(asha.stops("new", lagging))
    assert decisions == [True, False]


def test_asha_does_not_decide_on_a_recorded_round_again() -> None:
    """Trial 3 is worse than the others now, but it passed its rung before they reached it."""
    trials = make_trials()[:4]
    trials[3].rounds.append({"step": 10, "holdout_loss": 0.8})
    asha = make_scheduler(TrialStore(make_recipe(reduction_factor=2, grace_period=10), trials))
    assert not asha.stops("trial-003", {"step": 10, "holdout_loss": 0.8})


def test_a_round_without_the_metric_stops_no_trial() -> None:
    asha = make_scheduler(TrialStore(make_recipe(reduction_factor=2, grace_period=10), make_trials()[:2]))
    assert not asha.stops("new", {"step": 10, "clip_i": 0.1})


def test_without_a_scheduler_no_trial_is_stopped() -> None:
    store = TrialStore(make_recipe(scheduler="none"), make_trials()[:2])
    assert not make_scheduler(store).stops("new", {"step": 10, "holdout_loss": 99.0})


def test_every_trial_trains_a_third_of_its_steps_and_one_round() -> None:
    recipe = make_recipe()
    for steps, every, grace in ((100, 10, 34), (100, 50, 50), (None, 25, 25)):
        train = recipe.train.model_copy(update={"max_train_steps": steps})
        validation = recipe.validation.model_copy(update={"steps": every})
        assert default_grace(recipe.model_copy(update={"train": train, "validation": validation})) == grace
