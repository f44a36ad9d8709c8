"""Test that the modes of all files of a run, export, conversion and prepared data set follow the umask."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from typer.testing import CliRunner

from dreamfleet.cluster.cli import program
from dreamfleet.datasets.storage.disk import atomic_write
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.recipe import build_recipe
from dreamfleet.trainers.run.run import run_worker


@pytest.fixture(params=[0o002, 0o077])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def assert_follows(folder: Path, umask: int) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    for path in folder.rglob("*"):
        usual = 0o666 if path.is_file() else 0o777
        assert stat.S_IMODE(path.stat().st_mode) == usual & ~umask, path


def command(*words: Any) -> None:
    result = CliRunner().invoke(program.app, [str(word) for word in words])
    assert result.exit_code == 0, result.output


def test_a_run_its_exports_and_their_conversions(tmp_path: Path, umask: int) -> None:
    tree = tiny.make_recipe(
        tmp_path,
        method={"name": "dreambooth", "with_prior_preservation": True, "num_class_images": 1,
                "prior_generation_steps": 1},
        data__class_data_dir=str(tmp_path / "class"),
        report_to=["tensorboard"],
        validation={"prompts": ["a cat"], "num_images": 1, "num_inference_steps": 1},
        train__max_train_steps=1,
        train__export_formats=["safetensors", "diffusers", "ckpt"],
    )  # fmt: skip
    run_worker(build_recipe(tree))
    run = tmp_path / "run"
    command("export", run, "--format", "safetensors", "--out", tmp_path / "out")
    command("convert", tmp_path / "out" / "run.safetensors", tmp_path / "converted")
    for name in ("run", "class", "out", "converted"):
        assert_follows(tmp_path / name, umask)
    assert next(run.glob("checkpoints/*/learned.safetensors")) and (run / "exports" / "run.ckpt").exists()


@pytest.mark.parametrize(
    "method",
    [
        {"name": "textual_inversion", "placeholder_token": "<x>", "initializer_token": "cat"},
        {"name": "native", "lora_rank": 2},
    ],
)
def test_small_artifacts(tmp_path: Path, umask: int, method: dict[str, Any]) -> None:
    run_worker(build_recipe(tiny.make_recipe(tmp_path, method=method, train__max_train_steps=1)))
    assert_follows(tmp_path / "run", umask)


def test_a_prepared_set(tmp_path: Path, umask: int) -> None:
    tiny.make_images(tmp_path / "raw", 2, captions=True)
    command("data", "prepare", tmp_path / "raw", tmp_path / "ready", "--size", "32")
    assert_follows(tmp_path / "ready", umask)


def test_modes_that_a_library_restricts_are_corrected_in_folders(tmp_path: Path, umask: int) -> None:
    with atomic_write(str(tmp_path / "whole")) as temporary:
        os.mkdir(temporary)
        closed = os.open(os.path.join(temporary, "a"), os.O_CREAT | os.O_WRONLY, 0o600)
        os.close(closed)
    assert_follows(tmp_path / "whole", umask)
    assert Storage(str(tmp_path)).list("", recursive=True) == ["whole/a"]
