"""The points that a search tries, and in which order."""

from __future__ import annotations

import json

import pytest
from searches import RATES, loss_at, make_recipe

from dreamfleet.tune.algorithm import SearchAlgorithm
from dreamfleet.tune.space import grid
from dreamfleet.tune.trial_store import Trial, TrialStore


def try_points(store: TrialStore, most: int) -> SearchAlgorithm:
    """Evaluate the artificial objective at the next points, one after the other."""
    algorithm = SearchAlgorithm(store)
    for number in range(most):
        config = algorithm.suggest(str(number))
        if config == algorithm.FINISHED:
            break
        trial = store.trial(config["name"])
        trial.add_round({"step": 100, "holdout_loss": loss_at(trial.point)})
        trial.status = "completed"
        algorithm.on_trial_complete(str(number), result={"holdout_loss": loss_at(trial.point)})
    return algorithm


def test_a_resumed_search_tries_the_same_points_as_an_uninterrupted_one() -> None:
    recipe = make_recipe(num_trials=9)
    uninterrupted = TrialStore(recipe)
    try_points(uninterrupted, 100)
    assert len(uninterrupted.trials) == 9
    first = TrialStore(recipe)
    try_points(first, 4).suggest("left in the middle")
    assert [trial.status for trial in first.trials] == ["completed"] * 4 + ["running"]
    second = TrialStore(recipe, [Trial(**json.loads(json.dumps(vars(trial)))) for trial in first.trials])
    try_points(second, 100)
    assert [trial.point for trial in second.trials] == [trial.point for trial in uninterrupted.trials]


def test_optuna_finds_better_points_than_random_sampling() -> None:
    def mean_loss(algorithm: str) -> float:
        store = TrialStore(make_recipe(num_trials=40, algorithm=algorithm))
        try_points(store, 100)
        losses = [loss_at(trial.point) for trial in store.trials[20:]]
        return sum(losses) / len(losses)

    assert mean_loss("optuna") < 0.5 * mean_loss("random")


def test_another_seed_samples_other_points() -> None:
    points = []
    for seed in (0, 1):
        store = TrialStore(make_recipe(seed=seed))
        try_points(store, 100)
        points.append([trial.point for trial in store.trials])
    assert points[0] != points[1]


def test_given_points_come_first_and_a_grid_keeps_its_order() -> None:
    wanted = {"optimizer.learning_rate": 2e-3, "method.num_vectors": 2}
    store = TrialStore(make_recipe(points_to_evaluate=[wanted]))
    try_points(store, 2)
    assert store.trials[0].point == wanted != store.trials[1].point
    recipe = make_recipe(
        space={
            "optimizer.learning_rate": {**RATES, "num": 4},
            "method.num_vectors": {"distribution": "lograndint", "lower": 1, "upper": 9, "num": 3},
        },
        algorithm="grid",
        num_trials=None,
    )
    assert recipe.search is not None
    points = grid(recipe.search)
    assert [point["method.num_vectors"] for point in points[:4]] == [1, 3, 9, 1]
    assert [point["optimizer.learning_rate"] for point in points[::3]] == pytest.approx(
        [1e-4, 1e-3, 1e-2, 1e-1]
    )
    store = TrialStore(recipe)
    try_points(store, 5)
    try_points(store, 100)
    assert [trial.point for trial in store.trials] == points
    assert try_points(store, 0).remaining == 0


def test_a_failed_trial_does_not_end_the_search() -> None:
    store = TrialStore(make_recipe())
    algorithm = SearchAlgorithm(store)
    for number in range(3):
        algorithm.suggest(str(number))
        store.trials[-1].status = "failed"
        algorithm.on_trial_complete(str(number), result={"error": "NaN"})
    assert algorithm.remaining == 3
    assert SearchAlgorithm(store).remaining == 3
