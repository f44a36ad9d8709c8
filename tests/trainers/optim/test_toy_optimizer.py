"""Test an optimizer from outside this project, registered in the process or by an installed package."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from toy_packages import install_example, load_example

from dreamfleet.datasets.errors import RecipeError, UserError
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.config.optimizers import OPTIMIZERS
from dreamfleet.trainers.memory.plan import plan_memory
from dreamfleet.trainers.recipe import build_recipe
from dreamfleet.trainers.run.checkpoint import Checkpoints
from dreamfleet.trainers.run.run import run_worker

ROOT = Path(__file__).parents[3]


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    module = load_example("toy_optimizer", monkeypatch)
    OPTIMIZERS.register("nadam")(module.NADAM)
    yield module
    OPTIMIZERS.unregister("nadam")


def tree(folder: Path, **changes: Any) -> dict[str, Any]:
    return tiny.make_recipe(
        folder, optimizer__name="nadam", optimizer__options={"momentum_decay": 0.01}, **changes
    )


def test_a_registered_optimizer_trains_resumes_and_is_planned(toy: Any, tmp_path: Path) -> None:
    whole = run_worker(build_recipe(tree(tmp_path)))
    assert whole.steps == 4 and whole.exports
    half = tree(tmp_path, output_dir=str(tmp_path / "half"), train__max_train_steps=2)
    run_worker(build_recipe(half))
    half["train"]["max_train_steps"] = 4
    assert run_worker(build_recipe(half), resume=True).start_step == 2
    straight, resumed = (Checkpoints(Storage(tmp_path / run)).load(4) for run in ("run", "half"))
    assert all(torch.equal(value, resumed.learned[key]) for key, value in straight.learned.items())
    (group,) = straight.engine["optimizer"]["param_groups"]
    assert group["momentum_decay"] == 0.01 and group["weight_decay"] == 0.01
    states = straight.engine["optimizer"]["state"].values()
    held = sum(value.nbytes for state in states for value in state.values())
    assert plan_memory(build_recipe(tree(tmp_path))).estimates[0].gpu["optimizer"] == held


def test_its_mistakes_are_recipe_errors(toy: Any, tmp_path: Path) -> None:
    wrong = tree(tmp_path, engine={"zero_stage": 2})
    wrong["optimizer"]["options"] = {"momentum_decay": 1}
    with pytest.raises(RecipeError, match=r"nadam does not go with engine\.zero_stage: 2"):
        build_recipe(wrong)
    wrong["optimizer"]["options"] = {"momentum_dcay": 1}
    with pytest.raises(RecipeError, match=r"optimizer\.options\.momentum_dcay: .*momentum_decay"):
        build_recipe(wrong)
    with pytest.raises(UserError, match=r"'broken' .*is no Optimizer"):
        OPTIMIZERS.register("broken")(dict)  # type: ignore[arg-type]


def test_an_installed_package_adds_an_optimizer(tmp_path: Path) -> None:
    environment = install_example(
        tmp_path / "site", "toy_optimizer", group="optimizers", entry="nadam = NADAM"
    )
    recipe = tiny.write_recipe(tmp_path / "toy.yaml", tree(tmp_path))
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'docs')!r}); import write_recipes; print(write_recipes.write())\n"
        f"from dreamfleet.trainers.recipe import load_recipe; print(load_recipe({str(recipe)!r}).optimizer.name)"
    )
    page = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert page.returncode == 0, page.stderr
    assert "| `nadam` |" in page.stdout and "| `momentum_decay` |" in page.stdout
    assert page.stdout.endswith("nadam\n")
