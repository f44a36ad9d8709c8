"""Tests of runs on a local Ray: numbers of workers, killed workers, errors, Ctrl-C, and a run in a bucket."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from ray_processes import worker_processes
from servers import S3Server, s3_server  # noqa: F401 - a fixture

from dreamfleet.datasets.errors import DataError, RecipeError, ResourceError, RunFailed
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.driver.session import RaySession, ray_session
from dreamfleet.trainers.launch import fit
from dreamfleet.trainers.recipe import Recipe, build_recipe
from dreamfleet.trainers.report.events import read_events
from dreamfleet.trainers.report.metrics_log import read_metrics
from dreamfleet.trainers.run.checkpoint import Checkpoints

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]
STEPS = 60


@pytest.fixture(scope="module")
def local_ray() -> Iterator[RaySession]:
    """Start one private Ray for all tests of this file, as starting it takes as long as a test."""
    with ray_session(preload=("ray.train.torch",)) as session:
        yield session


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cluster")


def make_recipe(folder: Path, run: str, **changes: Any) -> Recipe:
    options = {
        "output_dir": str(folder / run),
        "train__max_train_steps": STEPS,
        "train__train_batch_size": 1,
        "train__checkpointing_steps": 5,
        "optimizer__learning_rate": 1e-4,
        "scaling__num_workers": 2,
        "scaling__max_failures": 1,
        **changes,
    }
    return build_recipe(tiny.make_recipe(folder, **options))


def losses(run: str) -> list[float]:
    lines = read_metrics(Storage(run))
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    return [line["loss"] for line in lines]


def final_weights(run: str) -> dict[str, torch.Tensor]:
    found = Checkpoints(Storage(run)).load_latest()
    assert found is not None
    assert found.step == STEPS
    return found.learned


@pytest.fixture(scope="module")
def straight(folder: Path, local_ray: RaySession) -> str:
    """Return the folder of an uninterrupted run of two workers."""
    result = fit(make_recipe(folder, "straight"))
    assert result.summary.exit_reason == "completed"
    assert result.summary.workers == 2
    return result.run_folder


def test_two_workers_equal_one(folder: Path, straight: str) -> None:
    recipe = make_recipe(folder, "alone", scaling__num_workers=0, train__train_batch_size=2)
    alone = fit(recipe).run_folder
    assert losses(alone) == pytest.approx(losses(straight), rel=1e-4)
    torch.testing.assert_close(final_weights(alone), final_weights(straight), rtol=1e-3, atol=1e-4)


def test_a_killed_worker_does_not_change_results(folder: Path, straight: str) -> None:
    killed: list[int] = []

    def kill_one(line: dict[str, Any]) -> None:
        if line["step"] >= 12 and not killed:
            killed.append(worker_processes()[-1])
            os.kill(killed[0], signal.SIGKILL)

    result = fit(make_recipe(folder, "killed"), on_progress=kill_one)
    assert killed, "the run ended before a worker could be killed"
    assert result.summary.start_step == 0, "the survivor was restarted from a checkpoint"
    regroups = [event for event in read_events(Storage(result.run_folder)) if event["kind"] == "regroup"]
    assert len(regroups[0]["lost"]) == 1 and regroups[0]["world"] == 1 and regroups[0]["step"] >= 12
    assert losses(result.run_folder) == pytest.approx(losses(straight), rel=0.2)
    expected, found = final_weights(straight), final_weights(result.run_folder)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_worker_that_fails_repeatedly_fails_the_run(folder: Path, local_ray: RaySession) -> None:
    def kill_each(line: dict[str, Any]) -> None:
        for process in worker_processes():
            os.kill(process, signal.SIGKILL)

    recipe = make_recipe(
        folder, "dying", scaling__num_workers=1, train__max_train_steps=5000, scaling__max_failures=0
    )
    with pytest.raises(RunFailed, match=r"failed .*--resume"):
        fit(recipe, on_progress=kill_each)


def test_a_user_error_in_a_worker_ends_the_run_without_retries(folder: Path, local_ray: RaySession) -> None:
    recipe = make_recipe(
        folder, "mistaken", validation={"holdout": str(folder / "nowhere")}, scaling__max_failures=3
    )
    with pytest.raises(DataError, match="nowhere"):
        fit(recipe)


def test_resources_that_the_cluster_lacks_are_refused_at_once(folder: Path, local_ray: RaySession) -> None:
    began = time.monotonic()
    recipe = make_recipe(
        folder, "too-large", scaling__num_workers=3, scaling__resources_per_worker={"CPU": 1000}
    )
    with pytest.raises(ResourceError, match=r"3 with 1000 CPU"):
        fit(recipe)
    assert time.monotonic() - began < 10
    assert not (folder / "too-large").exists()


def test_ctrl_c_saves_and_ends_with_130(folder: Path) -> None:
    """Test with a signal to the whole process group, Ray's processes included, as a terminal sends it."""
    out = folder / "stopped"
    endless = {"train__max_train_steps": 100_000, "train__checkpointing_steps": 100_000}
    tree = tiny.make_recipe(folder, output_dir=str(out), scaling__num_workers=1, **endless)
    recipe = tiny.write_recipe(folder / "stopped.yaml", tree)
    process = subprocess.Popen(
        [sys.executable, "-m", "dreamfleet.cluster.cli", "train", str(recipe), "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    metrics = out / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 3:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 130, stderr
    result = json.loads(stdout)
    assert result["exit_reason"] == "interrupted"
    step = result["summary"]["steps"]
    assert (out / "checkpoints" / f"step-{step:06d}" / "manifest.json").exists()


@pytest.mark.s3
def test_a_run_into_a_bucket(
    folder: Path,
    local_ray: RaySession,
    s3_server: S3Server,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Test that workers get the run's credentials, although Ray was started before these were set."""
    s3_server.set_environment(monkeypatch)
    seen: list[int] = []
    changes = {"output_dir": s3_server.new_folder() + "/run", "scaling__num_workers": 1}
    result = fit(make_recipe(folder, "bucket", **changes), on_progress=lambda line: seen.append(line["step"]))
    assert seen[-1] == STEPS
    run = Storage(result.run_folder)
    assert run.exists("report.html")
    assert losses(result.run_folder)
    assert Checkpoints(run).steps()[-1] == STEPS
    with pytest.raises(RecipeError, match="--resume"):
        fit(make_recipe(folder, "bucket", **changes))
