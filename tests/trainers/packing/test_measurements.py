"""Tests that packed trainings share the passes of their validation rounds, and measure what runs alone measure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from packed_runs import (
    assert_equal_runs,
    last_checkpoint,
    make_trees,
    metrics,
    out_of_memory_above,
    packed_method,
    run_alone,
    run_packed,
    tasks_of,
)
from task_sources import ListSource

from dreamfleet.trainers.distributed.context import DistributedContext
from dreamfleet.trainers.engines.model_passes import Measurement
from dreamfleet.trainers.engines.passes import Pass, Passes, drive
from dreamfleet.trainers.evaluation.heldout_loss import HeldOutLoss
from dreamfleet.trainers.methods.diffusion_method import DiffusionMethod, require_diffusion
from dreamfleet.trainers.packing.kinds import MOST_MEASURED, Measure
from dreamfleet.trainers.packing.model import PackedModel
from dreamfleet.trainers.packing.pack import Pack
from dreamfleet.trainers.packing.runner import run_tasks
from dreamfleet.trainers.recipe import build_recipe
from dreamfleet.trainers.run.build import assemble

Tree = dict[str, Any]


def measured_trees(
    folder: Path, methods: Sequence[Tree], metrics: Sequence[str] = (), **changes: Any
) -> dict[str, Tree]:
    """Return recipes by name, with held-out images and these metrics of the model; every second one has EMA weights."""
    holdout = folder / "holdout"
    if not holdout.exists():
        tiny.make_images(holdout, 2, seed=5)
    validation = {
        "steps": 2,
        "holdout": str(holdout),
        "holdout_timesteps": 3,
        "metrics": ["loss", *metrics],
    }
    trees = make_trees(folder, methods, **{"validation": validation, "train__max_train_steps": 4, **changes})
    for tree in list(trees.values())[1::2]:
        tree["engine"] = {"use_ema": True, "ema_decay": 0.5}
    return trees


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list to which the number of trainings in each pass of a measurement is added."""
    found: list[int] = []
    run = Measure.run

    def record(kind: Measure, members: Sequence[Any], passes: Sequence[Measurement]) -> Any:
        found.append(len(members))
        assert sum(len(one.batch["noise"]) for one in passes) <= MOST_MEASURED or len(passes) == 1
        return run(kind, members, passes)

    monkeypatch.setattr(Measure, "run", record)
    return found


def test_the_rounds_of_packed_trainings_equal_those_of_runs_alone(
    tmp_path: Path, measured: list[int]
) -> None:
    """Test with EMA weights, dropout in LoRA layers and in hypernetworks, learned words and pairs of prompts."""
    chosen = {"dreambooth": 2, "hypernetwork": 0, "prompt_tuning": 1, "textual_inversion": 0}
    methods = [
        packed_method("dreambooth")[1],
        *(packed_method(name)[which] for name, which in chosen.items()),
    ]
    trees = measured_trees(tmp_path, methods, ("view_loss",), train__max_train_steps=2)
    source = run_packed(trees, tmp_path / "packed")
    assert {name: end.error for name, end in source.ends.items()} == dict.fromkeys(trees)
    run_alone(trees, tmp_path / "alone")
    for name in trees:
        assert_equal_runs(tmp_path / "packed" / name, tmp_path / "alone" / name)
        rounds = [line for line in metrics(tmp_path / "packed" / name) if "holdout_loss" in line]
        assert [line["step"] for line in rounds] == [0, 2] and all("view_loss" in line for line in rounds)
        assert rounds[0]["view_loss"] == pytest.approx(1)
        assert rounds[0]["holdout_loss"] != rounds[-1]["holdout_loss"]
    # In each of 2 rounds, 2 held-out images and 2 views of each training image; and those of the untuned model.
    images = len(list(Path(next(iter(trees.values()))["data"]["instance_data_dir"]).iterdir()))
    assert sum(measured) == len(trees) * (2 * (2 + 2 * images) + 2 * images)
    assert max(measured) == len(trees) and sum(measured) / len(measured) > 2


def test_a_measurement_that_fails_ends_its_own_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trees = measured_trees(tmp_path, packed_method("dreambooth"))
    run_alone(trees, tmp_path / "alone")
    broken, *others = trees
    errors = DiffusionMethod.errors
    seen: list[Any] = []

    def fail(method: DiffusionMethod, batch: Any, predicted: torch.Tensor) -> torch.Tensor:
        if method.config.lora_rank == 2 and method.config.lora_target_modules != "locon":
            seen.append(method)
            if len(seen) > 3:
                raise ValueError("a fault in this method")
        return errors(method, batch, predicted)

    monkeypatch.setattr(DiffusionMethod, "errors", fail)
    source = run_packed(trees, tmp_path / "packed")
    assert source.ends[broken].exit_reason == "failed" and "a fault in this" in str(source.ends[broken].error)
    assert "a fault in this" in (tmp_path / "packed" / broken / "run.log").read_text()
    for name in others:
        assert source.ends[name].exit_reason == "completed"
        assert_equal_runs(tmp_path / "packed" / name, tmp_path / "alone" / name)


def test_out_of_memory_halves_the_measurements_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trees = measured_trees(tmp_path, packed_method("textual_inversion") * 2)
    run_alone(trees, tmp_path / "alone")
    predict, limited = PackedModel.predict, out_of_memory_above(1)
    packs, trained = set[Pack](), list[int]()
    backward = Pack.backward

    def watch(pack: Pack, micros: Any) -> Any:
        packs.add(pack)
        trained.append(len(micros))
        return backward(pack, micros)

    def choose(model: PackedModel, members: Sequence[Any], *inputs: Any) -> Any:
        return (predict if torch.is_grad_enabled() else limited)(model, members, *inputs)

    monkeypatch.setattr(Pack, "backward", watch)
    monkeypatch.setattr(PackedModel, "predict", choose)
    source = run_packed(trees, tmp_path / "packed")
    assert {end.exit_reason for end in source.ends.values()} == {"completed"}
    assert [pack.limit for pack in packs] == [None] and max(trained) == len(trees)
    for name in trees:
        assert_equal_runs(tmp_path / "packed" / name, tmp_path / "alone" / name)


def test_a_slot_that_is_stopped_during_a_pack_s_rounds_continues_alone(tmp_path: Path) -> None:
    trees = measured_trees(tmp_path, packed_method("dreambooth"), train__max_train_steps=6)
    run_alone(trees, tmp_path / "straight")
    first, *others = trees
    tasks = tasks_of(trees, tmp_path / "packed", figures=("holdout_loss",))
    source = ListSource(tasks, decide=lambda task, figures: task.name == first and figures["step"] == 2)
    run_tasks(source, capacity=8)
    assert source.ends[first].exit_reason == "stopped"
    assert last_checkpoint(tmp_path / "packed" / first).step == 2
    for name in others:
        assert_equal_runs(tmp_path / "packed" / name, tmp_path / "straight" / name)
    run_alone({first: trees[first]}, tmp_path / "packed", resume=True)
    assert_equal_runs(tmp_path / "packed" / first, tmp_path / "straight" / first)


def test_a_resumed_slot_completes_its_round_before_it_is_stopped(tmp_path: Path) -> None:
    """The decision after an earlier round is open when the run begins with the measurements of a later one."""
    trees = measured_trees(tmp_path, packed_method("textual_inversion")[:1], train__max_train_steps=8)
    (name,) = trees
    run_alone(trees, tmp_path, should_stop=tiny.Stop(1))
    assert last_checkpoint(tmp_path / name).step == 2
    path = tmp_path / name / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    kept = [line for line in lines if not (line["step"] == 2 and "holdout_loss" in line)]
    assert len(kept) == len(lines) - 1
    path.write_text("".join(json.dumps(line) + "\n" for line in kept))
    source = ListSource(tasks_of(trees, tmp_path, figures=("holdout_loss",)), decide=lambda *_: True)
    run_tasks(source, capacity=1)
    assert source.ends[name].exit_reason == "stopped", source.ends[name].error
    assert [figures["step"] for figures in source.rounds[name]] == [0, 2]


def answer(asked: Pass, passes: Passes[torch.Tensor]) -> Passes[torch.Tensor]:
    """Return the rest of a computation that has asked for its first pass."""
    while True:
        try:
            asked = passes.send((yield asked))
        except StopIteration as end:
            return end.value


@pytest.mark.parametrize("ends_with", ["result", "error", "close"])
def test_a_waiting_measurement_holds_the_averages_and_restores_the_weights(
    tmp_path: Path, ends_with: str
) -> None:
    tree = measured_trees(tmp_path, packed_method("dreambooth") * 2)["dreambooth-5"]
    parts = assemble(build_recipe(tree), DistributedContext())
    engine: Any = parts.engine
    method = require_diffusion(parts.method, "validation")
    held = HeldOutLoss(parts.sets.instances, method=method, data=parts.recipe.data, count=2)
    weights = {name: value.clone() for name, value in parts.method.state().items()}
    modes = [module.training for module in parts.method.model.denoiser.modules()]
    assert any(modes)  # dropout
    for shadow in engine.ema.shadow.values():
        shadow.add_(1.0)
    passes = engine.evaluate_passes(held.passes(engine))
    asked = next(passes)
    shown = parts.method.state()
    assert all(torch.equal(shown[name], value + 1) for name, value in weights.items())
    assert not any(module.training for module in parts.method.model.denoiser.modules())
    assert torch.is_grad_enabled()  # others may train while it waits
    if ends_with == "result":
        losses = drive(answer(asked, passes))
        assert losses.shape == (len(parts.sets.instances), 2)
    elif ends_with == "close":
        passes.close()
    else:
        with pytest.raises(ValueError, match="no longer"):
            passes.throw(ValueError("no longer"))
    assert all(torch.equal(value, weights[name]) for name, value in parts.method.state().items())
    assert [module.training for module in parts.method.model.denoiser.modules()] == modes
