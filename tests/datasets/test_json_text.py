"""Test that every JSON file and output is valid JSON: no NaN or Infinity, and encoded as UTF-8."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import tiny

from dreamfleet.cluster.cli.base import print_json
from dreamfleet.datasets.json_text import json_text
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.engines.passes import no_passes
from dreamfleet.trainers.engines.torch_engine import TorchEngine
from dreamfleet.trainers.recipe import build_recipe
from dreamfleet.trainers.report.metrics_log import MetricsLog, read_metrics
from dreamfleet.trainers.run.evaluation import Evaluation
from dreamfleet.trainers.run.run import run_worker

ROOT = Path(__file__).resolve().parents[2]
# Files that serialise JSON for a hash, in another program's format, or where only Ray may be imported (versions.py).
WRITES_ITSELF = {
    "cluster/jobs/check_versions.py", "cluster/jobs/versions.py",
    "datasets/index/image_index.py", "datasets/index/labels.py", "datasets/json_text.py", "datasets/serve/encoding.py",
    "datasets/serve/latent_files.py",
    "datasets/tools/prepare.py", "trainers/batches/class_image_drawing.py", "trainers/models/sampling/infotext.py",
    "trainers/models/pretrained.py",
}  # fmt: skip


def strict(text: str) -> Any:
    """Parse JSON; raise AssertionError for NaN and Infinity, which browsers reject."""

    def refuse(name: str) -> Any:
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_non_finite_numbers_are_null_and_non_utf8_names_are_kept() -> None:
    nan, inf = float("nan"), float("inf")
    message = {"a": nan, "b": [1.5, -inf, (inf, 2)], "c": {"d": True, "e": None, "f": "ü\udc80"}}
    text = json_text(message)
    text.encode("utf-8")
    assert strict(text) == {
        "a": None,
        "b": [1.5, None, [None, 2]],
        "c": {"d": True, "e": None, "f": "ü\udc80"},
    }
    assert "ü" in text
    with pytest.raises(TypeError):
        json_text({"a": object()})


def test_commands_print_strict_json(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"loss": float("nan"), "path": Path("x")})
    assert strict(capsys.readouterr().out) == {"loss": None, "path": "x"}


def test_an_overflowed_step_is_null_in_all_files_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Test that infinite and NaN metrics are written as null.

    A skipped fp16 step has an infinite gradient norm; the held-out loss of a diverging run may be NaN.
    """
    nan = float("nan")
    whole = TorchEngine.step

    def overflows(engine: TorchEngine, rates: Any, step: int) -> Any:
        return whole(engine, rates, step) * float("inf" if step == 2 else 1)

    monkeypatch.setattr(TorchEngine, "step", overflows)
    monkeypatch.setattr(Evaluation, "measure", lambda evaluation: no_passes({"holdout_loss": nan}))
    holdout = str(tiny.make_images(tmp_path / "holdout", 1))
    tree = tiny.make_recipe(
        tmp_path,
        method={"name": "textual_inversion", "placeholder_token": "<x>", "initializer_token": "cat"},
        report_to=["tensorboard"],
        validation={"holdout": holdout, "prompts": ["a cat"], "num_images": 1, "num_inference_steps": 1},
    )
    run_worker(build_recipe(tree))
    run = Path(tree["output_dir"])
    lines = [strict(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert next(line for line in lines if line["step"] == 2)["grad_norm"] is None
    assert strict((run / "summary.json").read_text())["figures"]["holdout_loss"] is None
    for path in [*run.rglob("*.json"), *run.rglob("*.jsonl")]:
        for text in path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]:
            strict(text)
    assert (run / "report.html").exists()


def test_json_of_older_versions_is_read(tmp_path: Path) -> None:
    run = Storage(str(tmp_path))
    run.write_text("metrics.jsonl", '{"step": 1, "loss": 1.0, "grad_norm": Infinity}\n{"step": 2, "lo')
    MetricsLog(run, start_step=1)
    assert [strict(line) for line in run.read_text("metrics.jsonl").splitlines()] == read_metrics(run)
    assert read_metrics(run) == [{"step": 1, "loss": 1.0, "grad_norm": None}]


def test_json_is_written_in_one_place() -> None:
    folders = ("cluster", "datasets", "trainers", "tune")
    found = {
        str(path.relative_to(ROOT))
        for folder in folders
        for path in (ROOT / folder).rglob("*.py")
        if re.search(r"\bjson\.dumps?\(", path.read_text())
    }
    assert {path for path in found if not path.startswith("trainers/models/formats/")} == WRITES_ITSELF
