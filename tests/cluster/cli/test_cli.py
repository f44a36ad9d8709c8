"""Test the command line: output on stdout, one message and exit code per outcome, deferred imports."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml
from PIL import Image
from typer.testing import CliRunner

from dreamfleet.cluster.cli import program
from dreamfleet.datasets.errors import RunFailed
from dreamfleet.trainers import launch

COMMANDS = {"train", "sample", "score", "plan", "check", "config", "export", "convert", "methods", "doctor"}


def run(*words: Any) -> Any:
    return CliRunner().invoke(program.app, [str(word) for word in words])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cli")


@pytest.fixture(scope="module")
def recipe(folder: Path) -> Path:
    return tiny.write_recipe(folder / "recipe.yaml", tiny.make_recipe(folder))


@pytest.fixture(scope="module")
def trained(folder: Path, recipe: Path) -> tuple[Path, dict[str, Any]]:
    """Train Textual Inversion with the command line; return the run folder and the parsed JSON summary."""
    out = folder / "word"
    result = run(
        "train",
        recipe,
        "method={name: textual_inversion, placeholder_token: <cat>, num_vectors: 2}",
        f"output_dir={out}",
        "--json",
    )
    assert result.exit_code == 0, result.output
    return out, json.loads(result.stdout)


def test_nothing_heavy_is_imported_before_a_command_runs() -> None:
    code = "import sys, dreamfleet.cluster.cli; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {
        "torch",
        "ray",
        "diffusers",
        "transformers",
        "pyarrow",
        "numpy",
        "pandas",
        "pydantic",
        "yaml",
        "rich",
    }
    assert not heavy & set(done.stdout.split())


def test_help_lists_the_commands() -> None:
    result = run("--help")
    assert result.exit_code == 0
    assert all(f"  {name} " in result.stdout for name in COMMANDS)
    for name in COMMANDS:
        assert run(name, "--help").exit_code == 0
    assert run("--version").stdout.startswith("dreamfleet ")


@pytest.mark.parametrize(
    "words",
    [
        ["train"],
        ["train", "nowhere.yaml"],
        ["no-such-command"],
        ["config", "nowhere.yaml", "--no-such-option"],
        ["sample", "--prompt", "a cat", "--lora", "x.safetensors"],
        ["sample", "--prompt", "a cat", "--out", "grid.gif"],
        ["sample", "--prompt", "a cat", "--model", "nowhere.safetensors"],
        ["score", "nowhere"],
        ["export", "nowhere", "--format", "pt"],
        ["convert", "nowhere.pt", "out.safetensors"],
    ],
)
def test_user_errors_exit_with_2_and_no_traceback(words: list[str]) -> None:
    result = run(*words)
    assert result.exit_code == 2
    assert result.stderr.strip()
    assert "Traceback" not in result.output
    assert not result.stdout.strip()


def test_all_recipe_errors_are_reported_with_the_nearest_key(recipe: Path) -> None:
    result = run("config", recipe, "train.max_train_stps=3", "optimizer.learning_rate=fast")
    assert result.exit_code == 2
    assert "max_train_steps" in result.stderr
    assert "optimizer.learning_rate" in result.stderr
    shown = run("config", recipe, "train.max_train_stps=3", "--verbose")
    assert "Traceback" in shown.stderr
    assert shown.exit_code == 2


@pytest.mark.parametrize(
    ("error", "code"), [(RunFailed("loss is NaN"), 1), (KeyError("bug"), 1), (KeyboardInterrupt(), 130)]
)
def test_exit_codes_of_other_errors(
    monkeypatch: pytest.MonkeyPatch, recipe: Path, error: BaseException, code: int
) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(launch, "fit", fail)
    result = run("train", recipe)
    assert result.exit_code == code
    assert "Traceback" not in result.output
    assert result.stderr.startswith("dreamfleet: ")


def test_config_prints_a_recipe_that_reads_back(recipe: Path, folder: Path) -> None:
    result = run("config", recipe, "train.max_train_steps=9")
    assert result.exit_code == 0
    again = folder / "again.yaml"
    again.write_text(result.stdout)
    assert yaml.safe_load(run("config", again).stdout) == yaml.safe_load(result.stdout)
    assert json.loads(run("config", again, "--json").stdout)["train"]["max_train_steps"] == 9


def test_methods_come_from_the_registry() -> None:
    told = {line["name"]: line["description"] for line in json.loads(run("methods", "--json").stdout)}
    assert {"dreambooth", "textual_inversion"} <= set(told)
    assert all(told.values())
    assert "dreambooth" in run("methods").stdout


def test_doctor_prints_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIANOTTOLD")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-to-be-told")
    monkeypatch.setenv("HF_TOKEN", "not-to-be-told")
    monkeypatch.setenv("HTTPS_PROXY", "http://me:not-to-be-told@proxy:3128")
    result = run("doctor", "--json")
    names = {line["name"]: line for line in json.loads(result.stdout)}
    assert names["torch"]["state"] == "ok"
    assert names["s3"]["state"] == "ok"
    assert "AKIANOTTOLD" not in result.output
    assert "not-to-be-told" not in result.output
    assert {"HF_TOKEN", "HTTPS_PROXY"} <= set(names["sent to workers"]["detail"].split(", "))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_PROFILE", "defined-nowhere")
    away = run("doctor", "--address", "127.0.0.1:1")
    assert re.search(r"s3 +MISSING.*defined-nowhere|MISSING +s3.*defined-nowhere", away.stdout)
    assert away.exit_code == 2
    assert "no Ray cluster" in away.stdout


def test_train_prints_the_paths_of_its_results(trained: tuple[Path, dict[str, Any]]) -> None:
    out, told = trained
    assert told["exit_reason"] == "completed"
    assert told["run_folder"] == str(out)
    assert Path(told["report"]).exists()
    assert {Path(path).name for path in told["artefacts"]} >= {"word.pt", "word.safetensors"}
    assert all(Path(path).exists() for path in told["artefacts"])


def test_a_used_output_dir_needs_resume(trained: tuple[Path, dict[str, Any]]) -> None:
    out, _ = trained
    again = run("train", out / "recipe.yaml")
    assert again.exit_code == 2
    assert "--resume" in again.stderr
    resumed = run("train", out / "recipe.yaml", "train.max_train_steps=5", "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert f"report     {out}/report.html" in resumed.stdout


def test_missing_images_are_reported_before_anything_starts(recipe: Path, folder: Path) -> None:
    out = folder / "never"
    result = run(
        "train",
        recipe,
        f"data.instance_data_dir={folder}/nowhere",
        f"output_dir={out}",
        "scaling.num_workers=2",
    )
    assert result.exit_code == 2
    assert "nowhere" in result.stderr
    assert not out.exists()
    result = run("train", recipe, "scaling.num_workers=500", f"output_dir={out}")
    assert result.exit_code == 2
    assert "CPU" in result.stderr
    assert not out.exists()


def test_check_reports_line_by_line(recipe: Path, folder: Path) -> None:
    good = run("check", recipe, f"output_dir={folder}/checked", "--json")
    lines = {line["name"]: line for line in json.loads(good.stdout)}
    assert good.exit_code == 0
    assert {"recipe", "pictures", "model", "step", "export", "resources"} <= set(lines)
    assert not (folder / "checked").exists()
    bad = run("check", recipe, f"model.pretrained_model_name_or_path={folder}/no-model")
    assert bad.exit_code == 2
    assert "FAILED" in bad.stdout


def test_sample_uses_the_placeholder_of_a_run(trained: tuple[Path, dict[str, Any]], folder: Path) -> None:
    out, _ = trained
    options = ["--prompt", "a photo of <cat>", "--prompt", "a dog", "--num-images", "2", "--steps", "2"]
    own = run("sample", "--model", out, *options, "--out", folder / "own.png", "--json")
    assert own.exit_code == 0, own.output
    cells = json.loads(own.stdout)["pictures"]
    assert [cell["seed"] for cell in cells] == [0, 1, 0, 1]
    given = run(
        "sample", "--model", folder / "model", "--embedding", out / "exports" / "word.safetensors", *options,
        "--out", folder / "given.png",
    )  # fmt: skip
    assert given.exit_code == 0, given.output
    assert given.stdout.strip() == str(folder / "given.png")
    assert Image.open(folder / "own.png").tobytes() == Image.open(folder / "given.png").tobytes()
    long = ["--prompt", f"{'a ' * 80}dog", "--num-images", "1", "--steps", "2", "--out", folder / "long.png"]
    drawn = []
    for reading in ([], ["--max-token-length", "150"], ["--clip-skip", "2"]):
        assert run("sample", "--model", folder / "model", *long, *reading).exit_code == 0
        drawn.append(Image.open(folder / "long.png").tobytes())
    # A long prompt is always encoded in as many chunks as it needs, so --max-token-length changes nothing.
    assert drawn[0] == drawn[1] != drawn[2]


def test_convert_and_export(trained: tuple[Path, dict[str, Any]], folder: Path) -> None:
    out, _ = trained
    there = folder / "<cat>.png"
    assert run("convert", out / "exports" / "word.pt", there).exit_code == 0
    assert run("convert", there, folder / "back.safetensors").exit_code == 0
    assert run("convert", there, folder / "back.safetensors").exit_code == 2, "a file is never written over"
    single = folder / "single.safetensors"
    assert run("convert", folder / "model", single).exit_code == 0
    assert run("convert", single, folder / "unpacked").exit_code == 0
    assert (folder / "unpacked" / "model_index.json").exists()
    result = run("export", out, "--format", "png", "--out", folder / "exported", "--json")
    assert result.exit_code == 0, result.output
    assert [Path(path).suffix for path in json.loads(result.stdout)] == [".png"]


def test_ctrl_c_saves_and_ends_with_130(recipe: Path, folder: Path) -> None:
    """Test Ctrl-C in one process; tests/trainers/driver/test_fit_on_ray.py tests it on Ray."""
    out = folder / "stopped"
    words = [
        "train",
        str(recipe),
        "train.max_train_steps=100000",
        "train.checkpointing_steps=100000",
        f"output_dir={out}",
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "dreamfleet.cluster.cli", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    wait_for_lines(out / "metrics.jsonl", 3, process)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 130, stderr
    assert "--resume" in stderr
    assert str(out) in stdout
    steps = sorted((out / "checkpoints").iterdir())
    assert len(steps) == 1
    assert (steps[0] / "manifest.json").exists()
    assert json.loads((out / "summary.json").read_text())["exit_reason"] == "interrupted"
    assert not (out / "STOP").exists()


def wait_for_lines(path: Path, count: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        if path.exists() and len(path.read_text().splitlines()) >= count:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    raise AssertionError(f"{path} did not grow")


@pytest.mark.parametrize(
    "words",
    [
        ("convert", "s3://bucket/word.pt", "word.png"),
        ("convert", "word.pt", "s3://bucket/word.png"),
        ("sample", "--prompt", "a cat", "--out", "s3://bucket/grid.png"),
        ("sample", "--prompt", "a cat", "--out-dir", "s3://bucket/drawn"),
        ("data", "label", "s3://bucket/pictures"),
        ("data", "label", "pictures", "--out", "gs://bucket/labels.json"),
    ],
)
def test_a_url_is_refused_where_a_local_file_is_required(
    words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*words)
    assert result.exit_code == 2
    assert "bucket" in result.stderr and "address" in result.stderr
    assert not list(tmp_path.iterdir()), "no folder named s3:"
