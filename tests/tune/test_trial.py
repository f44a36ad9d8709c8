"""One trial in this process, without Ray: its rounds, its end, and what it leaves in the process."""

from __future__ import annotations

import gc
import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from searches import GOOD, HOPELESS, make_trained_recipe
from servers import S3Server, s3_server  # noqa: F401 - a fixture

from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.recipe import load_recipe
from dreamfleet.tune.trial import STOPPED, Shared, TrialRun


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("search")
    tiny.make_images(folder / "holdout", 2, seed=5)
    return folder


def make_trial(folder: Path, name: str, rate: float = GOOD, last_step: int = -1) -> tuple[TrialRun, Storage]:
    recipe = make_trained_recipe(folder, name, [rate])
    shared = Shared(
        folder=recipe.output_dir,
        recipe=recipe.model_dump(mode="json", exclude={"search"}),
        figures=["holdout_loss"],
        threads=1,
        uses_gpu=False,
        gpu_share=1.0,
        environment={},
        sent={},
    )
    point = {"optimizer.learning_rate": rate, "method.num_vectors": 2}
    return TrialRun(shared, "trial-000", point, last_step), Storage(recipe.output_dir).child(
        "trials/trial-000"
    )


def test_a_trial_reports_its_rounds_and_ends_as_a_complete_run(folder: Path) -> None:
    trial, run = make_trial(folder, "whole")
    rounds = [trial.next_round() for _ in range(5)]
    assert [found["step"] for found in rounds] == [0, 10, 20, 30, 40]
    assert [found.get("exit_reason") for found in rounds] == [None] * 4 + ["completed"] and rounds[-1]["done"]
    trial.stop()
    summary = json.loads(run.read_text("summary.json"))
    assert summary["exit_reason"] == "completed" and summary["exports"]
    recipe = load_recipe(run.path("recipe.yaml"))
    assert recipe.method.num_vectors == 2 and recipe.scaling.num_workers == 0 and recipe.search is None


def test_a_stopped_trial_has_a_valid_run_folder_and_can_be_resumed(folder: Path) -> None:
    trial, run = make_trial(folder, "stopped")
    assert [trial.next_round()["step"] for _ in range(2)] == [0, 10]
    trial.stop()
    summary = json.loads(run.read_text("summary.json"))
    assert summary["exit_reason"] == STOPPED and STOPPED in run.read_text("report.html")
    assert run.list_dirs("checkpoints") and run.exists("samples/step-000010.png")
    again, _ = make_trial(folder, "stopped", last_step=10)
    rounds = [again.next_round() for _ in range(3)]
    assert [found["step"] for found in rounds] == [20, 30, 40]
    assert json.loads(run.read_text("summary.json"))["start_step"] == 11
    straight, _ = make_trial(folder, "straight")
    expected = [straight.next_round()["holdout_loss"] for _ in range(5)][2:]
    assert [found["holdout_loss"] for found in rounds] == expected


def test_a_failed_trial_reports_its_error(folder: Path) -> None:
    trial, run = make_trial(folder, "failing", HOPELESS)
    assert trial.next_round()["step"] == 0
    found = trial.next_round()
    assert found["done"] and found["kind"] == "RunFailed" and "number" in found["error"]
    assert "number" in run.read_text("run.log")
    trial.stop()


def state_of_torch() -> dict[str, Any]:
    """Return the process state that a run could change for the next one."""
    return {
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "gradients": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "group": torch.distributed.is_initialized(),
        "folder": os.getcwd(),
        "handlers": list(logging.getLogger("dreamfleet").handlers),
        "variables": {
            name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
        },
    }


def weights_in_memory() -> dict[int, torch.nn.Parameter]:
    """Return every parameter in this process by its id, including those of earlier tests."""
    gc.collect()
    return {id(one): one for one in gc.get_objects() if issubclass(type(one), torch.nn.Parameter)}


def test_a_failed_trial_does_not_change_the_next_one(folder: Path) -> None:
    """An actor runs one trial after the other; a failed one changes neither torch nor the next result."""
    first, _ = make_trial(folder, "fresh")
    expected = [first.next_round() for _ in range(5)]
    before, known = state_of_torch(), weights_in_memory()
    failing, _ = make_trial(folder, "fails-first", HOPELESS)
    while not failing.next_round().get("done"):
        pass
    failing.stop()
    assert state_of_torch() == before
    failing.thread.join()
    left = weights_in_memory().keys() - known.keys()
    assert not left, f"{len(left)} weights of the failed trial are still in memory"
    after, _ = make_trial(folder, "after-a-failure")
    assert [after.next_round() for _ in range(5)] == expected


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate")]
)
def test_a_trial_that_runs_out_of_memory_reports_a_resource_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def run_worker(*given: Any, **options: Any) -> Any:
        raise error

    monkeypatch.setattr("dreamfleet.trainers.run.run.run_worker", run_worker)
    trial, _ = make_trial(folder, f"no-memory-{type(error).__name__}")
    found = trial.next_round()
    assert found["kind"] == "ResourceError" and found["done"] and "memory" in found["error"]
