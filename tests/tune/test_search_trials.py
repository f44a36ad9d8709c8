"""Trials as they run: one in a thread that waits at its rounds, and whole searches by Ray Tune."""

from __future__ import annotations

import gc
import json
import logging
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import tiny
import torch
from servers import S3Server, s3_server  # noqa: F401 - a fixture

from dreamfleet.datasets.errors import ModelError
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.driver.session import RaySession, ray_session
from dreamfleet.trainers.launch import fit
from dreamfleet.trainers.recipe import Recipe, build_recipe, load_recipe
from dreamfleet.tune.search import search
from dreamfleet.tune.trial import STOPPED, Shared, TrialRun
from dreamfleet.tune.trial_store import Trial

GOOD, BAD, HOPELESS = 1e-3, 5.0, 1e38  # learning rates; the last one's loss is soon no number


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("search")
    tiny.make_images(folder / "holdout", 2, seed=5)
    return folder


def make_tree(folder: Path, output_dir: str, rates: list[float], **section: Any) -> dict[str, Any]:
    space = {
        "optimizer.learning_rate": {"distribution": "choice", "values": rates},
        "method.num_vectors": {"distribution": "choice", "values": [1, 2]},
    }
    tree = tiny.make_recipe(
        folder,
        output_dir=output_dir,
        method={"name": "textual_inversion", "placeholder_token": "<x>", "initializer_token": "cat"},
        data__instance_prompt=None,
        data__class_prompt=None,
        train__max_train_steps=40,
        train__checkpointing_steps=10,
        validation={
            "holdout": str(folder / "holdout"),
            "holdout_timesteps": 2,
            "steps": 10,
            "prompts": ["a <x>"],
            "num_images": 1,
            "num_inference_steps": 2,
        },
        scaling={"num_workers": 1, "use_gpu": False},
    )
    search = {
        "algorithm": "grid",
        "reduction_factor": 2,
        "max_concurrent_trials": 2,
        "space": space,
        **section,
    }
    return {**tree, "search": search}


def make_recipe(folder: Path, name: str, rates: list[float], **section: Any) -> Recipe:
    return build_recipe(make_tree(folder, str(folder / name), rates, **section))


# ---- one trial, without Ray -----------------------------------------------------------------------------------------


def make_trial(folder: Path, name: str, rate: float = GOOD, last_step: int = -1) -> tuple[TrialRun, Storage]:
    recipe = make_recipe(folder, name, [rate])
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


def test_a_trial_tells_its_rounds_and_ends_as_a_whole_run(folder: Path) -> None:
    trial, run = make_trial(folder, "whole")
    rounds = [trial.next_round() for _ in range(5)]
    assert [told["step"] for told in rounds] == [0, 10, 20, 30, 40]
    assert [told.get("exit_reason") for told in rounds] == [None] * 4 + ["completed"] and rounds[-1]["done"]
    trial.stop()
    summary = json.loads(run.read_text("summary.json"))
    assert summary["exit_reason"] == "completed" and summary["exports"]
    recipe = load_recipe(run.path("recipe.yaml"))
    assert recipe.method.num_vectors == 2 and recipe.scaling.num_workers == 0 and recipe.search is None


def test_a_stopped_trial_leaves_a_valid_folder_and_can_go_on(folder: Path) -> None:
    trial, run = make_trial(folder, "stopped")
    assert [trial.next_round()["step"] for _ in range(2)] == [0, 10]
    trial.stop()
    summary = json.loads(run.read_text("summary.json"))
    assert summary["exit_reason"] == STOPPED and STOPPED in run.read_text("report.html")
    assert run.list_dirs("checkpoints") and run.exists("samples/step-000010.png")
    again, _ = make_trial(folder, "stopped", last_step=10)
    rounds = [again.next_round() for _ in range(3)]
    assert [told["step"] for told in rounds] == [20, 30, 40]
    assert json.loads(run.read_text("summary.json"))["start_step"] == 11
    straight, _ = make_trial(folder, "straight")
    expected = [straight.next_round()["holdout_loss"] for _ in range(5)][2:]
    assert [told["holdout_loss"] for told in rounds] == expected


def test_a_trial_that_fails_tells_why(folder: Path) -> None:
    trial, run = make_trial(folder, "failing", HOPELESS)
    assert trial.next_round()["step"] == 0
    told = trial.next_round()
    assert told["done"] and told["kind"] == "RunFailed" and "number" in told["error"]
    assert "number" in run.read_text("run.log")
    trial.stop()


def state_of_torch() -> dict[str, Any]:
    """Return what a run could leave behind in its process for the next one."""
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
    """Return every weight of this process by its id; of the tests before this one as well."""
    gc.collect()
    return {id(thing): thing for thing in gc.get_objects() if issubclass(type(thing), torch.nn.Parameter)}


def test_a_failed_trial_leaves_nothing_for_the_next_one(folder: Path) -> None:
    """Actors run one trial after the other: a failed one changes neither torch nor the result of the next."""
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
def test_a_trial_without_memory_is_told_as_such(
    folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def run_worker(*given: Any, **options: Any) -> Any:
        raise error

    monkeypatch.setattr("dreamfleet.trainers.run.run.run_worker", run_worker)
    trial, _ = make_trial(folder, f"no-memory-{type(error).__name__}")
    told = trial.next_round()
    assert told["kind"] == "ResourceError" and told["done"] and "memory" in told["error"]


# ---- whole searches -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def local_ray() -> Iterator[RaySession]:
    """One private Ray for the tests of this file."""
    with ray_session(preload=("ray.tune",)) as session:
        yield session


def interrupt_after(count: int) -> Callable[[Trial], None]:
    """Send this process what Ctrl-C sends, once so many trials are over."""
    over: set[str] = set()
    sent: list[bool] = []

    def look(trial: Trial) -> None:
        if trial.is_over:
            over.add(trial.name)
        if len(over) >= count and not sent:
            sent.append(True)
            os.kill(os.getpid(), signal.SIGINT)

    return look


@pytest.mark.cluster
def test_a_search_interrupted_and_continued(folder: Path, local_ray: RaySession) -> None:
    """Good points, then bad ones that the scheduler stops, then hopeless ones that fail."""
    recipe = make_recipe(folder, "searched", [GOOD, BAD, HOPELESS])
    first = search(recipe, on_progress=interrupt_after(1))
    assert first.exit_reason == "interrupted" and first.best is not None
    before = {trial.name: trial for trial in first.trials if trial.is_over}
    assert 1 <= len(before) < 6
    assert not Storage(first.folder).exists("STOP")

    seen: list[str] = []
    result = search(recipe, resume=True, on_progress=lambda trial: seen.append(trial.name))
    assert result.exit_reason == "completed"
    assert not before.keys() & set(seen), "a finished trial ran again"
    trials = {trial.name: trial for trial in result.trials}
    assert all(trials[name] == trial for name, trial in before.items())
    by_rate = {
        rate: [t for t in trials.values() if t.point["optimizer.learning_rate"] == rate]
        for rate in (GOOD, BAD, HOPELESS)
    }
    assert {trial.status for trial in by_rate[GOOD]} <= {"completed", "stopped"}
    assert {trial.status for trial in by_rate[BAD]} == {"stopped"}
    assert {trial.status for trial in by_rate[HOPELESS]} == {"failed"}
    assert all("number" in str(trial.error) for trial in by_rate[HOPELESS])
    assert result.best is not None and result.best.point["optimizer.learning_rate"] == GOOD

    rows = pyarrow.parquet.read_table(result.table).to_pylist()
    assert len(rows) == 6 and all(Path(row["run_folder"], "metrics.jsonl").exists() for row in rows)
    for trial in (*by_rate[GOOD], *by_rate[BAD]):
        run = Storage(result.folder).child(trial.folder)
        assert json.loads(run.read_text("summary.json"))["steps"] >= trial.steps > 0
        assert run.exists("report.html") and run.list_dirs("checkpoints")
    assert Path(result.report).read_text().count("<img") >= 4

    assert result.best_recipe is not None
    best = load_recipe(result.best_recipe)
    assert (
        best.scaling.num_workers == 1 and best.method.num_vectors == result.best.point["method.num_vectors"]
    )
    again = fit(result.best_recipe, overrides=["scaling.num_workers=0"], on_progress=lambda line: None)
    assert again.summary.figures["holdout_loss"] == result.best.figure("holdout_loss")


@pytest.mark.cluster
def test_a_mistake_common_to_all_trials_is_told_once(folder: Path, local_ray: RaySession) -> None:
    """The model's folder holds none, which shows in the trials only."""
    (folder / "broken").mkdir()
    tree = make_tree(folder, str(folder / "mistaken"), [GOOD, BAD])
    tree["model"]["pretrained_model_name_or_path"] = str(folder / "broken")
    with pytest.raises(ModelError, match="broken"):
        search(build_recipe(tree))
    assert not (folder / "mistaken").exists(), "what never began leaves nothing behind"


@pytest.mark.cluster
@pytest.mark.s3
def test_a_search_into_a_bucket_is_continued_from_there(
    folder: Path,
    local_ray: RaySession,
    s3_server: S3Server,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    s3_server.set_environment(monkeypatch)
    address = s3_server.new_folder() + "/search"
    first = search(build_recipe(make_tree(folder, address, [GOOD], num_trials=1)))
    second = search(build_recipe(make_tree(folder, address, [GOOD], num_trials=2)), resume=True)
    assert first.trials[0] in second.trials and len(second.trials) == 2
    bucket = Storage(address)
    assert all(bucket.exists(name) for name in ("best.yaml", "trials.parquet", "report.html"))
    assert bucket.exists("trials/trial-001/summary.json")
    assert second.best_recipe is not None
    assert load_recipe(second.best_recipe).output_dir == f"{address}/best", (
        "the report says to train it as it is"
    )
