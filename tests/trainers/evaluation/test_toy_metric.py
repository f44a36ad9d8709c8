"""A metric from outside the package, registered in this process and by an installed package's entry point."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml
from toy_packages import install_example

from dreamfleet.datasets.errors import RecipeError, UserError
from dreamfleet.trainers.config.metrics import METRICS, Metric
from dreamfleet.trainers.evaluation.judge import score_images
from dreamfleet.trainers.evaluation.score import score_run
from dreamfleet.trainers.recipe import build_recipe
from dreamfleet.trainers.run.run import run_worker

EXAMPLE = "docs/examples/toy_metric.py"


@pytest.fixture
def brightness(root: Path) -> Iterator[Metric]:
    metric: Metric = runpy.run_path(str(root / EXAMPLE))["BRIGHTNESS"]
    METRICS.register("brightness")(metric)
    yield metric
    METRICS.unregister("brightness")


def make_tree(folder: Path) -> dict[str, Any]:
    validation = {
        "prompts": ["a sks cat"],
        "num_images": 2,
        "num_inference_steps": 1,
        "steps": 2,
        "metrics": ["loss", "brightness"],
    }
    return tiny.make_recipe(folder, train__max_train_steps=2, validation=validation)


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_registered_metric_is_measured_logged_and_reported(brightness: Metric, tmp_path: Path) -> None:
    summary = run_worker(build_recipe(make_tree(tmp_path)))
    run = tmp_path / "run"
    logged = [line for line in read_lines(run / "metrics.jsonl") if "brightness" in line]
    assert [line["step"] for line in logged] == [0, 2]
    cells = read_lines(run / "samples/step-000002.jsonl")
    values = [cell["scores"]["brightness"] for cell in cells]
    assert all(0 < value < 1 for value in values)
    assert logged[-1]["brightness"] == pytest.approx(sum(values) / 2, abs=1e-4)
    assert summary.figures["brightness"] == logged[-1]["brightness"]
    assert f"<p>{brightness.note}</p>" in (run / "report.html").read_text()
    scores = score_run(run, num_images=1)
    assert 0 < scores["brightness"] < 1 and scores["prompts"][0]["brightness"] == scores["brightness"]


@pytest.mark.usefixtures("brightness")
def test_a_search_minimises_a_registered_metric_whose_lower_values_are_better(tmp_path: Path) -> None:
    rate = {"distribution": "uniform", "lower": 0.1, "upper": 1}
    search = {"space": {"optimizer.learning_rate": rate}, "num_trials": 2, "metric": "brightness"}
    recipe = build_recipe(make_tree(tmp_path) | {"search": search})
    assert recipe.search is not None and not recipe.search.maximise
    assert recipe.figures == ["brightness"]
    tree = make_tree(tmp_path) | {"search": search}
    tree["validation"]["metrics"] = ["loss"]
    with pytest.raises(RecipeError, match=r"search\.metric.*validation\.metrics"):
        build_recipe(tree)


def test_the_recipe_reference_lists_a_registered_metric(brightness: Metric, root: Path) -> None:
    page = runpy.run_path(str(root / "docs/write_recipes.py"))["write"]()
    assert (
        "list of `loss`, `clip_i`, `clip_t`, `dino`, `fidelity`, `overfitting`, `view_loss`, `brightness`"
        in page
    )
    row = next(line for line in page.splitlines() if line.startswith("| `brightness`"))
    assert "lower" in row and brightness.note in row


def test_an_unknown_metric_is_an_error_with_the_nearest_name(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"validation\.metrics\.1.*'brightness'.*does not exist.*clip_i"):
        build_recipe(make_tree(tmp_path))


def test_a_metric_must_return_one_number_per_image() -> None:
    METRICS.register("wrong")(Metric("wrong", "Returns too few values.", lambda scored: [1.0]))
    try:
        with pytest.raises(UserError, match=r"'wrong'.*2 images"):
            score_images(list(map(tiny_image, range(2))), metrics=["wrong"], prompts=["a"])
    finally:
        METRICS.unregister("wrong")
    with pytest.raises(ValueError, match=r"needs.*known"):
        Metric("typo", "Needs something unknown.", None, needs=("clipp",))


def tiny_image(number: int) -> Any:
    from PIL import Image

    return Image.new("RGB", (8, 8), (number, 0, 0))


def test_an_installed_package_adds_a_metric(tmp_path: Path) -> None:
    environment = install_example(
        tmp_path / "site", "toy_metric", group="metrics", entry="brightness = BRIGHTNESS"
    )
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(make_tree(tmp_path)))
    command = [sys.executable, "-m", "dreamfleet.cluster.cli", "train", str(recipe), "scaling.num_workers=0"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert any("brightness" in line for line in read_lines(tmp_path / "run/metrics.jsonl"))
    assert "brightness" in json.loads((tmp_path / "run/summary.json").read_text())["figures"]
