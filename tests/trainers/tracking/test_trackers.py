"""Tests of trackers with the real clients of MLflow and W&B, offline: an interrupted run that is resumed."""

from __future__ import annotations

import json
import logging
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny

from dreamfleet.datasets.environment import is_secret
from dreamfleet.datasets.errors import RecipeError
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.config.tracking import TRACKERS
from dreamfleet.trainers.recipe import Recipe, build_recipe
from dreamfleet.trainers.report.metrics_log import read_metrics
from dreamfleet.trainers.run.run import run_worker
from dreamfleet.trainers.tracking.mlflow_tracker import MLflow
from dreamfleet.trainers.tracking.tracker import (
    TrackedRun,
    Tracker,
    check_trackers,
    open_trackers,
    variables_for,
)
from dreamfleet.tune.trial_store import trial_recipe

VALIDATION = {"prompts": ["a sks cat"], "num_images": 1, "num_inference_steps": 1, "steps": 2}
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning"
)  # of the clients' libraries


def make_recipe(folder: Path, **changes: Any) -> Recipe:
    options = {
        "train__checkpointing_steps": 2,
        "validation": VALIDATION,
        "tracking__project": "cats",
        **changes,
    }
    return build_recipe(tiny.make_recipe(folder, **options))


def interrupt_and_resume(recipe: Recipe) -> list[dict[str, Any]]:
    """Stop after step 3, forget the checkpoint of step 3 as a crash would, and complete; return the metrics."""
    stopped = run_worker(recipe, should_stop=tiny.Stop(2))
    assert (stopped.exit_reason, stopped.steps) == ("interrupted", 3)
    Storage(recipe.output_dir).remove("checkpoints/step-000003/manifest.json")
    summary = run_worker(recipe, resume=True)
    assert (summary.exit_reason, summary.start_step) == ("completed", 2)
    return read_metrics(Storage(recipe.output_dir))


def test_mlflow_has_each_step_of_a_resumed_run_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    recipe = make_recipe(tmp_path, report_to=["mlflow"])
    lines = interrupt_and_resume(recipe)
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("cats")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("run", "FINISHED")
    assert run.data.params["optimizer.learning_rate"] == "0.001"
    logged = {entry.step: entry.value for entry in client.get_metric_history(run.info.run_id, "loss")}
    assert len(client.get_metric_history(run.info.run_id, "loss")) == 4, "steps are not repeated"
    assert logged == {line["step"]: line["loss"] for line in lines if "loss" in line}
    assert [each.path for each in client.list_artifacts(run.info.run_id, "samples")] == [
        f"samples/step-{step:06d}.png" for step in (0, 2, 4)
    ]
    assert run.data.tags["dreamfleet.exports"].splitlines()[-1].startswith(f"{tmp_path}/run/exports/")


def test_wandb_continues_in_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    recipe = make_recipe(tmp_path, report_to=["wandb"], tracking__group="pets")
    lines = interrupt_and_resume(recipe)
    sessions = [read_wandb(file) for file in sorted((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))]
    run_id = json.loads((tmp_path / "run" / "tracking.json").read_text())["wandb"]
    first, second = sessions
    for session in sessions:
        assert (session["run"].run_id, session["run"].project) == (run_id, "cats")
        assert (session["run"].run_group, session["run"].display_name) == ("pets", "run")
    config = {update.key: update.value_json for update in first["run"].config.update}
    assert config["optimizer.learning_rate"] == "0.001"
    assert {row["_step"] for row in first["history"]} == {0, 1, 2, 3}
    assert {row["_step"] for row in second["history"]} == {3, 4}
    losses = {row["_step"]: row["loss"] for row in [*first["history"], *second["history"]] if "loss" in row}
    assert losses == pytest.approx({line["step"]: line["loss"] for line in lines if "loss" in line})
    assert any("samples" in str(row) for row in second["history"])
    assert list((tmp_path / "wandb").glob("offline-run-*/files/media/images/samples_4_*.png"))


def read_wandb(path: Path) -> dict[str, Any]:
    """Return the records of a file of W&B's client: its run, and its history as mappings."""
    from wandb.proto import wandb_internal_pb2

    found = dict[str, Any](history=[])
    for data in read_records(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found["run"] = record.run
        elif kind == "history":
            items = record.history.item
            row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
            found["history"].append({"_step": record.history.step.num, **row})
    return found


def read_records(content: bytes) -> Iterator[bytes]:
    """Yield the records of a log in LevelDB's format, after W&B's header: blocks of 32 KiB with parts of records."""
    block, header, last = 2**15, struct.Struct("<IHB"), (1, 4)
    assert content[:4] == b":W&B"
    at, record = 7, b""
    while at + header.size <= len(content):
        if block - at % block < header.size:  # the rest of a block is padding
            at += block - at % block
            continue
        _, length, kind = header.unpack_from(content, at)
        at += header.size
        record += content[at : at + length]
        at += length
        if kind in last:
            yield record
            record = b""


class Broken(Tracker):
    """A tracker whose server fails after its first line."""

    package = "no_such_package"
    lines = 0

    def log(self, line: Mapping[str, Any]) -> None:
        self.lines += 1
        if self.lines > 1:
            raise ConnectionError("server is down")


def test_a_tracker_that_fails_does_not_end_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("dreamfleet"), "propagate", True)
    TRACKERS.register("broken")(Broken)
    try:
        recipe = make_recipe(tmp_path, report_to=["broken", "tensorboard"])
        with pytest.raises(RecipeError, match="no_such_package"):
            check_trackers(recipe)
        assert run_worker(recipe).exit_reason == "completed"
    finally:
        TRACKERS.unregister("broken")
    assert caplog.text.count("server is down") == 1
    assert list((tmp_path / "run" / "tensorboard").glob("events*")), "the others continue"


def test_missing_packages_and_settings_are_errors_before_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    recipe = make_recipe(tmp_path, report_to=["wandb"])
    with pytest.raises(RecipeError, match="WANDB_API_KEY"):
        check_trackers(recipe)
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password hush\n")
    assert variables_for(recipe)["WANDB_API_KEY"] == "hush", "the key of `wandb login` is sent"
    check_trackers(recipe)
    with pytest.raises(RecipeError, match="MLFLOW_TRACKING_URI"):
        check_trackers(make_recipe(tmp_path, report_to=["mlflow"], output_dir="s3://bucket/run"))
    with pytest.raises(RecipeError, match="did you mean 'wandb'"):
        make_recipe(tmp_path, report_to=["wandbb"])
    monkeypatch.setattr(MLflow, "package", "no_such_package")
    with pytest.raises(RecipeError, match=r"pip install 'dreamfleet\[mlflow\]'"):
        check_trackers(make_recipe(tmp_path, report_to=["mlflow"]))
    assert is_secret("MLFLOW_TRACKING_TOKEN", "x") and is_secret("MLFLOW_TRACKING_PASSWORD", "x")


def test_an_unreachable_server_is_an_error_at_first_and_a_warning_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(logging.getLogger("dreamfleet"), "propagate", True)
    recipe = make_recipe(tmp_path, report_to=["mlflow"])
    folder = Storage(recipe.output_dir)
    with pytest.raises(RecipeError, match="mlflow cannot start"):
        open_trackers(TrackedRun(folder, recipe))
    open_trackers(TrackedRun(folder, recipe, start_step=2)).log({"step": 3, "loss": 1.0})
    assert "continues without it" in caplog.text


def test_trials_of_a_search_are_one_group_in_one_folder(tmp_path: Path) -> None:
    search = {
        "metric": "holdout_loss",
        "num_trials": 1,
        "space": {"optimizer.learning_rate": {"distribution": "loguniform", "lower": 1e-4, "upper": 1e-3}},
    }
    recipe = make_recipe(
        tmp_path, validation={**VALIDATION, "holdout": str(tmp_path / "pictures")}, search=search
    )
    trial = trial_recipe(recipe, {"optimizer.learning_rate": 1e-3}, f"{recipe.output_dir}/trials/trial-0001")
    assert (trial.tracking.project, trial.tracking.group) == ("cats", "run")
    assert trial.tracking.folder == str(tmp_path)
