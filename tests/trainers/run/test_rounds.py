"""Tests validation rounds that another process computes: equal figures, the best checkpoint, failures and resumes."""

from pathlib import Path
from typing import Any

import pytest
import tiny

from dreamfleet.datasets.errors import RecipeError, ResourceError
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.driver.preflight import reserve
from dreamfleet.trainers.recipe import Recipe, build_recipe
from dreamfleet.trainers.report.events import read_events
from dreamfleet.trainers.report.metrics_log import read_metrics
from dreamfleet.trainers.run.checkpoint import Checkpoints
from dreamfleet.trainers.run.round_worker import RoundWorker
from dreamfleet.trainers.run.rounds import RoundResult
from dreamfleet.trainers.run.run import run_worker
from dreamfleet.trainers.run.summary import Summary

WORD = {"name": "textual_inversion", "placeholder_token": "<x>", "initializer_token": "cat"}


class LateEvaluator:
    """Computes each round in this process, only when it is waited for, as a slow process would."""

    def __init__(self, recipe: Recipe, begins: bool, *, failing: tuple[int, ...] = (), dies: bool = False):
        self.recipe, self.begins, self.failing, self.dies = recipe, begins, failing, dies
        self.steps: list[int] = []
        self.most = 0
        self.worker: RoundWorker | None = None

    @property
    def waiting(self) -> int:
        return len(self.steps)

    def start(self, step: int) -> None:
        self.steps.append(step)
        self.most = max(self.most, len(self.steps))

    def finished(self, *, wait: bool = False) -> list[RoundResult]:
        if not wait or not self.steps:
            return []
        step = self.steps.pop(0)
        if step in self.failing:
            return [RoundResult(step, error="the node is gone (tried 3 times)")]
        if self.worker is None:
            self.worker = RoundWorker(self.recipe, begins=self.begins)
        return [self.worker(step)]

    def close(self) -> None:
        if self.worker is not None:
            self.worker.engine.close()


def recipe_of(folder: Path, run: str, **changes: Any) -> Recipe:
    if not (folder / "holdout").exists():
        tiny.make_images(folder / "holdout", 2, seed=5)
    validation = {
        "steps": 2,
        "holdout": str(folder / "holdout"),
        "prompts": ["a <x>"],
        "num_images": 2,
        "num_inference_steps": 2,
        "metrics": ["loss", "clip_i"],
        "resources": {"CPU": 1},
    }
    options: dict[str, Any] = {
        "method": WORD,
        "validation": validation,
        "output_dir": str(folder / run),
        "scaling": {"num_workers": 1},
        "train__max_train_steps": 8,
        "train__checkpointing_steps": 5,
        "train__checkpoints_total_limit": 1,
        "optimizer__learning_rate": 5e-2,
    }
    return build_recipe(tiny.make_recipe(folder, **(options | changes)))


def train(recipe: Recipe, *, resume: bool = False, steps: int = 99, **options: Any) -> tuple[Summary, Any]:
    made: list[LateEvaluator] = []

    def make(begins: bool) -> LateEvaluator:
        made.append(LateEvaluator(recipe, begins, **options))
        return made[0]

    summary = run_worker(recipe, resume=resume, make_evaluator=make, should_stop=tiny.Stop(steps))
    return summary, made[0]


def rounds_of(recipe: Recipe) -> dict[int, dict[str, float]]:
    """Return the figures of the rounds by step."""
    found: dict[int, dict[str, float]] = {}
    for line in read_metrics(Storage(recipe.output_dir)):
        if "loss" not in line:
            figures = {key: value for key, value in line.items() if key != "step"}
            found.setdefault(int(line["step"]), {}).update(figures)
    return found


@pytest.mark.parametrize("use_ema", [False, True])
def test_figures_previews_and_best_checkpoint_equal_those_of_the_workers(
    tmp_path: Path, use_ema: bool
) -> None:
    engine = {"use_ema": use_ema, "ema_decay": 0.5}
    own = recipe_of(tmp_path, "own", engine=engine)
    expected = run_worker(own)
    other = recipe_of(tmp_path, "other", engine=engine)
    summary, evaluator = train(other)
    assert rounds_of(other) == rounds_of(own) and sorted(rounds_of(own)) == [0, 2, 4, 6, 8]
    runs = [Storage(recipe.output_dir) for recipe in (own, other)]
    for name in runs[0].list("samples"):
        assert runs[0].read_bytes(f"samples/{name}") == runs[1].read_bytes(f"samples/{name}"), name
    assert Checkpoints(runs[1]).steps() == Checkpoints(runs[0]).steps()
    assert summary.best_checkpoint == expected.best_checkpoint
    assert summary.figures["holdout_loss"] == expected.figures["holdout_loss"]
    assert summary.figures["clip_i"] == expected.figures["clip_i"]
    assert evaluator.most == 2 and not evaluator.waiting and summary.exports


def test_a_failed_round_is_reported_and_the_training_continues(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = recipe_of(tmp_path, "run")
    summary, _ = train(recipe, failing=(4,))
    assert summary.exit_reason == "completed" and sorted(rounds_of(recipe)) == [0, 2, 6, 8]
    assert "round of step 4 failed: the node is gone" in caplog.text
    events = [event for event in read_events(Storage(recipe.output_dir)) if event.get("remote")]
    assert {event["step"]: event["error"] for event in events}[4] == "the node is gone (tried 3 times)"


def test_a_resumed_run_computes_the_rounds_that_were_not_finished(tmp_path: Path) -> None:
    straight = recipe_of(tmp_path, "straight")
    train(straight)
    broken = recipe_of(tmp_path, "broken")
    summary, evaluator = train(broken, steps=4)
    assert summary.exit_reason == "interrupted" and evaluator.waiting == 2
    assert sorted(rounds_of(broken)) == [0]
    train(broken, resume=True)
    assert rounds_of(broken) == rounds_of(straight)
    kept = [Checkpoints(Storage(recipe.output_dir)).steps() for recipe in (straight, broken)]
    assert kept[0] == kept[1]


def test_local_training_and_fp16_without_a_gpu_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"validation\.resources .*num_workers: 1"):
        recipe_of(tmp_path, "run", scaling={"num_workers": 0})
    with pytest.raises(RecipeError, match=r"validation\.resources without a GPU .*GPU: 1"):
        recipe_of(tmp_path, "run", train__mixed_precision="fp16")
    with pytest.raises(RecipeError, match=r"validation\.resources"):
        recipe_of(tmp_path, "run", validation={"resources": {"CPU": 0}})


def test_workers_leave_the_resources_free() -> None:
    nodes = [{"CPU": 8.0, "GPU": 2.0}, {"CPU": 4.0}]
    assert reserve(nodes, {"CPU": 4.0}) == [{"CPU": 8.0, "GPU": 2.0}, {"CPU": 0.0}]
    assert reserve(nodes, {"GPU": 1.0}) == [{"CPU": 8.0, "GPU": 1.0}, {"CPU": 4.0}]
    assert reserve(nodes, None) == nodes and nodes[1] == {"CPU": 4.0}
    with pytest.raises(ResourceError, match=r"validation\.resources.*16 CPU"):
        reserve(nodes, {"CPU": 16.0})
    assert reserve(nodes, {"CPU": 16.0}, limit={"CPU": 64.0}) == nodes
