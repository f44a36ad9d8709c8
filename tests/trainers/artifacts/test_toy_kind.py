"""An artifact kind from outside the package, registered in this process and by an installed package's entry point."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pytest
import tiny
import torch
from artifact_contract import check_kind
from PIL import Image
from toy_packages import importing_environment, install_example, load_example
from typer.testing import CliRunner

from dreamfleet.cluster.cli import program
from dreamfleet.datasets.errors import RecipeError, UserError
from dreamfleet.trainers.artifacts.kind import ARTIFACTS
from dreamfleet.trainers.config.method import METHODS
from dreamfleet.trainers.config.methods.textual_inversion import TextualInversionConfig
from dreamfleet.trainers.methods.export_request import Export
from dreamfleet.trainers.methods.textual_inversion import TextualInversion
from dreamfleet.trainers.recipe import build_recipe
from dreamfleet.trainers.run.export import export_run
from dreamfleet.trainers.run.run import run_worker


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The example's module, its kind registered."""
    module = load_example("toy_artifact", monkeypatch)
    ARTIFACTS.register("table")(module.TableKind)
    yield module
    ARTIFACTS.unregister("table")


class TableInversionConfig(TextualInversionConfig):
    """The section of a method that exports tables."""

    implementation: ClassVar[str] = f"{__name__}:TableInversion"
    artifacts: ClassVar[tuple[str, ...]] = ("table",)
    name: Literal["table_inversion"] = "table_inversion"  # type: ignore[assignment]


class TableInversion(TextualInversion):
    """Textual Inversion whose artifact is a table."""

    formats = ("csv",)

    def write(self, order: Export) -> list[Path]:
        paths = []
        for form in order.formats:
            delimiter = {"csv": ",", "tsv": "\t"}[form]
            rows = [delimiter.join(map(str, row)) for row in self.vectors.detach().tolist()]
            paths.append(order.folder / f"{order.name}.{form}")
            paths[-1].write_text("\n".join(rows))
        return paths


def command(*arguments: Any) -> str:
    result = CliRunner().invoke(program.app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output + result.stderr
    return result.stdout


def sample(out: Path, *arguments: Any) -> np.ndarray:
    options = ("--steps", 1, "--num-images", 1, "--out", out)
    command("sample", *arguments, *options)
    with Image.open(out) as image:
        return np.asarray(image).astype(int)


def test_a_registered_kind_keeps_the_contract(toy: Any, tmp_path: Path) -> None:
    source = toy.write_table([[0.5, -1.25], [3.0, 1e-3]], tmp_path / "cat.csv")
    METHODS.register("table_inversion")(TableInversionConfig)
    try:
        check_kind(toy.TableKind(), source, tmp_path / "dog.tsv", method="table_inversion")
    finally:
        METHODS.unregister("table_inversion")


def test_a_run_exports_samples_scores_and_reports_a_registered_kind(toy: Any, tmp_path: Path) -> None:
    METHODS.register("table_inversion")(TableInversionConfig)
    try:
        section = {"name": "table_inversion", "placeholder_token": "<cat>", "initializer_token": "cat"}
        tree = tiny.make_recipe(tmp_path, method=section, train__max_train_steps=1)
        del tree["data"]["instance_prompt"], tree["data"]["class_prompt"]
        run_worker(build_recipe(tree))
        run, model = tmp_path / "run", tree["model"]["pretrained_model_name_or_path"]
        table = run / "exports" / "run.csv"
        assert "The learned vectors as a table." in (run / "report.html").read_text()
        assert "--artifact exports/run.csv" in (run / "report.html").read_text()
        command("export", run, "--format", "tsv")
        assert (run / "exports" / "run.tsv").exists()
        with pytest.raises(RecipeError, match="csv, tsv"):
            export_run(str(run), ["gguf"])
        whole = sample(tmp_path / "a.png", "--model", run, "--prompt", "a <cat>")
        base = ("--model", model, "--prompt", "a run")
        with_table = sample(tmp_path / "b.png", *base, "--artifact", table)
        assert np.array_equal(whole, with_table)
        assert np.abs(sample(tmp_path / "c.png", *base) - with_table).max() > 0
        halved = sample(tmp_path / "d.png", *base, "--artifact", f"{table}:0.5")
        assert np.abs(halved - with_table).max() > 0
        with Image.open(tmp_path / "d.png") as image:
            assert "Artifact run: 0.5" in image.info["parameters"]
        scores = json.loads(command("score", table, "--num-images", 1, "--json"))
        assert scores["kind"] == "artefact" and scores["clip_i"] is not None
        command("convert", table, tmp_path / "out.tsv")
        assert torch.equal(
            toy.TableKind().read_back(tmp_path / "out.tsv")["vectors"],
            toy.TableKind().read_back(table)["vectors"],
        )
    finally:
        METHODS.unregister("table_inversion")


@pytest.mark.usefixtures("toy")
def test_the_recipe_reference_lists_a_registered_kind(root: Path) -> None:
    page = runpy.run_path(str(root / "docs/write_recipes.py"))["write"]()
    (row,) = [line for line in page.splitlines() if line.startswith("| `table` |")]
    assert "`.csv`" in row and "`tsv`" in row and "`--artifact`" in row


def test_an_installed_package_adds_a_kind(tmp_path: Path) -> None:
    installed = install_example(
        tmp_path / "site", "toy_artifact", group="artifacts", entry="table = TableKind"
    )
    (tmp_path / "cat.csv").write_text("0.5,1.5\n2.5,-3.5\n")

    def run(*arguments: Any, environment: dict[str, str] = installed) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "dreamfleet.cluster.cli", *map(str, arguments)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)

    done = run("convert", tmp_path / "cat.csv", tmp_path / "cat.tsv")
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "cat.tsv").read_text().split() == ["0.5", "1.5", "2.5", "-3.5"]
    refused = run("convert", tmp_path / "cat.csv", tmp_path / "dog.tsv", environment=importing_environment())
    assert refused.returncode == 2 and "embedding" in refused.stderr and "Traceback" not in refused.stderr


def test_sample_refuses_what_an_artifact_cannot_do(tmp_path: Path) -> None:
    from dreamfleet.cluster.sample_grid import GridRequest, draw_grid
    from dreamfleet.trainers.models.formats.embedding import Embedding, write_embedding

    path = write_embedding(Embedding("cat", torch.ones(1, 8)), tmp_path / "cat.pt")
    for artifacts, message in (
        ([f"{path}:0.5"], "no strength"),
        ([str(tmp_path / "none.pt")], "no such file"),
        ([str(tmp_path)], "known kind"),
    ):
        with pytest.raises(UserError, match=message):
            draw_grid(GridRequest(out=tmp_path / "grid.png", prompts=["a"], artifacts=artifacts))
