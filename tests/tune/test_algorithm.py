"""The points that a search tries, and in which order."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import pytest
from searches import RATES, loss_at, make_recipe, make_tree

from dreamfleet.trainers.recipe import build_recipe
from dreamfleet.tune.algorithm import SearchAlgorithm, propose
from dreamfleet.tune.search_state import EarlierTrial, SearchState
from dreamfleet.tune.space import grid, identity
from dreamfleet.tune.trial_store import Trial, TrialStore


def try_points(store: TrialStore, most: int) -> SearchAlgorithm:
    """Evaluate the artificial objective at the next points, one after the other."""
    algorithm = SearchAlgorithm(store)
    for number in range(most):
        trial = algorithm.suggest()
        if trial is None:
            break
        trial.add_round({"step": 100, "holdout_loss": loss_at(trial.point)})
        trial.status, trial.ended = "completed", number + 1
    return algorithm


def test_a_resumed_search_tries_the_same_points_as_an_uninterrupted_one() -> None:
    recipe = make_recipe(num_trials=9)
    uninterrupted = TrialStore(recipe)
    try_points(uninterrupted, 100)
    assert len(uninterrupted.trials) == 9
    first = TrialStore(recipe)
    try_points(first, 4).suggest()
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


def choices(*values: Any) -> dict[str, Any]:
    return {"distribution": "choice", "values": list(values)}


@pytest.mark.parametrize("algorithm", ["optuna", "random"])
def test_a_finite_space_ends_when_every_point_was_tried_once(algorithm: str) -> None:
    """A point that is still running counts as tried."""
    space = {
        "optimizer.learning_rate": choices(1e-3, 2e-3),
        "method.num_vectors": {"distribution": "randint", "lower": 1, "upper": 4},
    }
    store = TrialStore(make_recipe(space=space, num_trials=None, algorithm=algorithm))
    running = SearchAlgorithm(store)
    assert running.total == running.remaining == 8
    assert running.suggest() is not None
    found = try_points_beside(running, store)
    assert len(store.trials) == 8 and found.end_reason == "exhausted"
    assert len({identity(trial.point) for trial in store.trials}) == 8
    limited = TrialStore(make_recipe(space=space, num_trials=5, algorithm=algorithm))
    assert try_points(limited, 100).end_reason == "num_trials"


def try_points_beside(algorithm: SearchAlgorithm, store: TrialStore) -> SearchAlgorithm:
    """Evaluate points until none is proposed, while the first trial still runs."""
    while trial := algorithm.suggest():
        trial.add_round({"step": 100, "holdout_loss": loss_at(trial.point)})
        trial.status = "completed"
    return algorithm


def test_points_given_twice_are_tried_once() -> None:
    point = {"optimizer.learning_rate": 1e-3, "method.num_vectors": 2}
    section: dict[str, Any] = {
        "space": {"optimizer.learning_rate": choices(1e-3, 1e-2), "method.num_vectors": choices(1, 2)},
        "points_to_evaluate": [point, point],
        "num_trials": None,
    }
    for algorithm in ("grid", "optuna"):
        store = TrialStore(make_recipe(algorithm=algorithm, **section))
        assert try_points(store, 100).end_reason == "exhausted"
        assert len(store.trials) == 4 and store.trials[0].point == point


def test_a_resumed_search_of_a_finite_space_tries_the_same_points() -> None:
    """Most samples are points tried before; they must not shift the numbers that seed the later ones."""
    space = {
        "optimizer.learning_rate": choices(*(k * 1e-3 for k in range(1, 7))),
        "method.num_vectors": choices(1, 2),
    }
    recipe = make_recipe(space=space, num_trials=11)
    whole = TrialStore(recipe)
    try_points(whole, 100)
    parts = TrialStore(recipe)
    for _ in range(11):
        try_points(parts, 1)
        parts = TrialStore(recipe, [Trial(**json.loads(json.dumps(vars(trial)))) for trial in parts.trials])
    assert [trial.point for trial in parts.trials] == [trial.point for trial in whole.trials]
    assert len(whole.trials) == 11


def test_two_metrics_lead_the_sampler_to_both_ends_of_the_front() -> None:
    """Loss and score conflict in the number of vectors; both prefer a learning rate of 2e-3."""

    def distances(algorithm: str) -> list[float]:
        tree = make_tree(metric=["holdout_loss", "clip_i"], num_trials=40, algorithm=algorithm)
        tree["validation"] |= {"prompts": ["a <x>"], "metrics": ["clip_i"]}
        store = TrialStore(build_recipe(tree))
        search = SearchAlgorithm(store)
        while trial := search.suggest():
            away = abs(math.log(trial.point["optimizer.learning_rate"] / 2e-3))
            vectors = trial.point["method.num_vectors"]
            trial.add_round({"step": 100, "holdout_loss": away + vectors, "clip_i": vectors - away})
            trial.status = "completed"
        assert {trial.point["method.num_vectors"] for trial in store.front()} == {1, 2, 4}
        return [abs(math.log(t.point["optimizer.learning_rate"] / 2e-3)) for t in store.trials[20:]]

    assert sum(distances("optuna")) < 0.5 * sum(distances("random"))


def test_concurrent_trials_are_not_close_together() -> None:
    """With 20 results, the sampler avoids the points of trials that run; it ignores those of failed ones."""

    def distance(status: str, seed: int) -> float:
        store = TrialStore(make_recipe(num_trials=100, seed=seed))
        try_points(store, 20)
        rates = []
        for _ in range(6):
            point = propose(store)
            assert point is not None
            rates.append(math.log(point["optimizer.learning_rate"]))
            store.add(point).status = status
        pairs = [abs(one - other) for one, other in itertools.combinations(rates, 2)]
        return sum(pairs) / len(pairs)

    running, failed = (sum(distance(status, seed) for seed in range(3)) for status in ("running", "failed"))
    assert running > 1.2 * failed


def test_earlier_trials_lead_the_sampler_from_the_first_trial_on() -> None:
    recipe = make_recipe(num_trials=12)
    before = TrialStore(make_recipe(num_trials=30))
    try_points(before, 100)
    earlier = [
        EarlierTrial("runs/a", trial.name, trial.point, {"holdout_loss": loss_at(trial.point)})
        for trial in before.trials
    ]
    warm = TrialStore(recipe, state=SearchState(earlier=earlier))
    cold = TrialStore(recipe)
    mean = {}
    for store in (warm, cold):
        try_points(store, 100)
        mean[store] = sum(loss_at(trial.point) for trial in store.trials) / 12
    assert mean[warm] < 0.5 * mean[cold]


def test_a_failed_trial_does_not_end_the_search() -> None:
    store = TrialStore(make_recipe())
    algorithm = SearchAlgorithm(store)
    for _ in range(3):
        algorithm.suggest()
        store.trials[-1].status = "failed"
    assert algorithm.remaining == 3
    assert SearchAlgorithm(store).remaining == 3
