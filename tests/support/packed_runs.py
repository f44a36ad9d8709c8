"""Recipes that are trained packed and alone, and the comparison of their run folders."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from method_cases import RATES, SECTIONS
from task_sources import ListSource

from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.packing.model import PackedModel
from dreamfleet.trainers.packing.runner import run_tasks
from dreamfleet.trainers.packing.task import Task
from dreamfleet.trainers.recipe import build_recipe
from dreamfleet.trainers.run.checkpoint import Checkpoint, Checkpoints
from dreamfleet.trainers.run.run import run_worker

Tree = dict[str, Any]

# Changes of a method's section that give other shapes than the section of the contract tests.
VARIANTS: dict[str, list[Tree]] = {
    "dreambooth": [
        {"lora_rank": 2},
        {"lora_rank": 5, "lora_alpha": 3, "train_text_encoder": False},
        {"lora_rank": 2, "lora_dropout": 0.3, "lora_target_modules": "locon"},
    ],
    "hypernetwork": [
        {"activation_func": "softmax", "use_dropout": True},
        {"layer_structure": [1, 3, 1], "add_layer_norm": False},
        {"activation_func": "mish"},
        {},
    ],
    "native": [{"lora_rank": 3}, {"lora_rank": 1, "train_text_encoder": False}],
    "prompt_tuning": [{}, {"num_vectors": 1, "rec_loss_w": 0.0, "cfg_scale": 2.0}],
    "textual_inversion": [{}, {"num_vectors": 1, "placeholder_token": "<other>"}],
}
RUN_CHANGES: list[Tree] = [
    {"train__train_batch_size": 1},
    {"train__train_batch_size": 2, "train__gradient_accumulation_steps": 2, "engine__use_ema": True},
    {
        "train__train_batch_size": 1,
        "optimizer__max_grad_norm": 0.1,
        "train__snr_gamma": 5.0,
        "train__loss_type": "huber",
        "train__multires_noise_iterations": 3,
        "train__ip_noise_gamma": 0.1,
        "train__timestep_sampling": "logit_normal",
    },
]


def packed_method(name: str) -> list[Tree]:
    return [{**SECTIONS[name], **change} for change in VARIANTS.get(name, [{}])]


def make_trees(folder: Path, methods: Sequence[Tree], **changes: Any) -> dict[str, Tree]:
    """Return recipes by name; they differ in method, seed, rate, batch size, accumulation and loss options."""
    trees = {}
    for number, method in enumerate(methods):
        own = RUN_CHANGES[number % len(RUN_CHANGES)]
        options = {
            "method": method,
            "train__seed": number,
            "train__max_train_steps": 3 + number % 2,
            "train__checkpointing_steps": 2,
            "optimizer__learning_rate": RATES[method["name"]] * (1 + number),
            # Adam divides by the gradient's size, so it enlarges rounding where a gradient is zero but for rounding.
            "optimizer__adam_epsilon": 1e-3,
            **own,
            **changes,
        }
        tree = tiny.make_recipe(folder, **options)
        trees[f"{method['name']}-{number}"] = tree
    return trees


def tasks_of(trees: dict[str, Tree], folder: Path, **options: Any) -> list[Task]:
    return [Task(name, {**tree, "output_dir": str(folder / name)}, **options) for name, tree in trees.items()]


def run_packed(trees: dict[str, Tree], folder: Path, *, capacity: int = 0) -> ListSource:
    source = ListSource(tasks_of(trees, folder))
    run_tasks(source, capacity=capacity or len(trees))
    return source


def run_alone(trees: dict[str, Tree], folder: Path, **options: Any) -> None:
    for name, tree in trees.items():
        run_worker(build_recipe({**tree, "output_dir": str(folder / name)}), **options)


def last_checkpoint(folder: Path) -> Checkpoint:
    found = Checkpoints(Storage(str(folder))).load_latest()
    assert found is not None
    return found


MEASURED = ("loss", "holdout_loss", "view_loss", "overfitting")


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_equal_runs(packed: Path, alone: Path) -> None:
    """Check that two run folders have the same files, nearly equal losses, and nearly equal weights and averages."""
    ours, theirs = last_checkpoint(packed), last_checkpoint(alone)
    assert ours.step == theirs.step
    states = [(ours.learned, theirs.learned)]
    if "ema" in theirs.engine:
        states.append((ours.engine["ema"], theirs.engine["ema"]))
    for mine, other in states:
        assert mine.keys() == other.keys()
        for key, tensor in other.items():
            assert torch.allclose(mine[key], tensor, rtol=1e-3, atol=2e-5), (packed.name, key)
    ours_lines, theirs_lines = metrics(packed), metrics(alone)
    assert [line["step"] for line in ours_lines] == [line["step"] for line in theirs_lines]
    for one, other in zip(ours_lines, theirs_lines, strict=True):
        for key in {*MEASURED} & other.keys():
            assert one[key] == pytest.approx(other[key], rel=1e-4, abs=1e-6), (packed.name, key)
        assert one.get("lr") == other.get("lr")
    # A stop adds a checkpoint, a log and events, and the files of the next attempt carry its number.
    passing = {f"step-{step:06d}" for step in range(ours.step)}
    files = [
        sorted(
            re.sub(r"\.attempt-\d+", "", p.relative_to(folder).as_posix())
            for p in folder.rglob("*")
            if p.name != "run.log" and not {*passing, "events"} & set(p.relative_to(folder).parts)
        )
        for folder in (packed, alone)
    ]
    assert files[0] == files[1]


def out_of_memory_above(limit: int) -> Callable[..., Any]:
    predict = PackedModel.predict

    def limited(model: PackedModel, members: Sequence[Any], *inputs: Any) -> Any:
        predicted = predict(model, members, *inputs)
        if len(members) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return predicted

    return limited
