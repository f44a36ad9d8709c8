"""The importance of the searched keys."""

from __future__ import annotations

from pathlib import Path

import pytest
from searches import RATES, VECTORS, make_many_trials, make_recipe, make_recipe_of_two_metrics

from dreamfleet.tune.importance import LEAST_TRIALS, importances
from dreamfleet.tune.trial_store import TrialStore


@pytest.mark.parametrize("count", [16, 100])
def test_the_key_that_decides_has_the_largest_share(count: int, tmp_path: Path) -> None:
    store = TrialStore(make_recipe(tmp_path), make_many_trials(count))
    found = importances(store)
    assert list(found) == ["optimizer.learning_rate", "method.num_vectors"]
    assert found["optimizer.learning_rate"] > 0.8 and sum(found.values()) == pytest.approx(1)


def test_every_metric_has_its_own(tmp_path: Path) -> None:
    trials = make_many_trials(30)
    for trial in trials:
        for figures in trial.rounds:
            figures["clip_i"] = float(trial.point["method.num_vectors"])  # type: ignore[arg-type]
    store = TrialStore(make_recipe_of_two_metrics(tmp_path), trials)
    assert next(iter(importances(store))) == "optimizer.learning_rate"
    assert next(iter(importances(store, "clip_i"))) == "method.num_vectors"


def test_too_few_trials_or_one_key_have_none(tmp_path: Path) -> None:
    assert importances(TrialStore(make_recipe(tmp_path), make_many_trials(LEAST_TRIALS - 1))) == {}
    assert importances(TrialStore(make_recipe(tmp_path), make_many_trials(LEAST_TRIALS))) != {}
    only = {"optimizer.learning_rate": RATES, "method.num_vectors": {**VECTORS, "values": [2]}}
    trials = make_many_trials(20)
    for trial in trials:
        trial.point["method.num_vectors"] = 2
    assert importances(TrialStore(make_recipe(tmp_path, space=only), trials)) == {}
