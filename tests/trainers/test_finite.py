"""Tests that a run that diverges or has only zero gradients fails, and keeps only finite checkpoints."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from typer.testing import CliRunner

from dreamfleet.cluster.cli import program
from dreamfleet.datasets.errors import CheckpointError, RunFailed
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.engines.torch_engine import TorchEngine
from dreamfleet.trainers.methods.base import Loss
from dreamfleet.trainers.methods.textual_inversion import TextualInversion
from dreamfleet.trainers.recipe import build_recipe
from dreamfleet.trainers.run.checkpoint import Checkpoints
from dreamfleet.trainers.run.finite import find_not_finite
from dreamfleet.trainers.run.run import run_worker

WORD = {"name": "textual_inversion", "placeholder_token": "<x>", "initializer_token": "cat"}
# Saves at every step and logs rarely, so that no loss is read on the host before the run diverges.
RARELY = {"train__checkpointing_steps": 1, "train__log_steps": 20, "train__max_train_steps": 12}


def embedding_tree(folder: Path, **changes: Any) -> dict[str, Any]:
    return tiny.make_recipe(folder, method=WORD, **{"optimizer__learning_rate": 1e-3, **changes})


def break_at(monkeypatch: pytest.MonkeyPatch, name: str, step: int, damage: Callable[..., Any]) -> None:
    """Replace the result of call number ``step`` (from 0) of an engine's method by that of ``damage``.

    Call 0 of ``backward`` is the loop's rehearsal before the first step.
    """
    whole, calls = getattr(TorchEngine, name), iter(range(10**6))

    def broken(engine: TorchEngine, *args: Any, **options: Any) -> Any:
        found = whole(engine, *args, **options)
        return damage(engine, found) if next(calls) == step else found

    monkeypatch.setattr(TorchEngine, name, broken)


def kept_steps(tree: dict[str, Any]) -> list[int]:
    """Return the steps of a run's checkpoints; check that each of them is finite."""
    checkpoints = Checkpoints(Storage(tree["output_dir"]))
    for step in checkpoints.steps():
        found = checkpoints.load(step)  # raises CheckpointError for one that is not
        assert find_not_finite([found.learned, found.engine]) is None
    return checkpoints.steps()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_no_state_is_saved_after_a_loss_that_is_not_finite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    break_at(
        monkeypatch,
        "backward",
        7,
        lambda _, loss: Loss(torch.full_like(loss.total, value), loss.per_sample, loss.extras),
    )
    tree = embedding_tree(tmp_path, **RARELY)
    with pytest.raises(RunFailed, match=r"no longer a number at step 7.*checkpoint of step 6 "):
        run_worker(build_recipe(tree))
    assert kept_steps(tree) == [4, 5, 6]


def test_the_loss_of_every_micro_step_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    break_at(monkeypatch, "backward", 3, lambda _, loss: loss._replace(total=loss.total * float("nan")))
    tree = embedding_tree(tmp_path, train__gradient_accumulation_steps=2, **RARELY)
    with pytest.raises(RunFailed, match=r"at step 2.*checkpoint of step 1 "):
        run_worker(build_recipe(tree))
    assert kept_steps(tree) == [1]


@pytest.mark.parametrize("what", ["weights", "moments"])
def test_a_state_that_is_not_finite_is_not_saved_after_a_finite_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    def poison(engine: TorchEngine, norm: torch.Tensor) -> torch.Tensor:
        param = next(iter(engine.params.values()))
        spoiled = param.data if what == "weights" else engine.optimizer.state[param]["exp_avg_sq"]
        spoiled.view(-1)[3] = float("inf")
        return norm

    break_at(monkeypatch, "step", 2, poison)
    tree = embedding_tree(tmp_path, **RARELY)
    with pytest.raises(RunFailed, match=r"no longer finite after step 3.*checkpoint of step 2 "):
        run_worker(build_recipe(tree))
    assert kept_steps(tree) == [1, 2]


RANK = """
import sys
import torch.distributed as dist
from dreamfleet.datasets.errors import RunFailed
from dreamfleet.trainers.engines.torch_engine import TorchEngine
from dreamfleet.trainers.distributed.process_group import leave_group
from dreamfleet.trainers.recipe import load_recipe
from dreamfleet.trainers.run.run import run_worker

recipe, meeting, rank = sys.argv[1], sys.argv[2], int(sys.argv[3])
dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
whole, calls = TorchEngine.backward, iter(range(99))

def broken(engine, *args, **options):
    loss = whole(engine, *args, **options)
    return loss._replace(total=loss.total * float("nan")) if next(calls) == 4 and rank == 1 else loss

TorchEngine.backward = broken
try:
    run_worker(load_recipe(recipe), rank=rank, world=2)
except RunFailed as error:
    print(error)
finally:
    leave_group()
"""


def test_a_loss_that_is_not_finite_on_one_rank_ends_all_ranks_at_the_same_step(tmp_path: Path) -> None:
    tree = embedding_tree(tmp_path, **RARELY)
    recipe = tiny.write_recipe(tmp_path / "r.yaml", tree)
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(recipe), str(tmp_path / "meeting"), str(rank)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    for rank in ranks:
        output, errors = rank.communicate(timeout=300)
        assert "no longer a number at step 4" in output and "checkpoint of step 3 " in output, errors[-2000:]
    assert kept_steps(tree) == [1, 2, 3]


def test_a_diverged_run_exits_with_1_and_keeps_finite_checkpoints(
    tmp_path: Path,
) -> None:
    changes = {"optimizer__learning_rate": 1e19, "optimizer__max_grad_norm": 0, **RARELY}
    tree = tiny.make_recipe(tmp_path, method={"name": "dreambooth"}, **changes)
    result = CliRunner().invoke(program.app, ["train", str(tiny.write_recipe(tmp_path / "r.yaml", tree))])
    assert result.exit_code == 1 and "the run failed" in result.stderr and "--resume" in result.stderr
    assert kept_steps(tree) == [1] and "checkpoint of step 1 " in result.stderr


def test_an_interrupted_run_saves_no_state_that_is_not_finite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_at(monkeypatch, "backward", 2, lambda _, loss: loss._replace(total=loss.total * float("nan")))
    tree = embedding_tree(tmp_path, **RARELY | {"train__checkpointing_steps": 100})
    with pytest.raises(RunFailed, match="No checkpoint was saved before"):
        run_worker(build_recipe(tree), should_stop=tiny.Stop(3))
    assert kept_steps(tree) == []


def test_a_checkpoint_that_is_not_finite_is_skipped_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = Checkpoints(Storage(str(tmp_path)))
    for step, value in ((1, 1.0), (2, float("nan"))):
        checkpoints.save(step, learned={"w": torch.full((3,), value)}, engine={}, meta={})
    found = checkpoints.load_latest()
    assert found is not None and found.step == 1 and "diverged: learned.w" in caplog.text
    with pytest.raises(CheckpointError, match="diverged"):
        checkpoints.load(2)


def test_tensors_that_are_not_finite_are_found_at_any_depth() -> None:
    whole = {"a": [torch.ones(2), {"b": torch.ones(1, dtype=torch.int64)}], "c": 1.0, "d": torch.ones(2)}
    assert find_not_finite(whole) is None and find_not_finite({}) is None
    whole["a"][1]["e"] = torch.tensor([1.0, float("-inf")]).bfloat16()
    assert find_not_finite(whole) == "a.1.e"


@pytest.mark.parametrize("steps", [3, 100])
def test_a_run_whose_gradients_are_all_zero_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    whole = TextualInversion.forward

    def constant(method: TextualInversion, batch: Any) -> Loss:
        loss = whole(method, batch)
        return loss._replace(total=loss.total * 0 + 1)

    monkeypatch.setattr(TextualInversion, "forward", constant)
    tree = embedding_tree(tmp_path, train__max_train_steps=steps, train__log_steps=5)
    with pytest.raises(RunFailed, match=f"exactly zero at each of {min(steps, 20)} steps"):
        run_worker(build_recipe(tree))
    assert kept_steps(tree) == [] and not (tmp_path / "run" / "exports").exists()


def test_some_steps_without_a_gradient_are_not_an_error(tmp_path: Path) -> None:
    """Test with a learning rate of 0 and with dropped captions, so that many steps have no gradient."""
    tree = embedding_tree(
        tmp_path,
        train__max_train_steps=30,
        train__train_batch_size=1,
        data__caption_dropout=0.5,
        optimizer__learning_rate=0.0,
    )
    assert run_worker(build_recipe(tree)).exit_reason == "completed"
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert {line["grad_norm"] == 0 for line in lines} == {True, False}
