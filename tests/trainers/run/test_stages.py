"""Tests of the times of stages, and of the trace of profiled steps."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import tiny
import torch

from dreamfleet.datasets.errors import RecipeError
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.config.packing import find_unpackable
from dreamfleet.trainers.recipe import build_recipe
from dreamfleet.trainers.report.metrics_log import read_metrics
from dreamfleet.trainers.run import stages
from dreamfleet.trainers.run.run import run_worker


def test_a_trace_names_steps_and_stages_and_their_times_do_not_count(tmp_path: Path) -> None:
    tree = tiny.make_recipe(tmp_path, train__max_train_steps=6, train__profile_steps=[3, 4])
    recipe = build_recipe(tree)
    assert "profile_steps" in (find_unpackable(recipe) or "")
    run_worker(recipe)
    run = tmp_path / "run"
    assert [path.name for path in (run / "profile").iterdir()] == ["step-000003-rank-0.json.gz"]
    events = json.loads(gzip.decompress((run / "profile" / "step-000003-rank-0.json.gz").read_bytes()))
    named = [event["name"] for event in events["traceEvents"] if event.get("cat") == "user_annotation"]
    assert [name for name in named if name.startswith("step ")] == ["step 3", "step 4"]
    for stage in ("data_wait", "forward_backward", "optimizer"):
        assert named.count(stage) == 2
    assert any(event.get("name") == "aten::addmm" for event in events["traceEvents"])
    lines = {line["step"]: line for line in read_metrics(Storage(run)) if "loss" in line}
    assert len(lines) == 6
    # The trace is written while step 5 begins.
    for key, untimed in {
        "step_seconds": {3, 4, 5},
        "images_per_second": {3, 4, 5},
        "optimizer_seconds": {3, 4},
    }.items():
        assert {step for step, line in lines.items() if key not in line} == untimed
    assert "profile/step-000003-rank-0.json.gz" in (run / "report.html").read_text()


def test_a_run_that_stops_within_the_profiled_steps_writes_them(tmp_path: Path) -> None:
    recipe = build_recipe(tiny.make_recipe(tmp_path, train__profile_steps=[2, 4]))
    assert run_worker(recipe, should_stop=tiny.Stop(2)).steps == 3
    assert (tmp_path / "run" / "profile" / "step-000002-rank-0.json.gz").exists()
    run_worker(recipe, resume=True)
    assert (tmp_path / "run" / "profile" / "step-000004-rank-0.json.gz").exists(), "the rest of the steps"


@pytest.mark.parametrize("steps", [[0, 3], [4, 3], [4]])
def test_invalid_profile_steps_are_refused(tmp_path: Path, steps: list[int]) -> None:
    with pytest.raises(RecipeError, match="profile_steps"):
        build_recipe(tiny.make_recipe(tmp_path, train__profile_steps=steps))


def test_times_of_stages_are_means_per_step(monkeypatch: pytest.MonkeyPatch) -> None:
    times = stages.StageTimes(torch.device("cpu"))
    clock = iter([0.0, 1.0, 4.0, 5.0, 10.0, 12.0, 15.0, 16.0])
    monkeypatch.setattr(stages.time, "perf_counter", lambda: next(clock))
    for _ in range(2):
        for stage in ("data", "pass", "last pass", "reduce", ""):
            times.mark(stage)
        times.finish_step()
    assert times.read() == {
        "data_wait_seconds": 1.5,
        "forward_backward_seconds": 3.0,
        "optimizer_seconds": 1.0,
    }
    assert times.read() == {}
