"""Checkpoints without optimizer state: smaller, exportable, refused for a resume; and runs without exports."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from small_runs import recipe_tree

from dreamfleet.datasets.errors import CheckpointError, StorageError
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.recipe import build_recipe
from dreamfleet.trainers.run.checkpoint import Checkpoints
from dreamfleet.trainers.run.export import export_run
from dreamfleet.trainers.run.run import run_worker


def hashes(files: list[str]) -> dict[str, str]:
    return {Path(file).name: hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in files}


@pytest.mark.parametrize("use_ema", [False, True])
def test_a_checkpoint_without_optimizer_state_exports_the_same_files(tmp_path: Path, use_ema: bool) -> None:
    tree = recipe_tree(tmp_path, "run", engine={"use_ema": use_ema})
    run_worker(build_recipe(tree))
    run = Storage(tree["output_dir"])
    checkpoints = Checkpoints(run)
    step = checkpoints.steps()[-1]
    wanted = hashes(export_run(run.path(), ["safetensors"], out=str(tmp_path / "before")))
    before = run.size(f"checkpoints/step-{step:06d}")
    checkpoints.drop_optimizer(step, has_ema=use_ema)
    assert hashes(export_run(run.path(), ["safetensors"], out=str(tmp_path / "after"))) == wanted
    after = run.size(f"checkpoints/step-{step:06d}")
    assert after < (0.55 if use_ema else 0.4) * before  # Adam keeps two tensors a weight
    files = run.list(f"checkpoints/step-{step:06d}")
    checkpoints.drop_optimizer(step)
    assert run.list(f"checkpoints/step-{step:06d}") == files


def test_a_checkpoint_without_optimizer_state_is_refused_for_a_resume(tmp_path: Path) -> None:
    tree = recipe_tree(
        tmp_path, "run", method={"name": "textual_inversion", "placeholder_token": "<x>", "num_vectors": 2}
    )
    run_worker(build_recipe(tree))
    checkpoints = Checkpoints(Storage(tree["output_dir"]))
    for step in checkpoints.steps():
        checkpoints.drop_optimizer(step)
    with pytest.raises(CheckpointError, match=r"cannot be continued: its optimizer state .* best\.yaml"):
        run_worker(build_recipe(tree), resume=True)
    with pytest.raises(CheckpointError, match="cannot be exported as 'optim'"):
        export_run(tree["output_dir"], ["optim"])


@pytest.mark.parametrize("failing", ["manifest.json", "engine.pt"])
def test_an_interrupted_drop_leaves_a_valid_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    tree = recipe_tree(tmp_path, "run", engine={"use_ema": True})
    run_worker(build_recipe(tree))
    checkpoints = Checkpoints(Storage(tree["output_dir"]))
    step = checkpoints.steps()[-1]

    def fail(self: Storage, rel: str, *rest: Any) -> None:
        if rel.endswith(failing):
            raise StorageError("the process was killed here")
        original(self, rel, *rest)

    name = "write_text" if failing == "manifest.json" else "remove"
    original = getattr(Storage, name)
    monkeypatch.setattr(Storage, name, fail)
    with pytest.raises(StorageError):
        checkpoints.drop_optimizer(step)
    monkeypatch.undo()
    assert checkpoints.load(step).resumable == (failing == "manifest.json")
    assert "ema" in checkpoints.load(step).engine
    checkpoints.drop_optimizer(step)
    assert not checkpoints.load(step).resumable
    assert not checkpoints.storage.exists(f"step-{step:06d}/engine.pt")


def test_a_run_without_exports_has_none(tmp_path: Path) -> None:
    tree = recipe_tree(tmp_path, "run", train__export=False)
    summary = run_worker(build_recipe(tree))
    run = Storage(tree["output_dir"])
    assert summary.exit_reason == "completed" and summary.exports == []
    assert not run.exists("exports") and json.loads(run.read_text("summary.json"))["exports"] == []
    assert export_run(run.path(), ["safetensors"])
