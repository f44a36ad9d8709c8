"""Tasks trained by several workers: `fit` is replaced by a function that writes metrics and watches the stop file."""

from __future__ import annotations

import json
import queue
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from searches import make_tree
from task_sources import ListSource

from dreamfleet.datasets.errors import ResourceError
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.packing.task import Task
from dreamfleet.trainers.recipe import Recipe
from dreamfleet.trainers.run.run_folder import METRICS_FILE, STOP_FILE
from dreamfleet.trainers.run.summary import Summary
from dreamfleet.tune.pool import group
from dreamfleet.tune.pool.dispatch import Dispatcher, Events
from dreamfleet.tune.pool.group import Group


def make_task(folder: Path, last_step: int = -1) -> Task:
    tree = make_tree(folder / "run")
    del tree["search"]
    return Task("task", tree, ("holdout_loss",), last_step)


def summary(reason: str) -> Summary:
    return Summary("run", "textual_inversion", reason, 30, 0, 30, 2, 2, "cpu", 1, 0, 1, {}, None)


def make_fit(*, waits: bool, seen: list[Recipe]) -> Callable[..., Any]:
    """Return a `fit` of three rounds; with ``waits`` it then trains until the stop file appears."""

    def fit(recipe: Recipe, *, resume: bool, shared: Any, on_progress: Callable[[Any], None]) -> Any:
        assert resume
        seen.append(recipe)
        run = Storage(recipe.output_dir)
        run.remove(STOP_FILE)  # as fit does
        for step in (10, 20, 30):
            line = {"step": step, "holdout_loss": 1 / step}
            run.append_text(METRICS_FILE, json.dumps(line) + "\n")
            on_progress(line)
        deadline = time.monotonic() + 20
        while waits and not run.exists(STOP_FILE):
            assert time.monotonic() < deadline, "no stop file was written"
            time.sleep(0.01)
        return SimpleNamespace(summary=summary("interrupted" if waits else "completed"))

    return fit


def run(
    source: ListSource, train: Callable[..., Any], should_stop: Callable[[], bool] = lambda: False
) -> None:
    events: Events = queue.SimpleQueue()
    Dispatcher(
        source,
        lambda: Group(events, num_workers=2, resources={"CPU": 1.0}, train=train),
        events,
        num_workers=1,
    ).run(should_stop)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Write stop files at once, and record ends that are rewritten."""
    rewritten: list[str] = []

    def write_end(run: Storage, summary: Summary, reason: str) -> Summary:
        rewritten.append(reason)
        return summary

    monkeypatch.setattr(group, "SECONDS_BETWEEN_STOP_FILES", 0.05)
    monkeypatch.setattr(group, "write_end", write_end)
    return rewritten


def test_a_group_trains_a_task_with_its_workers_and_reports_new_rounds(tmp_path: Path) -> None:
    seen: list[Recipe] = []
    source = ListSource([make_task(tmp_path, last_step=10)])
    run(source, make_fit(waits=False, seen=seen))
    scaling = seen[0].scaling
    assert scaling.num_workers == 2 and scaling.resources_per_worker == {"CPU": 1.0}
    assert [figures["step"] for figures in source.rounds["task"]] == [20, 30]
    assert source.ends["task"].exit_reason == "completed"
    assert source.ends["task"].summary is not None and source.ends["task"].summary["workers"] == 2


def test_a_decision_stops_a_group_by_its_stop_file(tmp_path: Path, quick: list[str]) -> None:
    source = ListSource([make_task(tmp_path)], lambda task, figures: figures["step"] == 20)
    run(source, make_fit(waits=True, seen=[]))
    assert source.ends["task"].exit_reason == "stopped" and quick == ["stopped by the scheduler"]
    assert not (tmp_path / "run" / STOP_FILE).exists(), "the next start would end at once"


def test_an_interrupted_group_saves_a_checkpoint(tmp_path: Path, quick: list[str]) -> None:
    source = ListSource([make_task(tmp_path)])
    run(source, make_fit(waits=True, seen=[]), lambda: "task" in source.rounds)
    assert source.ends["task"].exit_reason == "interrupted" and not quick


def test_errors_of_a_group_are_the_end_of_its_task(tmp_path: Path) -> None:
    for error, kind in ((ResourceError("no room"), "ResourceError"), (KeyError("odd"), "RunFailed")):

        def fail(recipe: Recipe, *, error: Exception = error, **options: Any) -> Any:
            raise error

        source = ListSource([make_task(tmp_path)])
        run(source, fail)
        end = source.ends["task"]
        assert end.exit_reason == "failed" and end.kind == kind
