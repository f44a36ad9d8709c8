"""Test that a method outside the package is one file, registered in-process or by an installed package."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import tiny
import torch
import yaml
from method_contract import check_method
from small_runs import assert_same, recipe_tree
from toy_packages import install_example, load_example
from typer.testing import CliRunner

from dreamfleet.cluster.cli import program
from dreamfleet.datasets.errors import RecipeError, UserError
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.config.method import METHODS, MethodConfig
from dreamfleet.trainers.methods.base import Method, method_class
from dreamfleet.trainers.models.formats.embedding import read_embedding
from dreamfleet.trainers.packing.runner import train_packed
from dreamfleet.trainers.recipe import build_recipe
from dreamfleet.trainers.run.checkpoint import Checkpoints
from dreamfleet.trainers.run.run import run_worker

NAME = "anchored_inversion"
SECTION = {"name": NAME, "placeholder_token": "<toy>", "initializer_token": "cat"}


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Load the example's module and register its method; yield the module."""
    module = load_example("toy_method", monkeypatch)
    METHODS.register(NAME)(module.AnchoredInversionConfig)
    yield module
    METHODS.unregister(NAME)


def make_tree(folder: Path, **changes: Any) -> dict[str, Any]:
    options = {
        "method": SECTION,
        "data__instance_prompt": "a photo of <toy>",
        "optimizer__learning_rate": 5e-2,
        "train__max_train_steps": 2,
        **changes,
    }
    return tiny.make_recipe(folder, **options)


def command(*arguments: Any) -> str:
    result = CliRunner().invoke(program.app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output + result.stderr
    return result.stdout


@pytest.mark.usefixtures("toy")
def test_a_registered_method_keeps_the_contract(tmp_path: Path) -> None:
    images = str(tiny.make_images(tmp_path / "one", 1))
    tree = make_tree(tmp_path, data__instance_data_dir=images, train__train_batch_size=1)
    check_method(build_recipe(tree), tmp_path)


@pytest.mark.usefixtures("toy")
def test_trainings_of_a_method_from_outside_share_the_passes_of_a_model(tmp_path: Path) -> None:
    trees = [
        make_tree(
            tmp_path, train__seed=seed, method={**SECTION, "anchor_weight": 0.5}, optimizer__adam_epsilon=1e-3
        )
        for seed in range(3)
    ]
    packed, alone = (
        [build_recipe({**tree, "output_dir": str(tmp_path / f"{kind}-{k}")}) for k, tree in enumerate(trees)]
        for kind in ("packed", "alone")
    )
    ends = train_packed(packed, capacity=3)
    assert all(end.summary and "packed" in end.summary["engine"] for end in ends)
    for recipe, other in zip(packed, alone, strict=True):
        run_worker(other)
        ours, theirs = (Checkpoints(Storage(one.output_dir)).load(2).learned for one in (recipe, other))
        assert all(torch.allclose(ours[name], tensor, atol=1e-5) for name, tensor in theirs.items())


@pytest.mark.usefixtures("toy")
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    changes = {"method": SECTION, "data__instance_prompt": "a photo of <toy>"}
    whole, broken = (recipe_tree(tmp_path, name, **changes) for name in ("whole", "broken"))
    run_worker(build_recipe(whole))
    assert run_worker(build_recipe(broken), should_stop=tiny.Stop(3)).exit_reason == "interrupted"
    run_worker(build_recipe(broken), resume=True)
    first, second = (Checkpoints(Storage(tree["output_dir"])).load(6) for tree in (whole, broken))
    assert_same(first.learned, second.learned)
    assert_same(first.engine, second.engine)


@pytest.mark.usefixtures("toy")
def test_the_command_line_knows_a_registered_method(tmp_path: Path) -> None:
    recipe, run = tmp_path / "recipe.yaml", tmp_path / "run"
    recipe.write_text(yaml.safe_dump(make_tree(tmp_path, scaling__num_workers=0)))
    assert f"{NAME:<20} Trains one vector for a new word" in command("methods")
    assert "anchor_weight: 0.01" in command("config", recipe)
    assert "export" in command("check", recipe)
    assert json.loads(command("plan", recipe, "--json"))["counts"]["learning"] > 0
    command("train", recipe)
    embedding = run / "exports" / "run.pt"
    assert read_embedding(embedding).vectors.shape[0] == 1
    assert any("anchor_distance" in line for line in (run / "metrics.jsonl").read_text().splitlines())
    page = (run / "report.html").read_text()
    assert "Anchored inversion" in page and "exports/run.pt" in page
    command("sample", "--model", run, "--prompt", "a <toy>", "--steps", 1, "--out", tmp_path / "a.png")
    assert json.loads(command("score", run, "--num-images", 1, "--json"))["clip_i"] is not None
    command("export", run, "--format", "png")
    assert (run / "exports" / "run.png").exists()


@pytest.mark.usefixtures("toy")
def test_errors_of_a_registered_method_name_its_keys(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"anchor_wieght.*anchor_weight"):
        build_recipe(make_tree(tmp_path, method=SECTION | {"anchor_wieght": 1.0}))
    with pytest.raises(RecipeError, match=r"method\.anchor_weight"):
        build_recipe(make_tree(tmp_path, method=SECTION | {"anchor_weight": -1.0}))
    with pytest.raises(RecipeError, match=r"anchored_invrsion.*anchored_inversion"):
        build_recipe(make_tree(tmp_path, method=SECTION | {"name": "anchored_invrsion"}))
    with pytest.raises(RecipeError, match=r"instance_prompt.*<toy>"):
        run_worker(build_recipe(make_tree(tmp_path, data__instance_prompt="a photo of a cat")))


@pytest.mark.usefixtures("toy")
def test_the_recipe_reference_lists_a_registered_method(root: Path) -> None:
    page = runpy.run_path(str(root / "docs/write_recipes.py"))["write"]()
    assert f"### {NAME}" in page and "`anchor_weight`" in page


class Incomplete(MethodConfig):
    """A method section without required parts."""

    name: Literal["incomplete"] = "incomplete"


class Renamed(Incomplete):
    implementation: ClassVar[str] = f"{__name__}:NoMethod"
    summary: ClassVar[str] = "Does nothing."
    artifacts: ClassVar[tuple[str, ...]] = ("embedding",)


class NoMethod(Method):
    """A method that implements nothing."""


@pytest.mark.parametrize("part", ["implementation", "summary", "artifacts"])
def test_a_section_that_lacks_a_part_is_an_error_that_names_it(part: str) -> None:
    parts = {name: getattr(Renamed, name) for name in ("implementation", "summary", "artifacts")}
    del parts[part]
    section = type("Section", (Incomplete,), {**parts, "__module__": __name__})
    with pytest.raises(UserError, match=rf"'incomplete'.*{part}"):
        METHODS.register("incomplete")(section)
    METHODS.unregister("incomplete")


def test_other_incomplete_methods_are_errors() -> None:
    try:
        with pytest.raises(UserError, match=r"'other'.*name"):
            METHODS.register("other")(Renamed)
        METHODS.register("incomplete")(Renamed)
        with pytest.raises(UserError, match=r"NoMethod.*forward, groups, write"):
            method_class("incomplete")
    finally:
        METHODS.unregister("other")
        METHODS.unregister("incomplete")


def test_export_formats_must_be_of_the_artifact_kinds(
    toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for formats, reason in (((), "sets no formats"), (("gguf",), "formats gguf")):
        monkeypatch.setattr(toy.AnchoredInversion, "formats", formats)
        with pytest.raises(UserError, match=reason):
            run_worker(build_recipe(make_tree(tmp_path)))


def test_an_installed_package_adds_a_method(tmp_path: Path) -> None:
    environment = install_example(
        tmp_path / "site", "toy_method", group="methods", entry=f"{NAME} = AnchoredInversionConfig"
    )
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(make_tree(tmp_path)))
    command = [sys.executable, "-m", "dreamfleet.cluster.cli", "train", str(recipe), "scaling.num_workers=0"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "run/exports/run.pt").exists()
