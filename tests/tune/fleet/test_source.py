"""Test the order in which a fleet starts its subjects, without training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny

from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.config.fleet import FleetConfig
from dreamfleet.trainers.packing.task import End, Task
from dreamfleet.trainers.recipe import build_recipe
from dreamfleet.tune.fleet.progress import COMPLETED, FAILED, INTERRUPTED, RUNNING, Progress, States
from dreamfleet.tune.fleet.read_subjects import read_subjects
from dreamfleet.tune.fleet.source import FleetSource
from dreamfleet.tune.fleet.table import read_rows


class Ends:
    """Takes the ended subjects in place of a finisher."""

    def __init__(self) -> None:
        self.ended: list[tuple[int, str]] = []

    def touch(self, index: int) -> None:
        pass

    def end(self, index: int, end: End, *, resolution: int) -> None:
        self.ended.append((index, end.exit_reason))


Maker = Callable[..., FleetSource]


@pytest.fixture
def make(tmp_path: Path) -> Maker:
    def build(rows: list[dict[str, Any]], *, prior: bool = False, **options: Any) -> FleetSource:
        tree = tiny.make_recipe(tmp_path, output_dir=str(tmp_path / "fleet"))
        tree["method"]["with_prior_preservation"] = prior
        subjects, recipes = read_subjects(read_rows(rows), build_recipe(tree), looks=False)
        states, lines = States(len(subjects)), list[str]()
        source = FleetSource(
            subjects,
            recipes,
            subjects.order(),
            states=states,
            finisher=Ends(),  # type: ignore[arg-type]
            progress=Progress(states, lines.append),
            limits=FleetConfig.model_validate(options.pop("limits", {})),
            **options,
        )
        source.lines = lines  # type: ignore[attr-defined]
        return source

    return build


def start(source: FleetSource) -> Task | None:
    task = source.next_task()
    if task is not None:
        source.on_start(task)
    return task


def start_all(source: FleetSource) -> list[str]:
    return [task.name for task in iter(lambda: start(source), None)]


def rows_of(**priorities: float) -> list[dict[str, Any]]:
    return [{"name": name, "images": "x", "priority": number} for name, number in priorities.items()]


def test_higher_priorities_start_first_and_equal_ones_in_order(make: Maker) -> None:
    source = make(rows_of(a=0, b=5, c=-1, d=5))
    assert start_all(source) == ["b", "d", "a", "c"]
    assert source.is_done


def test_ends_are_counted_and_shown(make: Maker) -> None:
    source = make(rows_of(a=0, b=0, c=0))
    tasks = [start(source) for _ in range(3)]
    assert source.states.count(RUNNING) == 3
    ends = [End("completed"), End("failed", error="no images", kind="DataError"), End("interrupted")]
    for task, end in zip(tasks, ends, strict=True):
        assert task is not None
        source.on_end(task, end)
    assert [source.states[index] for index in range(3)] == [COMPLETED, FAILED, INTERRUPTED]
    assert source.finisher.ended == [(0, "completed"), (1, "failed"), (2, "interrupted")]  # type: ignore[attr-defined]
    source.progress.show()
    lines = source.lines  # type: ignore[attr-defined]
    assert lines[0] == "b failed: no images"
    assert lines[1].startswith("1/3 done, 1 failed, 1 interrupted")


def test_limits_stop_the_starts(make: Maker) -> None:
    source = make(rows_of(a=0, b=0, c=0), limits={"max_subjects": 2})
    assert start_all(source) == ["a", "b"]
    assert source.is_done and source.is_at_limit and not source.is_out_of_time
    now = [0.0]
    source = make(rows_of(a=0, b=0), limits={"max_hours": 1}, clock=lambda: now[0])
    assert start(source) is not None
    assert not source.is_done
    now[0] = 3600.0
    assert source.next_task() is None
    assert source.is_done and source.is_out_of_time


def test_one_subject_of_each_class_goes_first(make: Maker) -> None:
    rows = [
        {"name": name, "images": "x", "class_prompt": kind}
        for name, kind in [("a", "cat"), ("b", "cat"), ("c", "dog"), ("d", "cat"), ("e", "dog")]
    ]
    now = [0.0]
    source = make(rows, prior=True, clock=lambda: now[0])
    first, other = start(source), start(source)
    assert first is not None and other is not None
    assert (first.name, other.name) == ("a", "c")
    assert start(source) is None and not source.is_done
    Storage(first.recipe["output_dir"]).write_text("recipe.yaml", "")
    now[0] = 1.0
    assert start_all(source) == ["b", "d"]
    source.on_end(other, End("failed", error="x", kind="DataError"))
    follower = start(source)
    assert follower is not None and follower.name == "e"
    assert source.is_done
