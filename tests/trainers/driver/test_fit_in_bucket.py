"""Test of DreamBooth with images and run folder in a bucket: streaming, checkpoints, resume and exports."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import tiny
from servers import S3Server, s3_server  # noqa: F401 - a fixture

from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.artifacts.loading import load_exported
from dreamfleet.trainers.launch import fit
from dreamfleet.trainers.recipe import Recipe, build_recipe
from dreamfleet.trainers.report.metrics_log import read_metrics
from dreamfleet.trainers.run.checkpoint import Checkpoints

pytestmark = [pytest.mark.cluster, pytest.mark.s3, pytest.mark.timeout(600)]
STEPS, HALF = 6, 3


def make_recipe(local: Path, root: str, **changes: Any) -> Recipe:
    """Return a DreamBooth recipe with prior preservation; images, class images and run are under ``root``."""
    options: dict[str, Any] = {
        "method": {"name": "dreambooth", "with_prior_preservation": True, "num_class_images": 4},
        "method__prior_generation_steps": 2,
        "data__instance_data_dir": f"{root}/pictures",
        "data__class_data_dir": f"{root}/class",
        "data__random_flip": True,
        "train__checkpointing_steps": HALF,
        "output_dir": f"{root}/run",
        "validation": {"prompts": ["a photo of sks cat"], "num_images": 1, "num_inference_steps": 2},
        **changes,
    }
    return build_recipe(tiny.make_recipe(local, **options))


def losses(run: str) -> list[float]:
    return [line["loss"] for line in read_metrics(Storage(run)) if "loss" in line]


def test_a_run_reads_from_and_writes_to_a_bucket(
    tmp_path: Path,
    s3_server: S3Server,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    s3_server.set_environment(monkeypatch)
    began = time.time()
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    local, root = tmp_path / "local", s3_server.new_folder()
    bucket = Storage(root)
    for image in sorted(tiny.make_images(local / "pictures", 6).iterdir()):
        bucket.write_bytes(f"pictures/{image.name}", image.read_bytes())
    bucket.write_bytes("pictures/cut-short.png", (local / "pictures/000.png").read_bytes()[:200])

    streamed = {"data__source": "stream", "scaling__num_workers": 1}
    first = fit(make_recipe(local, root, train__max_train_steps=HALF, **streamed))
    assert Checkpoints(bucket.child("run")).steps() == [HALF]
    whole = fit(make_recipe(local, root, train__max_train_steps=STEPS, **streamed), resume=True)
    assert (first.summary.steps, whole.summary.start_step, whole.summary.steps) == (HALF, HALF, STEPS)

    assert [Path(bad["uri"]).name for bad in whole.summary.bad_files] == ["cut-short.png"]
    resident = make_recipe(local, str(local), train__max_train_steps=STEPS, data__source="resident")
    assert losses(f"{root}/run") == pytest.approx(losses(fit(resident).run_folder), rel=1e-4)
    exported = load_exported(bucket.child("run"), make_recipe(local, root))
    assert exported.unet.dtype.is_floating_point
    for name in ("report.html", "summary.json", "exports/run.safetensors", f"samples/step-{STEPS:06d}.png"):
        assert bucket.exists(f"run/{name}"), name
    assert list(empty.iterdir()) == []
    secret = s3_server.environment()["AWS_SECRET_ACCESS_KEY"].encode()
    written = [file for file in Path("/tmp/ray").glob("session_2*/logs/**/*") if file.stat().st_mtime > began]
    assert written and not [file for file in written if file.is_file() and secret in file.read_bytes()]
