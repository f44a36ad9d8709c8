"""The Ray Tune callback that records trials."""

from __future__ import annotations

from pathlib import Path

from searches import make_recipe, make_trials

from dreamfleet.tune.callback import StoreCallback
from dreamfleet.tune.open_search import open_store
from dreamfleet.tune.trial_store import TrialStore, format_trial


class Running:
    """A Ray Tune trial as a callback uses it."""

    def __init__(self, name: str):
        self.config = {"name": name}


def test_a_trial_without_memory_is_recorded_and_the_search_continues(tmp_path: Path) -> None:
    store = TrialStore(make_recipe(tmp_path), make_trials()[:2])
    for trial in store.trials:
        trial.status, trial.rounds = "running", []
    lines: list[str] = []
    callback = StoreCallback(store, lambda trial: lines.append(format_trial(trial, ["holdout_loss"])))
    callback.planned = 6
    first, second = (Running(trial.name) for trial in store.trials)
    for one in (first, second):
        callback.on_trial_start(0, [], one)
    out_of_memory = {
        "error": "the GPU ran out of memory",
        "kind": "ResourceError",
        "done": True,
        "time_total_s": 2.0,
    }
    callback.on_trial_result(0, [], first, out_of_memory)
    callback.on_trial_result(
        0, [], second, {"step": 10, "holdout_loss": 0.5, "done": False, "time_total_s": 2.0}
    )
    assert callback.error is None and not (tmp_path / "STOP").exists()
    assert "ran out of memory" in lines[2]
    (tmp_path / "search.yaml").write_text(store.recipe.to_yaml())
    read = open_store(store.recipe, resume=True).trials
    assert [(trial.status, trial.kind) for trial in read] == [("failed", "ResourceError"), ("running", None)]
