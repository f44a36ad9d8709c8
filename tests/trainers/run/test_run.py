"""Tests of a whole run: the files in its folder, on disk and in a bucket, its dry run and its exports."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import time
from pathlib import Path

import pytest
import tiny
import yaml
from servers import S3Server, s3_server  # noqa: F401  (a fixture)

from dreamfleet.datasets.errors import CheckpointError, RecipeError, RunFailed, UserError
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.launch import fit
from dreamfleet.trainers.recipe import build_recipe
from dreamfleet.trainers.report.metrics_log import MetricsLog, read_metrics
from dreamfleet.trainers.run.dry_run import check_run
from dreamfleet.trainers.run.export import export_run
from dreamfleet.trainers.run.run import run_worker
from dreamfleet.trainers.run.run_folder import is_used
from dreamfleet.trainers.run.versions import git_commit

FILES = {
    "recipe.yaml",
    "metrics.jsonl",
    "summary.json",
    "report.html",
    "checkpoints/step-000004/manifest.json",
    "samples/step-000000.png",
    "samples/step-000004.jsonl",
    "samples/real.png",
    "exports/run.safetensors",
    "exports/diffusers/model_index.json",
}


def whole_recipe(folder: Path, **changes: object) -> dict:
    holdout = folder / "holdout"
    if not holdout.exists():
        tiny.make_images(holdout, 2, seed=5)
    validation = {
        "prompts": ["a sks cat"],
        "num_images": 2,
        "num_inference_steps": 2,
        "steps": 2,
        "holdout": str(holdout),
    }
    return tiny.make_recipe(folder, report_to=["tensorboard"], **{"validation": validation, **changes})


def test_a_run_writes_the_documented_folder(tmp_path: Path) -> None:
    summary = run_worker(build_recipe(whole_recipe(tmp_path)))
    run = tmp_path / "run"
    there = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    assert there >= FILES and any(name.startswith("tensorboard/") for name in there)
    assert json.loads((run / "summary.json").read_text()) == dataclasses.asdict(summary)
    assert build_recipe(yaml.safe_load((run / "recipe.yaml").read_text())).run_name == "run"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "holdout_loss" in line] == [0, 2, 4]
    timed = [line for line in lines if "loss" in line]
    assert {"lr", "images_per_second", "data_wait_fraction", "peak_memory_bytes", "step_seconds"} <= timed[
        0
    ].keys()
    cells = [json.loads(line) for line in (run / "samples/step-000004.jsonl").read_text().splitlines()]
    assert [(cell["prompt"], cell["seed"]) for cell in cells] == [("a sks cat", 0), ("a sks cat", 1)]
    assert summary.images_seen == 8 and summary.figures["holdout_loss"] > 0


def test_a_checkout_records_its_commit_and_another_folder_none(tmp_path: Path) -> None:
    checkout, inside = tmp_path / "checkout", tmp_path / "checkout" / "lib"
    inside.mkdir(parents=True)
    git = ["git", "-C", str(checkout), "-c", "user.name=x", "-c", "user.email=x@example.org"]
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "x"]):
        subprocess.run([*git, *words], check=True)
    (checkout / "file").write_text("1")
    subprocess.run([*git, "add", "file"], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout
    assert git_commit(checkout) == f"{commit[:12]}-dirty"
    assert git_commit(inside) == git_commit(tmp_path) == ""


def test_an_unknown_export_format_is_reported_before_training(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="'nope'"):
        run_worker(build_recipe(whole_recipe(tmp_path, train__export_formats=["safetensors", "nope"])))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_scores_without_previews_cause_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tree = tiny.make_recipe(tmp_path, train__max_train_steps=1, validation={"metrics": ["loss", "clip_i"]})
    run_worker(build_recipe(tree))
    assert "no clip_i" in caplog.text and "no loss" not in caplog.text


def test_artifacts_contain_their_recipe_without_local_paths(tmp_path: Path) -> None:
    run_worker(build_recipe(whole_recipe(tmp_path)))
    from safetensors import safe_open

    with safe_open(tmp_path / "run/exports/run.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["dreamfleet_method"] == "dreambooth" and metadata["dreamfleet_step"] == "4"
    assert json.loads(metadata["dreamfleet_recipe"])["train"]["max_train_steps"] == 4
    assert len(metadata["dreamfleet_dataset_hash"]) == 64 and metadata["dreamfleet_base_model_hash"]
    assert str(tmp_path) not in json.dumps(metadata)


def test_class_images_are_generated_once_and_reused(tmp_path: Path) -> None:
    method = {
        "name": "dreambooth",
        "with_prior_preservation": True,
        "num_class_images": 3,
        "prior_generation_steps": 2,
    }
    run_worker(build_recipe(whole_recipe(tmp_path, method=method)))
    made = sorted((tmp_path / "class-images").glob("*/*.png"))
    assert len(made) == 3
    before = {path: path.stat().st_mtime_ns for path in made}
    run_worker(build_recipe(whole_recipe(tmp_path, method=method, output_dir=str(tmp_path / "again"))))
    assert {
        path: path.stat().st_mtime_ns for path in sorted((tmp_path / "class-images").glob("*/*.png"))
    } == before
    more = {**method, "prior_generation_steps": 3}
    run_worker(build_recipe(whole_recipe(tmp_path, method=more, output_dir=str(tmp_path / "other"))))
    assert len(list((tmp_path / "class-images").glob("*/*.png"))) == 6


def test_export_writes_any_checkpoint_in_any_format(tmp_path: Path) -> None:
    run_worker(build_recipe(whole_recipe(tmp_path, train__checkpointing_steps=2)))
    run = tmp_path / "run"
    (written,) = export_run(str(run), ["ckpt"])
    assert written == str(run / "exports/run.ckpt")
    (early,) = export_run(str(run / "checkpoints/step-000002"), ["safetensors"], str(tmp_path / "out"))
    late = run / "exports/run.safetensors"
    assert Path(early).stat().st_size > 1e5 and Path(early).read_bytes() != late.read_bytes()
    with pytest.raises(RecipeError, match="'pt'"):
        export_run(str(run), ["pt"])
    with pytest.raises(RecipeError, match="not a run folder"):
        export_run(str(tmp_path), ["ckpt"])
    with pytest.raises(CheckpointError, match="step-000003"):
        export_run(str(run / "checkpoints/step-000003"), ["ckpt"])


def test_check_runs_every_stage_and_leaves_no_files(tmp_path: Path) -> None:
    good = check_run(build_recipe(whole_recipe(tmp_path)))
    names = [line.name for line in good]
    assert names == ["output_dir", "pictures", "report_to", "holdout", "model", "disk", "step", "export"]
    assert all(line.ok for line in good), good
    assert not (tmp_path / "run").exists()
    bad = check_run(build_recipe(whole_recipe(tmp_path, data__instance_data_dir=str(tmp_path / "none"))))
    assert not {line.name: line.ok for line in bad}["pictures"]


class BucketOfAppends(Storage):
    """A bucket that records the texts appended to it."""

    is_local = False

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.appended: list[str] = []

    def write_text(self, rel: str, text: str) -> None:
        assert (rel, text) == ("metrics.jsonl", "")

    def append_text(self, rel: str, text: str) -> None:
        self.appended.append(text)


def test_a_bucket_gets_training_metrics_in_batches_and_validation_at_once(tmp_path: Path) -> None:
    """Test that writes are batched: a bucket has no append, so every write uploads all lines again."""
    bucket = BucketOfAppends(tmp_path)
    metrics = MetricsLog(bucket)
    for step in range(1, 51):
        metrics.log({"step": step, "loss": 0.5})
    assert bucket.appended == []
    metrics.log({"step": 50, "holdout_loss": 0.4})
    assert [text.count("\n") for text in bucket.appended] == [51]
    metrics.log({"step": 51, "loss": 0.5})
    metrics.flush()
    assert bucket.appended[1:] == ['{"step": 51, "loss": 0.5}\n']


@pytest.mark.s3
def test_an_early_error_leaves_no_files_in_the_bucket(
    tmp_path: Path,
    s3_server: S3Server,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Test that a failed start leaves no files, so that the next start does not find a folder in use."""
    s3_server.set_environment(monkeypatch)
    output = s3_server.new_folder() + "/run"
    (tmp_path / "file").write_text("no folder")
    prior = {"name": "dreambooth", "with_prior_preservation": True}
    changes = {"output_dir": output, "data__class_data_dir": str(tmp_path / "file"), "method": prior}
    wrong = build_recipe(whole_recipe(tmp_path, **changes))
    (tmp_path / "pictures/torn.png").write_bytes(b"torn")  # reported in the run's log
    for _ in range(2):
        with pytest.raises(UserError, match=str(tmp_path / "file")):
            fit(wrong)
        assert Storage(output).list(recursive=True) == []
    Storage(output).write_text("run.log", "of a process that was killed")
    assert not is_used(Storage(output))


@pytest.mark.s3
def test_the_measurements_of_a_failed_run_are_in_the_bucket(
    tmp_path: Path,
    s3_server: S3Server,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    s3_server.set_environment(monkeypatch)
    changes = {"optimizer": {"learning_rate": 1e30, "max_grad_norm": 0}, "output_dir": s3_server.new_folder()}
    with pytest.raises(RunFailed, match="number"):
        run_worker(build_recipe(tiny.make_recipe(tmp_path, **changes)))
    assert [line["step"] for line in read_metrics(Storage(changes["output_dir"]))] == [1]


@pytest.mark.s3
def test_a_run_in_a_bucket_is_resumed_from_it(
    tmp_path: Path,
    s3_server: S3Server,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    s3_server.set_environment(monkeypatch)
    folder = s3_server.new_folder()
    images = Storage(f"{folder}/pictures")
    images.upload(tiny.make_images(tmp_path / "pictures", 6))
    changes = {"data__instance_data_dir": images.url, "train__checkpointing_steps": 2}
    polls = iter(range(99))
    tree = whole_recipe(tmp_path, output_dir=f"{folder}/run", **changes)
    first = run_worker(build_recipe(tree), should_stop=lambda: next(polls) >= 1)
    assert first.exit_reason == "interrupted"
    second = run_worker(build_recipe(tree), resume=True)
    assert (second.start_step, second.exit_reason) == (first.steps, "completed")
    run = Storage(f"{folder}/run")
    first_manifest, manifest = (
        f"checkpoints/step-000004/{name}.json" for name in ("manifest", "manifest.attempt-0002")
    )
    there = set(run.list("", recursive=True))
    assert there >= FILES - {first_manifest} | {manifest} and first_manifest not in there
    local = run_worker(build_recipe(whole_recipe(tmp_path, **changes)))
    assert local.figures["loss"] == pytest.approx(second.figures["loss"], rel=1e-6)
    secret = s3_server.environment()["AWS_SECRET_ACCESS_KEY"]
    for name in ("recipe.yaml", "report.html", "summary.json", "metrics.jsonl"):
        assert secret not in run.read_text(name)


def test_seconds_are_measured_per_process_and_summed_over_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Test with a system clock that jumps: it may be minutes off, or be set during the run."""
    clock = iter(range(10**9, 0, -1000))
    monkeypatch.setattr(time, "time", lambda: float(next(clock)))
    recipe = build_recipe(tiny.make_recipe(tmp_path))
    first = run_worker(recipe, should_stop=tiny.Stop(1), waited=100.0)
    assert 100 < first.start_up_seconds < 160 and 0 < first.train_seconds < 60
    checkpoint = next((tmp_path / "run" / "checkpoints").iterdir())
    saved = json.loads((checkpoint / "meta.json").read_text())["seconds"]  # at the start of the save
    second = run_worker(recipe, resume=True, waited=30.0)
    assert saved["start_up"] == first.start_up_seconds and saved["train"] <= first.train_seconds
    assert 30 < second.start_up_seconds - saved["start_up"] < 90
    assert 0 < second.train_seconds - saved["train"] < 60
    for summary in (first, second):
        assert 0 <= summary.wall_seconds - summary.start_up_seconds - summary.train_seconds < 60
    written = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert written["wall_seconds"] == second.wall_seconds > 130
