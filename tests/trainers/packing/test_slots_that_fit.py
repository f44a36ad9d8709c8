"""Tests that a runner starts no more trainings at once than its memory is predicted to hold."""

from pathlib import Path
from typing import Any

import pytest
import tiny
from task_sources import ListSource

from dreamfleet.trainers.memory import slots
from dreamfleet.trainers.memory.slots import profile_slots
from dreamfleet.trainers.packing.runner import run_tasks
from dreamfleet.trainers.packing.task import Task
from dreamfleet.trainers.recipe import build_recipe


class Counting(ListSource):
    """Counts the most tasks that were in progress at once."""

    most = 0

    def on_start(self, task: Task) -> None:
        super().on_start(task)
        self.most = max(self.most, len(self.starts) - len(self.ends))


def test_memory_limits_the_slots_unless_the_recipe_sets_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(name: str, wanted: int | str) -> dict[str, Any]:
        return tiny.make_recipe(
            tmp_path,
            method={"name": "dreambooth", "lora_rank": 2},
            output_dir=str(tmp_path / f"{name}-{wanted}"),
            train__max_train_steps=1,
            scaling__slots_per_worker=wanted,
        )

    profile = profile_slots(build_recipe(make("none", "auto")))
    monkeypatch.setattr(slots, "host_memory", lambda: 2 * profile.cpu.total(2))
    for wanted, most in (("auto", 2), (3, 3)):
        source = Counting([Task(name, make(name, wanted)) for name in "abcd"])
        run_tasks(source, capacity=4, host_share=0.5)
        assert [end.exit_reason for end in source.ends.values()] == ["completed"] * 4
        assert source.most == most
