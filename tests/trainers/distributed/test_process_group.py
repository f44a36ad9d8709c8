"""Test that process groups are destroyed after everything that uses them; a hang prints all stacks."""

from __future__ import annotations

import json
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import group_ends
import pytest
import tiny
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from dreamfleet.trainers.distributed.context import WAIT, DistributedContext
from dreamfleet.trainers.distributed.process_group import STEP_TIMEOUT, lone_group, step_timeouts
from dreamfleet.trainers.engines import zero_engine
from dreamfleet.trainers.recipe import build_recipe
from dreamfleet.trainers.run import dry_run

LONGEST = 240  # seconds until a hanging process is killed


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Return the results of both ranks for every way in which a run ends; index 0 is rank 0."""
    folder = tmp_path_factory.mktemp("ends")
    ranks = subprocess.run(
        [sys.executable, group_ends.__file__, str(folder)], capture_output=True, text=True, timeout=LONGEST
    )
    assert ranks.returncode == 0, ranks.stderr
    return [json.loads((folder / f"seen-{rank}.json").read_text()) for rank in range(group_ends.WORLD)]


@pytest.mark.parametrize("how", group_ends.ENDS)
def test_a_group_can_be_destroyed_however_a_worker_ends(how: str, seen: list[dict[str, Any]]) -> None:
    errors = {"completed": "NoneType", "is interrupted": "KeyboardInterrupt"}
    for rank in seen:
        assert rank[how] == {"error": errors.get(how, "RuntimeError")}


def test_a_group_ends_after_a_reducer_that_a_traceback_keeps() -> None:
    def train() -> None:
        module = DistributedDataParallel(torch.nn.Linear(3, 3))
        made.extend([weakref.ref(module.reducer), weakref.ref(module.logger)])
        module(torch.ones(2, 3)).sum().backward()
        raise RuntimeError("planted")

    made: list[weakref.ref[Any]] = []
    with pytest.raises(RuntimeError, match="planted") as kept, lone_group():
        train()
    assert kept.tb is not None and not dist.is_initialized()
    assert [reference() for reference in made] == [None, None]


def test_an_existing_group_is_kept(lone_group: None) -> None:
    from dreamfleet.trainers.distributed import process_group

    with process_group.lone_group():
        pass
    assert dist.is_initialized()


@pytest.mark.parametrize("distributed", ["make_optimizer", "zero_config"])
def test_an_engine_that_cannot_be_built_leaves_no_group(
    distributed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise MemoryError("planted")

    monkeypatch.setattr(zero_engine, distributed, fail)
    recipe = build_recipe(tiny.make_recipe(tmp_path, engine={"zero_stage": 1}))
    with pytest.raises(MemoryError, match="planted"):
        dry_run.check_run(recipe)
    assert not dist.is_initialized()


def timeout_of(group: Any) -> Any:
    return group._get_backend(torch.device("cpu")).options._timeout


def test_groups_created_by_a_library_get_the_step_timeout() -> None:
    with lone_group():
        patient = DistributedContext(world=2).group  # ranks wait in this group while one of them uploads
        with step_timeouts():
            made = dist.new_group(backend="gloo")
        assert timeout_of(made) == STEP_TIMEOUT
        assert timeout_of(patient) == WAIT > STEP_TIMEOUT
