"""Tests the process that computes validation rounds on a local Ray, and its replacement after it died."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny

from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.driver.evaluator import RayEvaluator
from dreamfleet.trainers.driver.session import RaySession, ray_session
from dreamfleet.trainers.launch import fit
from dreamfleet.trainers.recipe import build_recipe
from dreamfleet.trainers.report.metrics_log import read_metrics
from dreamfleet.trainers.run.rounds import RoundResult

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def local_ray() -> Iterator[RaySession]:
    with ray_session(preload=("ray.train.torch",)) as session:
        yield session


def recipe_of(folder: Path, run: str, **changes: Any) -> Any:
    if not (folder / "holdout").exists():
        tiny.make_images(folder / "holdout", 2, seed=5)
    validation = {
        "steps": 10,
        "holdout": str(folder / "holdout"),
        "prompts": ["a cat"],
        "num_images": 1,
        "num_inference_steps": 2,
        **changes.pop("validation", {}),
    }
    changes = {"validation": validation, "train__max_train_steps": 40, **changes}
    return build_recipe(tiny.make_recipe(folder, output_dir=str(folder / run), **changes))


def rounds_of(folder: Path) -> dict[int, float]:
    lines = read_metrics(Storage(str(folder)))
    return {line["step"]: line["holdout_loss"] for line in lines if "holdout_loss" in line}


def test_rounds_are_computed_beside_the_training_with_equal_figures(
    tmp_path: Path, local_ray: RaySession
) -> None:
    fit(recipe_of(tmp_path, "own"))
    remote = {
        "validation": {"resources": {"CPU": 0.5}},
        "scaling": {"num_workers": 1, "cpus_per_worker": 0.5},
    }
    summary = fit(recipe_of(tmp_path, "other", **remote)).summary
    assert rounds_of(tmp_path / "other") == rounds_of(tmp_path / "own")
    assert list(rounds_of(tmp_path / "own")) == [0, 10, 20, 30, 40]
    for step in (0, 10, 40):
        name = f"samples/step-{step:06d}.png"
        assert (tmp_path / "own" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()
    assert summary.best_checkpoint and summary.exports


def dying_actor() -> type[Any]:
    """Return the class of an actor that dies at its first round, and at every round of step 3."""

    class Dying:  # local, so that Ray sends the class itself instead of the name of this file
        def __init__(self, recipe: Any, sent: Any, *, threads: int, begins: bool):
            self.marker = sent["marker"]

        def compute(self, step: int) -> RoundResult:
            if step == 3 or not os.path.exists(self.marker):
                open(self.marker, "w").close()
                os._exit(1)
            return RoundResult(step, {"holdout_loss": float(step)})

    return Dying


def test_a_dead_process_is_replaced_and_a_round_fails_after_three_tries(
    tmp_path: Path, local_ray: RaySession, caplog: pytest.LogCaptureFixture
) -> None:
    changes = {"validation": {"resources": {"CPU": 0.5}}, "scaling": {"num_workers": 1}}
    recipe = recipe_of(tmp_path, "run", **changes)
    evaluator = RayEvaluator(
        recipe,
        {"marker": str(tmp_path / "died")},
        environment=lambda threads: {},
        begins=True,
        actor=dying_actor(),
    )
    for step in (1, 2, 3, 4):
        evaluator.start(step)
    found: list[RoundResult] = []
    while evaluator.waiting:
        found += evaluator.finished(wait=True)
    evaluator.close()
    assert [result.step for result in found] == [1, 2, 3, 4]
    assert [result.figures.get("holdout_loss") for result in found] == [1.0, 2.0, None, 4.0]
    assert "tried 3 times" in str(found[2].error) and "started again" in caplog.text
