"""A runner whose tasks cannot start, or whose passes fail."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from task_sources import ListSource

from dreamfleet.trainers.engines.torch_engine import TorchEngine
from dreamfleet.trainers.packing.runner import run_tasks
from dreamfleet.trainers.packing.task import Task


def make_task(folder: Path, name: str, **changes: Any) -> Task:
    word = {"name": "textual_inversion", "placeholder_token": "<x>", "initializer_token": "cat"}
    options = {"method": word, "data__instance_prompt": None, "data__class_prompt": None, **changes}
    return Task(name, tiny.make_recipe(folder, output_dir=str(folder / name), **options))


def test_a_model_that_cannot_be_loaded_fails_its_task_and_not_the_others(tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    path = str(tmp_path / "broken")
    broken = make_task(tmp_path, "one", model={"pretrained_model_name_or_path": path})
    source = ListSource([broken, make_task(tmp_path, "two", train__max_train_steps=1)])
    run_tasks(source, capacity=2)
    assert source.ends["one"].exit_reason == "failed" and source.ends["one"].kind == "ModelError"
    assert source.ends["two"].exit_reason == "completed"


def test_a_task_that_waits_for_the_others_ends_as_interrupted(tmp_path: Path) -> None:
    """The second task cannot be packed with the first."""
    first = make_task(tmp_path, "one", train__max_train_steps=500)
    second = make_task(tmp_path, "two", optimizer__fused_backward=True, optimizer__max_grad_norm=0)
    source = ListSource([first, second])
    run_tasks(source, capacity=2, should_stop=lambda: not source.left)
    assert {name: end.exit_reason for name, end in source.ends.items()} == dict.fromkeys(
        ("one", "two"), "interrupted"
    )
    assert [task.name for task in source.starts] == ["one"]


def test_a_pass_that_fails_ends_its_unpacked_training_and_not_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backward, calls = TorchEngine.backward, iter(range(100))

    def fail_once(engine: TorchEngine, *args: Any, **kwargs: Any) -> Any:
        if next(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return backward(engine, *args, **kwargs)

    monkeypatch.setattr(TorchEngine, "backward", fail_once)
    names = ("one", "two")
    source = ListSource(
        [
            make_task(tmp_path, name, method={"name": "dreambooth"}, data__instance_prompt="a cat")
            for name in names
        ]
    )
    run_tasks(source, capacity=2)
    assert source.ends["one"].exit_reason == "failed" and source.ends["one"].kind == "ResourceError"
    assert source.ends["two"].exit_reason == "completed"
