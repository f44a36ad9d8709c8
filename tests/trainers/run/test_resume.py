"""Tests that a resumed run equals an uninterrupted one bit for bit, and skips damaged checkpoints."""

from __future__ import annotations

import gc
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from small_runs import assert_same, final_state, recipe_tree

from dreamfleet.datasets.errors import RunFailed, StorageError
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.distributed.context import DistributedContext
from dreamfleet.trainers.launch import fit
from dreamfleet.trainers.recipe import build_recipe
from dreamfleet.trainers.report.metrics_log import read_metrics
from dreamfleet.trainers.run.checkpoint import Checkpoint, Checkpoints
from dreamfleet.trainers.run.checkpointing import Checkpointing
from dreamfleet.trainers.run.evaluation import Evaluation
from dreamfleet.trainers.run.restore import newest_checkpoint
from dreamfleet.trainers.run.run import run_worker
from dreamfleet.trainers.run.stopwatch import Clock

TEXTUAL_INVERSION = {"name": "textual_inversion", "placeholder_token": "<x>", "num_vectors": 2}


#: Options that draw random numbers of their own.
RANDOM = {
    "train__noise_offset": 0.1,
    "train__noise_offset_random_strength": True,
    "train__multires_noise_iterations": 3,
    "train__ip_noise_gamma": 0.1,
    "train__ip_noise_gamma_random_strength": True,
    "train__timestep_sampling": "later",
    "train__timestep_bias_multiplier": 3.0,
    "train__loss_type": "smooth_l1",
}


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ({"name": "dreambooth", "train_text_encoder": True}, {}),
        (TEXTUAL_INVERSION, {}),
        ({"name": "native", "lora_rank": 2, "lora_dropout": 0.2}, RANDOM),
    ],
)
def test_a_run_stopped_twice_equals_an_uninterrupted_one(
    tmp_path: Path, method: dict[str, Any], options: dict[str, Any]
) -> None:
    straight = recipe_tree(tmp_path, "straight", method=method, **options)
    run_worker(build_recipe(straight))
    broken = recipe_tree(tmp_path, "broken", method=method, **options)
    first = run_worker(build_recipe(broken), should_stop=tiny.Stop(1))
    assert first.exit_reason == "interrupted" and 0 < first.steps < 6
    second = run_worker(build_recipe(broken), resume=True, should_stop=tiny.Stop(1))
    assert second.exit_reason == "interrupted" and first.steps < second.steps < 6
    third = run_worker(build_recipe(broken), resume=True)
    assert third.exit_reason == "completed" and third.start_step == second.steps
    assert_same(final_state(straight), final_state(broken))


def test_a_run_killed_by_sigkill_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    straight, killed = recipe_tree(tmp_path, "straight"), recipe_tree(tmp_path, "killed")
    run_worker(build_recipe(straight))
    path = tiny.write_recipe(tmp_path / "killed.yaml", killed)
    script = (
        "import os, signal, sys, time\n"
        "from dreamfleet.datasets.storage.storage import Storage\n"
        "from dreamfleet.trainers.run.checkpoint import Checkpoints\n"
        "from dreamfleet.trainers.recipe import load_recipe\n"
        "from dreamfleet.trainers.run.run import run_worker\n"
        "polls = iter(range(99))\n"
        f"checkpoints = Checkpoints(Storage({killed['output_dir']!r}))\n"
        "def kill():\n"
        "    if next(polls) < 3: return False\n"
        "    while checkpoints.steps() != [2]: time.sleep(0.01)\n"  # saves are written in the background
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        f"run_worker(load_recipe({str(path)!r}), should_stop=kill)\n"
    )
    # As many threads as in this process: the summation order of a matrix product depends on the number.
    threads = f"import torch; torch.set_num_threads({torch.get_num_threads()})\n"
    ended = subprocess.run(
        [sys.executable, "-c", threads + script], capture_output=True, text=True, check=False
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr[-2000:]
    assert Checkpoints(Storage(killed["output_dir"])).steps() == [2]
    summary = run_worker(build_recipe(killed), resume=True)
    assert summary.start_step == 2
    assert_same(final_state(straight), final_state(killed))
    steps = [
        json.loads(line)["step"] for line in (tmp_path / "killed/metrics.jsonl").read_text().splitlines()
    ]
    assert steps == sorted(set(steps)) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("part", ["measure", "draw"])
def test_a_run_killed_between_a_checkpoint_and_its_validation_repeats_the_validation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    tiny.make_images(tmp_path / "holdout", 1, seed=5)
    validation = {
        "steps": 2, "holdout": str(tmp_path / "holdout"), "holdout_timesteps": 1, "sample_at_first": False,
        "prompts": ["a <x>"], "num_images": 1, "num_inference_steps": 1,
    }  # fmt: skip
    trees = [
        recipe_tree(tmp_path, name, method=TEXTUAL_INVERSION, validation=validation)
        for name in ("straight", "killed")
    ]
    run_worker(build_recipe(trees[0]))
    calls, original = iter(range(9)), getattr(Evaluation, part)

    def kill(*given: Any) -> Any:
        if next(calls) == 1:
            raise KeyboardInterrupt
        return original(*given)

    monkeypatch.setattr(Evaluation, part, kill)
    with pytest.raises(KeyboardInterrupt):
        run_worker(build_recipe(trees[1]))
    monkeypatch.undo()
    assert run_worker(build_recipe(trees[1]), resume=True).start_step == 4
    runs = [Storage(tree["output_dir"]) for tree in trees]
    rounds = [[line for line in read_metrics(run) if "holdout_loss" in line] for run in runs]
    assert [line["step"] for line in rounds[0]] == [2, 4, 6] and rounds[0] == rounds[1]
    assert runs[0].list("samples") == runs[1].list("samples")
    assert Checkpoints(runs[0]).steps() == Checkpoints(runs[1]).steps()


def test_a_damaged_checkpoint_is_skipped_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = Checkpoints(Storage(str(tmp_path)))
    for step in (1, 2, 3, 4):
        checkpoints.save(step, learned={"w": torch.full((3,), float(step))}, engine={}, meta={})
    folder = tmp_path / "checkpoints"
    (folder / "step-000004" / "manifest.json").unlink()
    weights = folder / "step-000003" / "learned.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\0")
    (folder / "step-000002" / "engine.pt").unlink()
    found = checkpoints.load_latest()
    assert found is not None and found.step == 1
    assert "learned.safetensors" in caplog.text and "engine.pt" in caplog.text


def damage(run: Path, step: int) -> None:
    weights = run / "checkpoints" / f"step-{step:06d}" / "learned.safetensors"
    data = weights.read_bytes()
    weights.unlink()  # not overwritten: a process may still map the old file
    weights.write_bytes(data[:-4] + b"\0\0\0\1")


def test_a_damaged_checkpoint_is_rewritten_at_its_step(tmp_path: Path) -> None:
    tree = recipe_tree(tmp_path, "run")
    run_worker(build_recipe(tree))
    before = final_state(tree)
    damage(tmp_path / "run", 6)
    assert run_worker(build_recipe(tree), resume=True).start_step == 4
    assert_same(final_state(tree), before)


def test_damaged_checkpoints_do_not_displace_intact_ones(tmp_path: Path) -> None:
    checkpoints = Checkpoints(Storage(str(tmp_path)), limit=1)
    checkpoints.save(5, learned={"w": torch.ones(3)}, engine={}, meta={})
    damage(tmp_path, 5)
    checkpoints.save(4, learned={"w": torch.ones(3)}, engine={}, meta={})
    found = checkpoints.load_latest()
    assert found is not None and found.step == 4


@dataclass(eq=False)
class RankOne(DistributedContext):
    """Rank 1 of two, without rank 0: ``on_rank_0`` returns ``heard`` and adds an entry to ``waits``."""

    rank: int = 1
    world: int = 2
    heard: Any = None
    waits: list[bool] = field(default_factory=list)

    def on_rank_0(self, work: Callable[[], Any]) -> Any:
        self.waits.append(True)
        return self.heard

    def on_every_rank(self, work: Callable[[], Any]) -> Any:
        return work()

    def gather(self, value: Any) -> list[Any]:
        return [value, value]


def test_a_worker_that_is_late_for_a_save_waits_like_the_others(tmp_path: Path) -> None:
    """Test that a rank takes part in a save even if rank 0 has already written all files.

    A rank that returned early would leave rank 0 waiting forever.
    """
    checkpoints, distributed = Checkpoints(Storage(str(tmp_path))), RankOne()
    checkpoints.save(2, learned={"w": torch.zeros(1)}, engine={}, meta={})
    engine: Any = SimpleNamespace(weights=dict, state=dict, lockstep=False)
    recipe = build_recipe(recipe_tree(tmp_path, "run"))
    parts: Any = SimpleNamespace(engine=engine, distributed=distributed, recipe=recipe)
    checkpointing = Checkpointing(parts, checkpoints, Clock())
    checkpointing.save(2)
    assert distributed.waits == [True]
    checkpointing.save(2)  # a stop right after the save: no rank saves again
    assert distributed.waits == [True]


def test_all_workers_resume_from_the_checkpoint_that_rank_0_found(tmp_path: Path) -> None:
    checkpoints = Checkpoints(Storage(str(tmp_path)))
    for step in (1, 2):
        checkpoints.save(step, learned={"w": torch.full((3,), float(step))}, engine={}, meta={})
    found = newest_checkpoint(checkpoints, RankOne(heard=1))  # rank 0 could not read the checkpoint of step 2
    assert found is not None and found.step == 1
    assert newest_checkpoint(checkpoints, RankOne(heard=None)) is None
    newest = newest_checkpoint(checkpoints, DistributedContext())
    assert newest is not None and newest.step == 2


def test_no_checkpoint_data_stays_in_memory_after_a_resume(tmp_path: Path) -> None:
    tree = recipe_tree(tmp_path, "run")
    run_worker(build_recipe(tree), should_stop=tiny.Stop(2))
    held: list[int] = []

    def look() -> bool:
        held.append(sum(type(thing) is Checkpoint for thing in gc.get_objects()))
        return False

    assert run_worker(build_recipe(tree), resume=True, should_stop=look).start_step
    assert held and not any(held)


def test_a_resume_without_a_checkpoint_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recipe = build_recipe(recipe_tree(tmp_path, "run", scaling__num_workers=0))
    with caplog.at_level("INFO", "dreamfleet"):
        assert fit(recipe, resume=True).summary.start_step == 0
        assert "starting at step 0" in caplog.text
        caplog.clear()
        assert fit(recipe, resume=True).summary.start_step == 6
    assert "starting at step 0" not in caplog.text


def test_a_resumed_finished_run_keeps_its_measurements(tmp_path: Path) -> None:
    tree = recipe_tree(tmp_path, "run", method=TEXTUAL_INVERSION)
    first = run_worker(build_recipe(tree))
    again = run_worker(build_recipe(tree), resume=True)
    assert (again.start_step, again.figures["loss"]) == (6, first.figures["loss"])
    summary = json.loads((Path(tree["output_dir"]) / "summary.json").read_text())
    assert summary["figures"]["loss"] == first.figures["loss"]


def test_old_checkpoints_are_removed_only_beyond_the_limit(tmp_path: Path) -> None:
    checkpoints = Checkpoints(Storage(str(tmp_path)), limit=2)
    for step in (1, 2, 3, 10):
        checkpoints.save(step, learned={"w": torch.zeros(1)}, engine={}, meta={})
    assert checkpoints.steps() == [3, 10]


def test_a_full_disk_while_saving_is_reported_and_keeps_the_earlier_checkpoint() -> None:
    # Not under tmp_path, as pytest cannot remove a folder that contains a mount.
    disk = Path(tempfile.mkdtemp(prefix="dreamfleet-small-disk-"))
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode:
        disk.rmdir()
        pytest.skip("mounting a small disk needs root")
    try:
        checkpoints = Checkpoints(Storage(str(disk)))
        checkpoints.save(1, learned={"w": torch.zeros(1000)}, engine={}, meta={})
        with pytest.raises(StorageError, match=r"step 2(.|\n)*step 1"):
            checkpoints.save(2, learned={"w": torch.zeros(1_000_000)}, engine={}, meta={})
        with pytest.raises(StorageError, match="saved"):
            checkpoints.save(3, learned={}, engine={"m": torch.zeros(1_000_000)}, meta={})
        assert checkpoints.steps() == [1]
        assert checkpoints.load_latest().step == 1
        assert not [p for p in disk.rglob("*") if p.is_file() and "step-000001" not in str(p)]
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
        disk.rmdir()


def test_a_loss_that_is_not_finite_ends_the_run_with_remedies(tmp_path: Path) -> None:
    tree = recipe_tree(
        tmp_path,
        "run",
        optimizer__learning_rate=1e30,
        optimizer__max_grad_norm=0,
        optimizer__lr_scheduler="constant",
    )
    with pytest.raises(RunFailed, match="learning rate"):
        run_worker(build_recipe(tree))
