"""Test an engine from outside this project, registered in the process or by an installed package."""

from __future__ import annotations

import json
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
from dreamfleet.trainers.config.engines import ENGINES
from dreamfleet.trainers.memory.plan import plan_memory
from dreamfleet.trainers.recipe import build_recipe
from dreamfleet.trainers.run.dry_run import check_run
from dreamfleet.trainers.run.run import run_worker

ROOT = Path(__file__).parents[3]


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    module = load_example("toy_engine", monkeypatch)
    yield module.ToyEngine
    ENGINES.unregister("toy")


def toy_tree(folder: Path, **changes: Any) -> dict[str, Any]:
    engine = {"name": "toy", "options": {"gradient_norm": 0.5}}
    return tiny.make_recipe(folder, engine=engine, train__checkpointing_steps=2, **changes)


def weights_of(run: Path, step: int) -> dict[str, torch.Tensor]:
    (file,) = (run / "checkpoints" / f"step-{step:06d}").glob("learned*")
    from safetensors.torch import load_file

    return load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)


def test_a_registered_engine_trains_resumes_and_exports(
    toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    norms: list[float] = []
    step = toy.step

    def watched(engine: Any, rates: dict[str, float], number: int) -> torch.Tensor:
        optimizer_step = engine.optimizer.step

        def scaled() -> None:
            norms.append(float(torch.nn.utils.get_total_norm([p.grad for p in engine.params.values()])))
            optimizer_step()

        with monkeypatch.context() as patch:
            patch.setattr(engine.optimizer, "step", scaled)
            return step(engine, rates, number)

    monkeypatch.setattr(toy, "step", watched)
    whole = run_worker(build_recipe(toy_tree(tmp_path)))
    assert whole.steps == 4 and whole.exports and "toy" in whole.engine
    assert norms == pytest.approx([0.5] * 4, rel=1e-4)
    half = toy_tree(tmp_path, output_dir=str(tmp_path / "half"), train__max_train_steps=2)
    run_worker(build_recipe(half))
    half["train"]["max_train_steps"] = 4
    assert run_worker(build_recipe(half), resume=True).start_step == 2
    straight, resumed = weights_of(tmp_path / "run", 4), weights_of(tmp_path / "half", 4)
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(value, resumed[name]) for name, value in straight.items())


def test_check_runs_a_registered_engine_and_plan_reports_no_support(toy: Any, tmp_path: Path) -> None:
    recipe = build_recipe(toy_tree(tmp_path))
    assert all(line.ok for line in check_run(recipe))
    with pytest.raises(UserError, match=r"engine\.name: toy .*memory plan"):
        plan_memory(recipe)


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ({"name": "tpy"}, r"engine\.name: engine 'tpy' .*'toy'"),
        ({"name": "toy", "options": {"gradient_nrm": 1}}, r"engine\.options\.gradient_nrm: .*gradient_norm"),
        (
            {"name": "toy", "options": {"gradient_norm": 0}},
            r"engine\.options\.gradient_norm: .*greater than 0",
        ),
        ({"name": "toy", "zero_stage": 2}, "zero_stage"),
        ({"name": "toy", "use_ema": True}, r"engine\.use_ema: True .*engine\.name: toy"),
        ({"name": "torch", "options": {"gradient_norm": 1}}, r"engine\.options\.gradient_norm"),
        ({"name": "zero"}, "zero_stage"),
    ],
)
def test_unsupported_settings_are_recipe_errors(
    toy: Any, tmp_path: Path, engine: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        build_recipe(tiny.make_recipe(tmp_path, engine=engine))


def test_a_registered_object_must_be_an_engine(tmp_path: Path) -> None:
    ENGINES.register("broken")(dict)  # type: ignore[type-var]
    try:
        with pytest.raises(UserError, match=r"engine\.name: .*broken"):
            build_recipe(tiny.make_recipe(tmp_path, engine={"name": "broken"}))
    finally:
        ENGINES.unregister("broken")


def test_an_installed_package_adds_an_engine_to_command_line_and_docs(tmp_path: Path) -> None:
    environment = install_example(tmp_path / "site", "toy_engine", group="engines", entry="toy = ToyEngine")
    recipe = tiny.write_recipe(tmp_path / "toy.yaml", toy_tree(tmp_path))

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False
        )

    command = ("-m", "dreamfleet.cluster.cli")
    trained = run(*command, "train", str(recipe))
    assert trained.returncode == 0, trained.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["engine"].startswith("toy (")
    assert "name: toy" in (tmp_path / "run" / "recipe.yaml").read_text()
    planned = run(*command, "plan", str(recipe))
    assert planned.returncode == 2 and "engine.name: toy" in planned.stderr
    page = run(
        "-c",
        f"import sys; sys.path.insert(0, {str(ROOT / 'docs')!r}); import write_recipes as w; print(w.write())",
    )
    assert page.returncode == 0, page.stderr
    assert "`toy`" in page.stdout and "gradient_norm" in page.stdout
