"""Judge models that are missing or incomplete are reported before anything starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
from typer.testing import CliRunner

from dreamfleet.cluster.cli import program
from dreamfleet.datasets.errors import ModelError
from dreamfleet.trainers.config.validation import ValidationConfig
from dreamfleet.trainers.driver.preflight import check_inputs
from dreamfleet.trainers.models.vision.judge_files import check_judges
from dreamfleet.trainers.recipe import build_recipe
from dreamfleet.trainers.run.dry_run import check_run
from dreamfleet.tune.search import search


def section(**keys: Any) -> ValidationConfig:
    return ValidationConfig.model_validate({"prompts": ["a cat"], "metrics": ["fidelity"], **keys})


def write_model(folder: Path, config: Any, *, weights: bool = True) -> str:
    folder.mkdir()
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    if weights:
        (folder / "model.safetensors").write_bytes(b"")
    return str(folder)


def test_all_problems_are_reported_together_with_their_keys_and_metrics(tmp_path: Path) -> None:
    dino = write_model(tmp_path / "dino", {"image_size": 224, "model_type": "vit"}, weights=False)
    with pytest.raises(ModelError) as caught:
        check_judges(section(clip=str(tmp_path / "gone"), dino=dino, metrics=["fidelity", "clip_t"]))
    clip_line, dino_line = str(caught.value).splitlines()
    assert (
        "validation.clip" in clip_line and "does not exist" in clip_line and "clip_t, fidelity" in clip_line
    )
    assert "validation.dino" in dino_line and "no weights" in dino_line and "clip_t" not in dino_line


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"model_type": "bert"}, "no DINO ViT but bert"),
        ("{", "cannot be read"),
        ([], "no DINO ViT"),
    ],
)
def test_a_folder_of_another_model_is_reported(config: Any, problem: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=problem):
        check_judges(section(dino=write_model(tmp_path / "model", config)))


def test_complete_models_pass_and_models_that_no_metric_uses_are_not_looked_at(tmp_path: Path) -> None:
    tiny.make_tiny_model(tmp_path / "pocket")
    clip = write_model(tmp_path / "clip", {"text_config": {}, "vision_config": {}})
    dino = write_model(tmp_path / "dino", {"image_size": 224})
    for name in (clip, str(tmp_path / "pocket"), "pocket", None):
        check_judges(section(clip=name, dino=dino))
    check_judges(section(clip=str(tmp_path / "gone"), dino=str(tmp_path / "gone"), metrics=["loss"]))
    check_judges(section(dino=str(tmp_path / "gone"), metrics=["clip_t"]))
    (tmp_path / "pocket/image_encoder/config.json").unlink()
    with pytest.raises(ModelError, match="image_encoder"):
        check_judges(section(clip=str(tmp_path / "pocket")))


def test_train_tune_and_check_report_it_before_they_start(tmp_path: Path) -> None:
    broken = write_model(tmp_path / "dino", {"model_type": "bert"})
    validation = {"prompts": ["a cat"], "num_inference_steps": 1, "metrics": ["fidelity"], "dino": broken}
    tree = tiny.make_recipe(tmp_path, validation=validation)
    recipe = build_recipe(tree)
    with pytest.raises(ModelError, match=r"validation\.dino.*bert"):
        check_inputs(recipe)
    rate = {"distribution": "uniform", "lower": 0.1, "upper": 1}
    searched = {"space": {"optimizer.learning_rate": rate}, "num_trials": 1, "metric": "fidelity"}
    with pytest.raises(ModelError, match=r"validation\.dino.*bert"):
        search(build_recipe({**tree, "search": searched}))
    line = next(line for line in check_run(recipe) if line.name == "metrics")
    assert not line.ok and "bert" in line.detail
    file = tiny.write_recipe(tmp_path / "recipe.yaml", tree)
    done = CliRunner().invoke(program.app, ["train", str(file)])
    assert done.exit_code == 2 and "validation.dino" in done.output
    assert not (tmp_path / "run").exists()
    fine = build_recipe({**tree, "validation": {**validation, "dino": None, "clip": str(tmp_path / "model")}})
    line = next(line for line in check_run(fine) if line.name == "metrics")
    assert line.ok and "fidelity" in line.detail
