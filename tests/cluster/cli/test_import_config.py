"""Tests of `config --import`: the recipe, the report, exit codes, and options that do not belong together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import trainer_configs
from typer.testing import CliRunner

from dreamfleet.cluster.cli.program import app
from dreamfleet.trainers.recipe import load_recipe


def run(*arguments: str, given: str | None = None) -> tuple[int, str, str]:
    """Run the command in this process and return its exit code, stdout and stderr."""
    result = CliRunner().invoke(app, ["config", *arguments], input=given)
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def pasted(tmp_path: Path) -> Path:
    name, text = trainer_configs.DIFFUSERS
    (tmp_path / "img").mkdir()
    (tmp_path / name).write_text(text)
    return tmp_path / name


def test_recipe_is_written_and_the_report_printed(pasted: Path) -> None:
    out = pasted.parent / "recipes" / "cat.yaml"
    code, report, _ = run("--import", str(pasted), "--out", str(out))
    assert code == 0
    recipe = load_recipe(out)
    assert recipe.data.instance_data_dir == str(pasted.parent / "img")  # beside the config
    assert "class_data_dir: class" in report and "data.center_crop: False" in report
    assert run("--import", str(pasted), "--out", str(out))[0] == 2  # never overwritten


def test_recipe_is_printed_and_reads_the_standard_input(pasted: Path) -> None:
    code, recipe, _ = run("--import", "-", given=pasted.read_text())
    assert code == 0 and "# Imported by" in recipe and "instance_prompt: a photo of sks cat" in recipe
    code, report, _ = run("--import", str(pasted), "--json")
    assert json.loads(report)["program"] == "diffusers"


def test_a_recipe_that_cannot_run_yet_exits_with_2(tmp_path: Path) -> None:
    name, text = trainer_configs.WEBUI
    (tmp_path / name).write_text(text)
    code, recipe, error = run("--import", str(tmp_path / name))
    assert code == 2 and "textual_inversion" in recipe and "cannot run yet: model_name" in error


@pytest.mark.parametrize("arguments", [[], ["r.yaml", "--import", "x.json"], ["r.yaml", "--out", "y.yaml"]])
def test_options_that_do_not_belong_together_are_errors(arguments: list[str]) -> None:
    assert run(*arguments)[0] == 2
