"""Tests of the training loop: seeds, timing, and the checkpoint with the lowest held-out loss."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from PIL import Image

from dreamfleet.datasets.errors import RecipeError
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.artifacts.usage import describe
from dreamfleet.trainers.engines.model_passes import Measurement
from dreamfleet.trainers.engines.passes import Passes, drive, no_passes
from dreamfleet.trainers.loop import Hooks, Outcome, Schedule, StopTraining, train
from dreamfleet.trainers.methods.base import Loss
from dreamfleet.trainers.recipe import build_recipe
from dreamfleet.trainers.report.metrics_log import read_metrics
from dreamfleet.trainers.report.report import render
from dreamfleet.trainers.run.checkpoint import Checkpoints
from dreamfleet.trainers.run.evaluation import Evaluation, Previews, to_grid
from dreamfleet.trainers.run.run import run_worker


class RandomEngine:
    """A minimal engine whose backward pass draws a number from the global generator, as dropout does."""

    device = torch.device("cpu")

    def __init__(self, num_units: int = 4, rank: int = 0, world: int = 2):
        self.num_units, self.units = num_units, range(rank, num_units, world)
        self.random_numbers = list[float]()

    def any_rank(self, *flags: bool) -> Any:
        return lambda: flags

    def to_device(self, batch: Any) -> Any:
        return batch

    def begin_step(self, rates: Any, step: int) -> None:
        pass

    def backward(self, batch: Any, *, last: bool = True) -> Loss:
        self.random_numbers.append(float(torch.rand(())))
        return Loss(torch.ones(()), torch.ones(1), {})

    def step(self, rates: Any, step: int) -> torch.Tensor:
        return torch.ones(())

    def effective_rates(self) -> dict[str, float]:
        return {}

    def drop_gradients(self) -> None:
        self.random_numbers.pop()  # drawn by the rehearsal

    def sum_over_ranks(self, values: torch.Tensor) -> torch.Tensor:
        return values


def loop(engine: RandomEngine, hooks: Hooks | None = None, *, steps: int = 3, **options: Any) -> Outcome:
    anything: Any = engine
    return drive(
        train(
            anything,
            itertools.repeat({"num_instances": 2}),
            lambda batch: batch,
            rates={},
            schedule=Schedule(total=steps, save_every=1, sample_every=100, log_every=1),
            seed=7,
            hooks=hooks or Hooks(),
            **options,
        )
    )


def random_numbers(*, start_step: int = 0, **engine_options: Any) -> list[float]:
    engine = RandomEngine(**engine_options)
    loop(engine, start_step=start_step)
    return engine.random_numbers


def test_dropout_differs_by_step_and_unit_on_any_number_of_workers_and_after_a_resume() -> None:
    alone = random_numbers(world=1)
    assert len(set(alone)) == 12
    for world in (2, 3, 4):
        parts = [random_numbers(rank=rank, world=world) for rank in range(world)]
        assert [len(part) for part in parts] == [3 * len(range(rank, 4, world)) for rank in range(world)]
        assert sorted(number for part in parts for number in part) == sorted(alone)
    assert random_numbers(world=1, start_step=1) == alone[4:]
    assert random_numbers(rank=1, start_step=2) == random_numbers(rank=1)[4:]


def test_the_training_rate_excludes_saves_and_validation() -> None:
    lines: list[dict[str, Any]] = []
    hooks = Hooks(log=lines.append, save=lambda step: time.sleep(0.1), sample=lambda step: time.sleep(0.1))
    outcome = loop(RandomEngine(), hooks)
    assert max(line["step_seconds"] for line in lines) < 0.05
    assert min(line["images_per_second"] for line in lines) > 40
    assert outcome.figures["images_per_second"] > 40


def holdout_tree(folder: Path, **changes: Any) -> dict[str, Any]:
    holdout = folder / "holdout"
    if not holdout.exists():
        tiny.make_images(holdout, 1, seed=5)
    return tiny.make_recipe(
        folder,
        method={"name": "textual_inversion", "placeholder_token": "<x>", "initializer_token": "cat"},
        validation={"steps": 2, "holdout": str(holdout), "holdout_timesteps": 1},
        train__max_train_steps=10,
        **{"train__checkpointing_steps": 5, "train__checkpoints_total_limit": 1, **changes},
    )


def measure(monkeypatch: pytest.MonkeyPatch, losses: dict[int, float]) -> None:
    """Replace a run's held-out losses by ``losses``, in order of their steps."""
    coming = iter(losses.values())
    monkeypatch.setattr(Evaluation, "measure", lambda evaluation: no_passes({"holdout_loss": next(coming)}))


LOSSES = {0: 0.1, 2: 0.9, 4: 0.5, 6: 0.6, 8: 0.7, 10: 0.8}


@pytest.mark.parametrize(
    ("every", "limit", "losses", "kept", "best"),
    [
        (5, 1, LOSSES, [4, 10], 4),  # step 4 is not in the schedule and is beyond the limit
        (2, 1, LOSSES, [4, 10], 4),
        (2, 2, {**LOSSES, 8: 0.2}, [8, 10], 8),
        (5, None, LOSSES, [4, 5, 10], 4),  # that of step 2 is removed when step 4 is better
        (5, 1, {**LOSSES, 10: 0.3}, [10], 10),
        (5, 1, {**LOSSES, 4: float("nan"), 6: float("inf")}, [8, 10], 8),
        (5, 1, dict.fromkeys(LOSSES, float("nan")), [10], 10),
    ],
)
def test_the_checkpoint_with_the_lowest_held_out_loss_is_kept_and_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    every: int,
    limit: int | None,
    losses: dict[int, float],
    kept: list[int],
    best: int,
) -> None:
    measure(monkeypatch, losses)
    tree = holdout_tree(tmp_path, train__checkpointing_steps=every, train__checkpoints_total_limit=limit)
    summary = run_worker(build_recipe(tree))
    run = Storage(tree["output_dir"])
    assert Checkpoints(run).steps() == kept
    assert summary.best_checkpoint == f"step-{best:06d}"
    assert json.loads(run.read_text("summary.json"))["best_checkpoint"] == summary.best_checkpoint
    marked = [
        part for part in render(run, describe=describe).split("<tr>") if "best held-out loss</small>" in part
    ]
    finite = [value for step, value in losses.items() if step and value < float("inf")]
    assert len(marked) == bool(finite) and all(f"step-{best:06d}" in part for part in marked)


def test_the_best_checkpoint_can_be_the_one_with_the_highest_value(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure(monkeypatch, LOSSES)
    tree = holdout_tree(tmp_path)
    tree["validation"]["greater_is_better"] = True
    assert run_worker(build_recipe(tree), should_stop=tiny.Stop(6)).best_checkpoint == "step-000002"
    assert run_worker(build_recipe(tree), resume=True).best_checkpoint == "step-000002"
    assert Checkpoints(Storage(tree["output_dir"])).steps() == [2, 10]


def test_the_best_checkpoint_can_be_that_of_a_score_of_the_previews(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores are logged after the held-out loss, whose lowest value is at step 4."""
    measure(monkeypatch, LOSSES)
    scores = {0: 0.9, 2: 0.1, 4: 0.2, 6: 0.4, 8: 0.3, 10: 0.4}
    grid = to_grid([Image.new("RGB", (8, 8))], columns=1)
    monkeypatch.setattr(Evaluation, "draw", lambda self, step: Previews(grid, [], {"clip_i": scores[step]}))
    tree = holdout_tree(tmp_path)
    tree["validation"] |= {"prompts": ["a <x>"], "metrics": ["clip_i"], "metric_for_best": "clip_i"}
    summary = run_worker(build_recipe(tree), should_stop=tiny.Stop(8))
    assert summary.best_checkpoint == "step-000006"
    assert run_worker(build_recipe(tree), resume=True).best_checkpoint == "step-000006"
    run = Storage(tree["output_dir"])
    assert Checkpoints(run).steps() == [6, 10]
    assert "best CLIP-I</small>" in render(run, describe=describe)


def test_the_metric_for_the_best_checkpoint_must_be_measured(tmp_path: Path) -> None:
    tree = holdout_tree(tmp_path)
    tree["validation"]["metric_for_best"] = "clip_i"
    with pytest.raises(
        RecipeError, match=r"validation\.metric_for_best: .* measures holdout_loss, not 'clip_i'"
    ):
        build_recipe(tree)


@pytest.mark.parametrize("polls", [3, 4, 7])
def test_a_resumed_run_remembers_its_best_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, polls: int
) -> None:
    measure(monkeypatch, LOSSES)
    tree = holdout_tree(tmp_path)
    assert run_worker(build_recipe(tree), should_stop=tiny.Stop(polls)).exit_reason == "interrupted"
    summary = run_worker(build_recipe(tree), resume=True)
    assert summary.best_checkpoint == "step-000004"
    assert Checkpoints(Storage(tree["output_dir"])).steps() == [4, 10]


def test_without_the_best_checkpoint_the_best_existing_one_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure(monkeypatch, LOSSES)
    tree = holdout_tree(tmp_path, train__checkpointing_steps=2, train__checkpoints_total_limit=None)
    assert run_worker(build_recipe(tree), should_stop=tiny.Stop(8)).steps == 9
    run = Storage(tree["output_dir"])
    Checkpoints(run).drop(4)
    assert run_worker(build_recipe(tree), resume=True).best_checkpoint == "step-000006"
    assert 4 in {line["step"] for line in read_metrics(run) if "holdout_loss" in line}


def test_the_progress_of_a_loop_is_marked() -> None:
    phases: list[str] = []
    hooks = Hooks(save=lambda step: phases.append(hooks.pulse.phase), saved=lambda: 2)
    loop(RandomEngine(), hooks, steps=3)
    assert phases == ["save"] * 3
    beat = hooks.pulse.beat()
    assert (beat.step, beat.phase, beat.saved) == (3, "end", 2), "what follows the loop would count as a hang"


def test_a_training_that_is_stopped_in_a_measurement_saves_the_step_that_it_has_taken() -> None:
    engine: Any = RandomEngine(world=1)
    saved: list[int] = []

    def validate(step: int) -> Passes[dict[str, float]]:
        return {"holdout_loss": (yield Measurement(engine, {}))}

    training = train(
        engine,
        itertools.repeat({"num_instances": 2}),
        lambda batch: batch,
        rates={},
        schedule=Schedule(total=4, save_every=9, sample_every=2, log_every=1),
        seed=7,
        hooks=Hooks(save=saved.append, validate=validate),
    )
    asked = next(training)
    while not isinstance(asked, Measurement):
        asked = training.send(asked.compute())
    with pytest.raises(StopIteration) as end:
        training.throw(StopTraining())
    assert end.value.value.step == 2 and end.value.value.exit_reason == "interrupted" and saved == [2]
