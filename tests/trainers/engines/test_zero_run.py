"""Test complete runs under DeepSpeed: from the command line, and on a local Ray with a killed worker."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import tiny
import torch
from ray_processes import worker_processes

from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.launch import fit
from dreamfleet.trainers.recipe import build_recipe
from dreamfleet.trainers.report.metrics_log import read_metrics
from dreamfleet.trainers.run.checkpoint import Checkpoints
from dreamfleet.trainers.run.run import run_worker

pytestmark = pytest.mark.timeout(1800)  # seconds; the first use compiles CPU Adam
STEPS = 40
DREAMBOOTH = {"name": "dreambooth", "train_text_encoder": True}


def make_tree(folder: Path, run: str, **changes: Any) -> dict[str, Any]:
    options = {
        "method": DREAMBOOTH,
        "output_dir": str(folder / run),
        "train__max_train_steps": STEPS,
        "train__checkpointing_steps": 5,
        "optimizer__learning_rate": 1e-4,
        **changes,
    }
    return tiny.make_recipe(folder, **options)


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(Storage(str(run))) if "loss" in line]


def exported(run: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(run / "exports" / f"{run.name}.safetensors")


def learned(run: Path) -> dict[str, torch.Tensor]:
    found = Checkpoints(Storage(str(run))).load_latest()
    assert found is not None
    return found.learned


@pytest.mark.slow
def test_stage_3_from_the_command_line(tmp_path: Path) -> None:
    """Test sharded weights, EMA, previews and a half-precision export; stdout contains only the summary."""
    tiny.make_images(tmp_path / "holdout", 2, seed=5)
    options = {
        "train__max_train_steps": 4,
        "train__save_precision": "fp16",
        "engine__use_ema": True,
        "validation": {
            "prompts": ["a photo of sks cat"],
            "num_images": 1,
            "num_inference_steps": 2,
            "steps": 2,
            "holdout": str(tmp_path / "holdout"),
        },
    }
    run_worker(build_recipe(make_tree(tmp_path, "torch", **options)))
    tree = make_tree(tmp_path, "zero", **options, engine__zero_stage=3)
    recipe = tiny.write_recipe(tmp_path / "zero.yaml", tree)
    command = [sys.executable, "-m", "dreamfleet.cluster.cli", "train", str(recipe), "--json"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert json.loads(ended.stdout)["exit_reason"] == "completed"
    ours, theirs = tmp_path / "zero", tmp_path / "torch"
    assert losses(ours) == pytest.approx(losses(theirs), rel=1e-5)
    measured = [
        [line["holdout_loss"] for line in read_metrics(Storage(str(run))) if "holdout_loss" in line]
        for run in (ours, theirs)
    ]
    assert len(measured[0]) == 3 and measured[0] == pytest.approx(measured[1], rel=1e-5)
    assert (ours / "samples" / "step-000004.png").is_file()
    found, expected = exported(ours), exported(theirs)
    assert any(value.dtype == torch.float16 for value in found.values())
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=1e-4)
    assert (ours / "exports" / "diffusers" / "unet" / "config.json").is_file()


@pytest.mark.cluster
def test_a_killed_worker_does_not_change_results_and_torch_resumes_the_run(tmp_path: Path) -> None:
    """Test stage 2 with optimizer states in host memory against one process under TorchEngine."""
    alone = make_tree(tmp_path, "alone", train__max_train_steps=STEPS + 3)
    run_worker(build_recipe({**alone, "train": {**alone["train"], "max_train_steps": STEPS}}))
    logged: list[int] = []  # the number of steps in the metrics just after a worker was killed

    def kill_one(line: dict[str, Any]) -> None:
        if line["step"] >= 12 and not logged and (workers := worker_processes()):
            os.kill(workers[-1], signal.SIGKILL)
            logged.append(len(losses(tmp_path / "sharded")))

    changes = {
        "engine": {"zero_stage": 2, "offload_optimizer_device": "cpu"},
        "train__train_batch_size": 1,
        "scaling": {"num_workers": 2, "max_failures": 1},
    }
    recipe = build_recipe(make_tree(tmp_path, "sharded", **changes))
    for _ in range(3):  # on a busy machine a run may end before the driver has read its steps
        logged.clear()
        shutil.rmtree(recipe.output_dir, ignore_errors=True)
        result = fit(recipe, on_progress=kill_one)
        if logged and logged[0] < STEPS:
            break
    assert logged and logged[0] < STEPS, "every run ended before a worker could be killed"
    assert result.summary.start_step >= 10, "the workers were not restarted from a checkpoint"
    sharded, plain = tmp_path / "sharded", tmp_path / "alone"
    assert losses(sharded) == pytest.approx(losses(plain), rel=1e-4)
    torch.testing.assert_close(learned(sharded), learned(plain), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(exported(sharded), exported(plain), rtol=1e-3, atol=1e-4)

    shutil.copytree(sharded, tmp_path / "on")
    run_worker(build_recipe(alone), resume=True)
    summary = run_worker(build_recipe({**alone, "output_dir": str(tmp_path / "on")}), resume=True)
    assert summary.start_step == STEPS and summary.workers == 1
    torch.testing.assert_close(learned(tmp_path / "on"), learned(plain), rtol=1e-3, atol=1e-4)
