"""Workers that are Ray actors: packed tasks, and tasks whose process is killed."""

from __future__ import annotations

import os
import queue
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import tiny
import torch
from searches import make_trained_tree
from task_sources import ListSource

from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.config.engine import EngineConfig
from dreamfleet.trainers.config.scaling import WorkerShare
from dreamfleet.trainers.driver.session import ray_session
from dreamfleet.trainers.packing.task import End, Task
from dreamfleet.trainers.recipe import build_recipe
from dreamfleet.trainers.run.checkpoint import Checkpoints
from dreamfleet.trainers.run.run import run_worker
from dreamfleet.trainers.run.signals import stop_on_signal
from dreamfleet.tune.pool.actor import ActorWorker, Settings, is_reusable
from dreamfleet.tune.pool.dispatch import Dispatcher, Events
from dreamfleet.tune.pool.pool import run_pool


@pytest.mark.parametrize(
    ("engine", "end", "modules", "uses_gpu", "slots", "expected"),
    [
        ({}, "completed", [], False, 1, True),
        ({}, "failed", [], False, 1, True),
        ({}, "completed", [], True, 1, True),
        ({}, "failed", [], True, 1, False),  # it may have left memory on the GPU
        ({}, "failed", [], True, 8, True),
        ({}, "completed", ["deepspeed"], True, 1, False),  # `auto` selected ZeRO
        ({"zero_stage": 3}, "completed", [], False, 1, False),
        ({"torch_compile": True}, "completed", [], False, 1, False),
    ],
)
def test_a_process_is_used_again_unless_a_task_left_something_behind(
    engine: dict[str, Any], end: Any, modules: list[str], uses_gpu: bool, slots: int, expected: bool
) -> None:
    found = is_reusable(EngineConfig(**engine), End(end), modules=modules, uses_gpu=uses_gpu, slots=slots)
    assert found is expected


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("pool")
    tiny.make_images(folder / "holdout", 2, seed=5)
    with ray_session():
        yield folder


def make_tasks(folder: Path, name: str, count: int) -> list[Task]:
    found = []
    for number in range(count):
        tree = make_trained_tree(folder, str(folder / name / f"task-{number}"), [1e-3])
        del tree["search"]
        tree["scaling"]["num_workers"] = 0
        tree["train"]["seed"] = number
        found.append(Task(f"task-{number}", tree, ("holdout_loss",)))
    return found


def weights(task: Task) -> dict[str, torch.Tensor]:
    found = Checkpoints(Storage(task.recipe["output_dir"])).load_latest()
    assert found is not None and found.step == 40
    return found.learned


def make_workers(events: Events, slots: int, made: list[ActorWorker]) -> Callable[[], ActorWorker]:
    settings = ray.put(Settings(slots, 1, False, 1.0, {"POOL_TEST": "set"}, {}))

    def make() -> ActorWorker:
        made.append(ActorWorker(WorkerShare({"CPU": 1}, 1), settings, events))
        return made[-1]

    return make


@pytest.mark.cluster
def test_packed_tasks_go_on_from_their_checkpoints_when_their_process_is_killed(folder: Path) -> None:
    """The killed process had two tasks; their weights equal those of runs alone."""
    made: list[ActorWorker] = []
    events: Events = queue.SimpleQueue()
    killed: list[int] = []

    def decide(task: Task, figures: dict[str, Any]) -> bool:
        if not killed and figures["step"] >= 20:
            killed.append(ray.get(made[0].actor.__ray_call__.remote(lambda actor: os.getpid())))
            os.kill(killed[0], signal.SIGKILL)
        return task.name == "task-2" and figures["step"] == 10

    tasks = make_tasks(folder, "killed", 3)
    source = ListSource(tasks, decide)
    make = make_workers(events, 2, made)
    assert Dispatcher(source, make, events, num_workers=1, slots=2).run(lambda: False)
    assert killed and len(made) == 2
    assert {name: end.exit_reason for name, end in source.ends.items()} == {
        "task-0": "completed",
        "task-1": "completed",
        "task-2": "stopped",
    }
    assert sorted(task.name for task in source.starts).count("task-0") == 2
    for task, alone in zip(tasks[:2], make_tasks(folder, "alone", 2), strict=True):
        steps = [figures["step"] for figures in source.rounds[task.name]]
        assert steps == [0, 10, 20, 30, 40], "each round is reported once"
        summary = source.ends[task.name].summary
        assert summary is not None and summary["start_step"] >= 10, "it started from the beginning"
        run_worker(build_recipe(alone.recipe))
        torch.testing.assert_close(weights(task), weights(alone), rtol=1e-3, atol=1e-5)


@pytest.mark.cluster
def test_a_stopped_pool_saves_checkpoints(folder: Path) -> None:
    source = ListSource(make_tasks(folder, "interrupted", 2))
    recipe = build_recipe({**source.left[0].recipe, "output_dir": str(folder / "interrupted")})
    said: list[str] = []
    with stop_on_signal(Storage(recipe.output_dir), said.append) as stop:

        def should_stop() -> bool:
            return any(figures["step"] >= 10 for rounds in source.rounds.values() for figures in rounds)

        ended = run_pool(
            source, recipe, stop=stop, say=said.append, tasks=2, workers_per_task=1, should_stop=should_stop
        )
    assert ended == "interrupted" and set(source.ends) == {"task-0", "task-1"}
    for number, end in enumerate(source.ends.values()):
        assert end.exit_reason == "interrupted"
        assert (folder / f"interrupted/task-{number}/checkpoints").exists() or end.summary is None
    assert "worker" in said[0], said
