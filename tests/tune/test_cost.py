"""The cost of a search."""

from __future__ import annotations

from pathlib import Path

from searches import make_many_trials, make_recipe, make_trials

from dreamfleet.tune.cost import cost
from dreamfleet.tune.search_state import SearchState
from dreamfleet.tune.trial_store import TrialStore


def test_the_cost_names_time_steps_and_what_was_saved(tmp_path: Path) -> None:
    state = SearchState(seconds=7.0, freed_bytes=2_500_000)
    store = TrialStore(make_recipe(tmp_path), make_trials(), state=state, clock=lambda: 0.0)
    store.trials[0].gpu_seconds = store.trials[1].gpu_seconds = 1800
    # Steps: 20 and 20 completed, 10 stopped, 0 interrupted; a trial has 100 steps and took 3.5 s.
    assert dict(cost(store)) == {
        "time of all trials": "18 s",
        "one trial (median)": "3.5 s",
        "the whole search": "7.0 s",
        "GPU hours": "1",
        "optimizer steps": "50",
        "optimizer steps saved by stopping early": "90 (64 %)",
        "time that they would have taken (estimate)": "32 s",
        "disk space freed by removing checkpoints": "2.5 MB",
    }


def test_nothing_is_saved_without_stopped_trials(tmp_path: Path) -> None:
    trials = [trial for trial in make_many_trials(20) if trial.status == "completed"]
    names = [name for name, _ in cost(TrialStore(make_recipe(tmp_path), trials))]
    assert "optimizer steps" in names and not any("saved" in name or "GPU" in name for name in names)


def test_searched_numbers_of_steps_count(tmp_path: Path) -> None:
    space = {"train.max_train_steps": {"distribution": "choice", "values": [50, 100]}}
    trial = make_trials()[2]  # stopped at step 10
    trial.point = {"train.max_train_steps": 50}
    rows = dict(cost(TrialStore(make_recipe(tmp_path, space=space), [trial])))
    assert rows["optimizer steps saved by stopping early"] == "40 (80 %)"


def test_a_search_without_trials_has_no_cost(tmp_path: Path) -> None:
    assert cost(TrialStore(make_recipe(tmp_path))) == []
