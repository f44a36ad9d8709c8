"""Test complete runs of optimizers that average their weights or find their own rate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import tiny
import torch

from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.recipe import build_recipe
from dreamfleet.trainers.run.checkpoint import Checkpoints
from dreamfleet.trainers.run.export import export_run
from dreamfleet.trainers.run.round_worker import RoundWorker
from dreamfleet.trainers.run.run import run_worker

STEPS = 4


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("free")
    tiny.make_images(folder / "held", 2, seed=5)
    recipe = tiny.make_recipe(
        folder,
        optimizer={"name": "prodigy_schedulefree", "learning_rate": 1.0, "options": {"d0": 1e-3}},
        train__max_train_steps=STEPS,
        train__checkpointing_steps=2,
        validation={"holdout": str(folder / "held"), "steps": 2, "holdout_timesteps": 2, "metrics": ["loss"]},
    )
    run_worker(build_recipe(recipe))
    return recipe, folder / "run"


def lines_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_logs_and_report_have_the_effective_rate(run: tuple[dict[str, Any], Path]) -> None:
    lines = [line for line in lines_of(run[1]) if "lr" in line]
    assert [line["lr"] for line in lines] == [{"unet": 1.0}] * STEPS
    rates = [line["effective_lr"]["unet"] for line in lines]
    assert rates[0] >= 1e-3 and rates == sorted(rates)
    group = Checkpoints(Storage(run[1])).load(STEPS).engine["optimizer"]["param_groups"][0]
    assert rates[-1] == pytest.approx(group["d"], rel=1e-5)
    assert "Effective learning rate" in (run[1] / "report.html").read_text()


def test_evaluation_and_exports_use_the_average(run: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    recipe, folder = run
    found = Checkpoints(Storage(folder)).load(STEPS)
    name, key = "unet.conv_out.weight", "model.diffusion_model.out.2.weight"
    assert not torch.equal(found.engine["ema"][name], found.learned[name])
    (file,) = (Path(file) for file in export_run(str(folder), ["safetensors"], str(tmp_path)))
    for exported in (file, folder / "exports" / file.name):
        assert torch.equal(safetensors.torch.load_file(exported)[key], found.engine["ema"][name])
    measured = RoundWorker(build_recipe(recipe))(STEPS).figures["holdout_loss"]
    assert measured == [line["holdout_loss"] for line in lines_of(folder) if "holdout_loss" in line][-1]


def test_a_checkpoint_without_its_optimizer_keeps_the_average(run: tuple[dict[str, Any], Path]) -> None:
    """Test what a search leaves of its best trials."""
    checkpoints = Checkpoints(Storage(run[1]))
    average = checkpoints.load(2).engine["ema"]
    checkpoints.drop_optimizer(2, has_ema=build_recipe(run[0]).keeps_average)
    left = checkpoints.load(2)
    assert not left.resumable
    assert all(torch.equal(value, left.engine["ema"][name]) for name, value in average.items())
