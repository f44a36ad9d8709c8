"""Tests that errors of a recipe are raised before class images are generated or workers started."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny

from dreamfleet.datasets.errors import UserError
from dreamfleet.trainers.distributed.context import DistributedContext
from dreamfleet.trainers.driver.preflight import check_inputs
from dreamfleet.trainers.launch import fit
from dreamfleet.trainers.recipe import build_recipe
from dreamfleet.trainers.run.build import assemble

PRIOR = {"name": "dreambooth", "with_prior_preservation": True, "num_class_images": 2}
ENDLESS = {"train__max_train_steps": None}


def prior_tree(folder: Path, **changes: Any) -> dict[str, Any]:
    return tiny.make_recipe(folder, method=PRIOR, data__class_data_dir=str(folder / "class"), **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (ENDLESS, "max_train_steps"),
        ({"train__mixed_precision": "fp16"}, "fp16"),
        ({"optimizer__name": "adamw8bit"}, "adamw8bit"),
        ({"train__export_formats": ["safetensors", "nope"]}, "nope"),
        ({"data__enable_bucket": True, "data__resolution": 256}, "enable_bucket"),
        ({"data__resolution": 36}, "resolution"),
        ({"validation": {"metrics": ["dino"], "prompts": ["a cat"]}}, "dino"),
    ],
)
def test_errors_are_reported_before_class_images_are_generated(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        assemble(build_recipe(prior_tree(tmp_path, **changes)), DistributedContext())
    assert not (tmp_path / "class").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (ENDLESS, "max_train_steps"),
        ({"validation": {"holdout": "/nowhere/at/all"}}, "/nowhere/at/all"),
        ({"validation": {"clip": "/nowhere/at/all"}}, "validation.clip"),
    ],
)
def test_errors_are_reported_before_workers_start(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    recipe = build_recipe(prior_tree(tmp_path, **changes))
    with pytest.raises(UserError, match=message):
        check_inputs(recipe)
    with pytest.raises(UserError, match=message):
        fit(recipe)
    assert not (tmp_path / "run").exists() and not (tmp_path / "class").exists()


def test_all_missing_files_are_reported_at_once(tmp_path: Path) -> None:
    judge = {
        "holdout": "/nowhere/held",
        "clip": "/nowhere/clip",
        "metrics": ["loss", "clip_i"],
        "prompts": ["a cat"],
    }
    changes = {"data__instance_data_dir": "/nowhere/images", "validation": judge, **ENDLESS}
    with pytest.raises(UserError) as caught:
        check_inputs(build_recipe(prior_tree(tmp_path, **changes)))
    first, *lines = str(caught.value).splitlines()
    assert first == "4 errors, nothing was started:"
    for part in ("max_train_steps", "/nowhere/images", "/nowhere/held", "/nowhere/clip"):
        assert sum(part in line for line in lines) == 1, (part, lines)
