"""Tests the predicted memory of packed trainings, and the number of slots that fit."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from memory_plans import count
from typer.testing import CliRunner

from dreamfleet.cluster.cli import program
from dreamfleet.trainers.distributed.context import DistributedContext
from dreamfleet.trainers.memory import slots
from dreamfleet.trainers.memory.estimate import CUDA_CONTEXT, GIB, KERNEL_WORKSPACE
from dreamfleet.trainers.memory.inputs import Counts, Pass
from dreamfleet.trainers.memory.slots import SlotMemory, choose_slots, combine, profile_slots, slots_that_fit
from dreamfleet.trainers.recipe import Recipe, build_recipe

LORA = {"name": "dreambooth", "lora_rank": 4}


def lora_recipe(folder: Path, **changes: Any) -> Recipe:
    return build_recipe(tiny.make_recipe(folder, method=LORA, **changes))


def test_the_most_slots_that_fit() -> None:
    memory = SlotMemory(shared=100, held=2, first=10, further=8)
    assert [memory.total(slots) for slots in (1, 2, 3)] == [112, 122, 132]
    assert [slots_that_fit(memory, size, 8) for size in (111, 112, 131, 132, 1000)] == [0, 1, 2, 3, 8]


def test_a_slot_alone_may_need_more_than_the_pack() -> None:
    memory = SlotMemory(shared=100, held=2, first=10, further=8, alone=50, waiting=1)
    assert memory.total(1) == 152
    assert memory.total(3) == 100 + 6 + 50 + 2
    assert memory.total(20) == 100 + 40 + 10 + 19 * 8


def test_frozen_parts_count_once_and_trainable_ones_per_slot(tmp_path: Path) -> None:
    changes = {"method": LORA, "engine": {"use_ema": True}}
    counts = count(tmp_path, **changes)
    profile = profile_slots(build_recipe(tiny.make_recipe(tmp_path, **changes)))
    assert profile.gpu.shared == CUDA_CONTEXT + KERNEL_WORKSPACE + counts.frozen
    states = 4 * counts.total + 8 * counts.total + 4 * len(counts.learning) + 4 * counts.total
    assert profile.gpu.held == states + counts.text_embeddings
    # A checkpoint's copy of the states is in host memory.
    assert profile.gpu_host.held == counts.latents + states
    assert profile.cpu.held == profile.gpu.held + counts.latents + states
    # Of a pass only the images' activations and the gradients grow with the slots.
    gradients = 4 * counts.total
    assert profile.gpu.first == pytest.approx(counts.full.activations + gradients, rel=0.1)
    assert 0.7 * profile.gpu.first < profile.gpu.further < 1.1 * profile.gpu.first


def test_low_precision_copies_of_trained_weights_count_for_every_slot() -> None:
    one, two = Pass(held=10, activations=100, together=100, casts=7), Pass(20, 193, 193, casts=7)
    counts = Counts((10,), frozen=0, model=0, full=one, half=one, bucket=0)
    profile = combine(counts, two, two)
    # 100 + 93 for the images of two slots, 40 for the gradients and 7 for the copies of the second slot.
    assert profile.gpu.further == 93 + 40 + 7


def test_gradients_of_waiting_slots_are_held_while_others_accumulate() -> None:
    one, two = Pass(10, 100, 120), Pass(20, 200, 220)
    counts = Counts((10,), frozen=0, model=0, full=one, half=one, bucket=0, drawing=500)
    assert combine(counts, two, two).gpu.waiting == 0
    assert combine(replace(counts, micros=2), two, two).gpu.waiting == 40


def cpu() -> DistributedContext:
    return DistributedContext(device=torch.device("cpu"))


def test_the_recipe_or_the_memory_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = lora_recipe(tmp_path)
    profile = profile_slots(recipe)
    monkeypatch.setattr(slots, "host_memory", lambda: 2 * profile.cpu.total(5))
    assert choose_slots(recipe, cpu()) == 8
    assert choose_slots(recipe, cpu(), host_share=0.5) == 5
    assert choose_slots(recipe, cpu(), host_share=0.5, limit=3) == 3
    monkeypatch.setattr(slots, "host_memory", lambda: GIB)
    assert choose_slots(recipe, cpu()) == 1, "a run that does not fit fails by itself, with its own message"
    assert (
        choose_slots(lora_recipe(tmp_path, scaling={"num_workers": 0, "slots_per_worker": 12}), cpu()) == 12
    )


def test_plan_states_the_slots_and_the_disk(tmp_path: Path) -> None:
    path = str(tiny.write_recipe(tmp_path / "recipe.yaml", tiny.make_recipe(tmp_path, method=LORA)))
    limits = ["--gpu-memory", "8GiB", "--host-memory", "8GiB"]
    shown = CliRunner().invoke(program.app, ["plan", path, *limits])
    assert shown.exit_code == 0 and "32 fit on the GPU" in shown.stdout and "On a CPU 8 fit" in shown.stdout
    assert "On disk, a run needs" in shown.stdout
    answer = json.loads(CliRunner().invoke(program.app, ["plan", path, *limits, "--json"]).stdout)
    assert answer["slots"]["gpu"]["fit"] == 32 and answer["slots"]["unpackable"] is None
    assert (
        answer["disk"]["run"]["peak"]
        > answer["disk"]["run"]["total"]
        > answer["disk"]["run"]["checkpoints"]
        > 0
    )
    whole = CliRunner().invoke(program.app, ["plan", path, "method={name: native}"])
    assert "cannot be packed: method.name: native without lora_rank" in whole.stdout
