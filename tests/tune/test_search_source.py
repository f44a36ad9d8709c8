"""The task source of a search: what it records, without any training."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from searches import GOOD, make_recipe

from dreamfleet.datasets.errors import ModelError
from dreamfleet.trainers.config.scaling import WorkerShare
from dreamfleet.trainers.packing.task import End, Task
from dreamfleet.trainers.recipe import Recipe, build_recipe
from dreamfleet.tune.algorithm import SearchAlgorithm
from dreamfleet.tune.asha import make_scheduler
from dreamfleet.tune.open_search import open_store
from dreamfleet.tune.pool.room import Room
from dreamfleet.tune.search_source import SearchSource
from dreamfleet.tune.trial_store import Trial, TrialStore


class Played:
    """A search whose trials the test plays; the clock ticks one second a question."""

    def __init__(self, recipe: Recipe, trials: list[Trial] | None = None, **options: Any):
        self.store = TrialStore(recipe, trials or [])
        self.lines: list[tuple[str, str]] = []
        self.source = SearchSource(
            self.store,
            SearchAlgorithm(self.store),
            make_scheduler(self.store),
            on_progress=lambda trial: self.lines.append((trial.name, trial.status)),
            clock=itertools.count().__next__,
            **options,
        )

    def start(self) -> Task:
        task = self.source.next_task()
        assert task is not None
        self.source.on_start(task)
        return task

    def round(self, task: Task, step: int, loss: float) -> bool:
        self.source.on_round(task, {"step": step, "holdout_loss": loss})
        return self.source.decision(task)


def test_a_task_is_the_recipe_of_a_trial(tmp_path: Path) -> None:
    point = {"optimizer.learning_rate": GOOD, "method.num_vectors": 2}
    for workers in (0, 3):
        played = Played(make_recipe(tmp_path, points_to_evaluate=[point]), workers=workers)
        task = played.start()
        recipe = build_recipe(task.recipe)
        assert task.name == "trial-000" and task.figures == ("holdout_loss",) and task.last_step == -1
        assert recipe.method.num_vectors == 2 and recipe.search is None
        assert recipe.scaling.num_workers == workers
        assert recipe.output_dir == str(tmp_path / "trials/trial-000")


def test_rounds_and_ends_are_recorded_and_asha_stops(tmp_path: Path) -> None:
    played = Played(make_recipe(tmp_path, reduction_factor=2, grace_period=10))
    good, bad = played.start(), played.start()
    assert not played.round(good, 10, 0.2) and not played.round(good, 20, 0.1)
    assert played.round(bad, 10, 0.9)
    played.source.on_end(bad, End("stopped"))
    played.source.on_end(good, End("completed"))
    rows = json.loads((tmp_path / "trials.json").read_text())["trials"]
    assert [row["status"] for row in rows] == ["completed", "stopped"]
    assert rows[0]["rounds"] == [{"step": 10, "holdout_loss": 0.2}, {"step": 20, "holdout_loss": 0.1}]
    assert played.lines[-1] == ("trial-000", "completed")


def test_a_search_ends_when_the_algorithm_does() -> None:
    played = Played(make_recipe(num_trials=2))
    assert not played.source.is_done
    tasks = [played.source.next_task() for _ in range(3)]
    assert [task and task.name for task in tasks] == ["trial-000", "trial-001", None]
    assert played.source.is_done and played.store.state.end_reason == "num_trials"


def test_a_resumed_trial_continues_after_its_last_round(tmp_path: Path) -> None:
    point = {"optimizer.learning_rate": GOOD, "method.num_vectors": 1}
    left = Trial("trial-000", point, "interrupted", [{"step": 10, "holdout_loss": 0.4}], 7.0)
    played = Played(make_recipe(tmp_path), [left])
    task = played.start()
    assert (task.name, task.last_step) == ("trial-000", 10)
    played.round(task, 20, 0.3)
    assert played.store.trials[0].seconds == 8.0


def test_a_point_that_makes_the_recipe_invalid_is_a_failed_trial(tmp_path: Path) -> None:
    point = {"optimizer.learning_rate": -1.0, "method.num_vectors": 1}
    played = Played(make_recipe(tmp_path), [Trial("trial-000", point, "interrupted")])
    task = played.source.next_task()
    assert task is not None and task.name == "trial-001"
    failed = played.store.trials[0]
    assert failed.status == "failed" and "learning_rate" in str(failed.error)
    assert failed.kind == "RecipeError" and played.lines == [("trial-000", "failed")]


@pytest.mark.parametrize(("kind", "ends"), [("ModelError", True), ("RunFailed", False)])
def test_an_error_that_all_trials_share_ends_the_search(tmp_path: Path, kind: str, ends: bool) -> None:
    played = Played(make_recipe(tmp_path))
    tasks = [played.start() for _ in range(4)]
    for task in tasks[:3]:
        assert played.source.error is None
        played.source.on_end(task, End("failed", error="the model folder is empty", kind=kind))
    assert (played.source.error is not None) is ends and played.source.is_done is ends
    if ends:
        assert isinstance(played.source.error, ModelError)


def test_a_trial_without_memory_is_recorded_and_the_search_continues(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path)
    played = Played(recipe)
    first, second = played.start(), played.start()
    played.source.on_end(first, End("failed", error="the GPU ran out of memory", kind="ResourceError"))
    played.source.on_end(second, End("failed", error="odd", kind="KeyError"))
    assert played.source.error is None and not played.source.is_done
    (tmp_path / "search.yaml").write_text(recipe.to_yaml())
    read = open_store(recipe, resume=True).trials
    assert [(trial.status, trial.kind) for trial in read] == [
        ("failed", "ResourceError"),
        ("failed", "RunFailed"),
    ]


def test_gpu_time_is_shared_by_the_trials_of_a_gpu(tmp_path: Path) -> None:
    """One trial alone on a GPU for two seconds, then two trials share two GPUs, then three."""
    played = Played(make_recipe(tmp_path))
    played.source.times.room = Room(WorkerShare({"GPU": 1.0}, 1), groups=2, slots=2)
    first = played.start()
    played.round(first, 10, 0.5)  # 1 s alone
    second = played.start()  # 2 s alone
    third = played.start()  # 1 s for two
    played.round(first, 20, 0.5)  # 1 s for three
    assert [trial.seconds for trial in played.store.trials] == [4.0, 2.0, 1.0]
    shares = [trial.gpu_seconds for trial in played.store.trials]
    assert shares == pytest.approx([3 + 2 / 3, 1 + 2 / 3, 2 / 3])
    assert {second.name, third.name} == {"trial-001", "trial-002"}
