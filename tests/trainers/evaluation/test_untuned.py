"""Runs whose metrics compare with the untuned model: logged figures, resuming, and sharing between runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny

from dreamfleet.trainers.config.metrics import METRICS
from dreamfleet.trainers.evaluation import untuned
from dreamfleet.trainers.recipe import build_recipe
from dreamfleet.trainers.run.run import run_worker

FIDELITY = {"fidelity", *METRICS.get("fidelity").parts}


def make_tree(folder: Path, run: str = "run", **changes: Any) -> dict[str, Any]:
    validation = {
        "prompts": ["a sks cat", "a sks cat, red"],
        "num_images": 2,
        "num_inference_steps": 1,
        "steps": 2,
        "metrics": ["fidelity", "overfitting", "view_loss"],
        "metric_for_best": "view_loss",
        "clip": str(folder / "model"),
    }
    options = {"validation": validation, "output_dir": str(folder / run), "optimizer__learning_rate": 1e-2}
    return tiny.make_recipe(folder, **{**options, **changes})


def rounds(run: Path) -> dict[int, dict[str, float]]:
    found: dict[int, dict[str, float]] = {}
    for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()):
        if "loss" not in line:
            found.setdefault(line["step"], {}).update(line)
    return found


def test_a_run_logs_the_metrics_and_their_parts_from_the_untuned_model_on(tmp_path: Path) -> None:
    recipe = build_recipe(make_tree(tmp_path))
    assert set(recipe.figures) == {*FIDELITY, "overfitting", "view_loss"}
    summary = run_worker(recipe)
    found = rounds(tmp_path / "run")
    assert found.keys() == {0, 2, 4} and all(
        line.keys() == {"step", *recipe.figures} for line in found.values()
    )
    start, end = found[0], found[4]
    assert (start["overfitting"], start["view_loss"]) == (0, 1)
    assert (start["fidelity_prompt"], start["fidelity_class"]) == (0, 0)
    assert end["view_loss"] != 1 and end["fidelity"] != start["fidelity"]
    assert {name: summary.figures[name] for name in recipe.figures} == pytest.approx(
        {name: end[name] for name in recipe.figures}
    )
    best = min((step for step in found if step), key=lambda step: found[step]["view_loss"])
    assert summary.best_checkpoint == f"step-{best:06d}"
    cells = [
        json.loads(line) for line in (tmp_path / "run/samples/step-000004.jsonl").read_text().splitlines()
    ]
    assert all(cell["scores"].keys() == FIDELITY for cell in cells)
    assert sum(cell["scores"]["fidelity"] for cell in cells) / 4 == pytest.approx(end["fidelity"], abs=1e-3)


def test_a_resumed_run_compares_with_the_untuned_model_too(tmp_path: Path) -> None:
    changes = {"train__checkpointing_steps": 1, "validation__sample_at_first": False}
    run_worker(build_recipe(make_tree(tmp_path, "whole", **changes)))
    shutil.rmtree(tmp_path / "untuned-images")
    stopped = build_recipe(make_tree(tmp_path, "stopped", **changes))
    assert run_worker(stopped, should_stop=tiny.Stop(1)).exit_reason == "interrupted"
    shutil.rmtree(tmp_path / "untuned-images")
    run_worker(stopped, resume=True)
    assert rounds(tmp_path / "stopped") == rounds(tmp_path / "whole")


def test_runs_in_one_folder_share_the_untuned_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generated: list[int] = []
    generate = untuned.generate_shared

    def count(method: Any, engine: Any, requests: Any, **options: Any) -> Any:
        generated.append(len(requests))
        return generate(method, engine, requests, **options)

    monkeypatch.setattr(untuned, "generate_shared", count)
    for name, rate in (("first", 1e-2), ("second", 1e-3)):
        run_worker(build_recipe(make_tree(tmp_path, name, optimizer__learning_rate=rate)))
    assert generated == [4 + 2]  # the previews, and two images of the class prompt
    first, second = (rounds(tmp_path / name) for name in ("first", "second"))
    assert first[0] == second[0] and first[4] != second[4]
    run_worker(build_recipe(make_tree(tmp_path, "other", validation__seed=5)))
    file = sorted((tmp_path / "untuned-images").iterdir())[0]
    file.write_bytes(file.read_bytes()[:100])
    run_worker(build_recipe(make_tree(tmp_path, "third")))
    run_worker(build_recipe(make_tree(tmp_path, "fourth", validation__seed=5)))
    assert generated == [6, 6, 6] and rounds(tmp_path / "third")[0] == first[0]


def test_a_run_without_these_metrics_keeps_no_untuned_images(tmp_path: Path) -> None:
    run_worker(
        build_recipe(
            make_tree(tmp_path, validation__metrics=["clip_t"], validation__metric_for_best="clip_t")
        )
    )
    assert not (tmp_path / "untuned-images").exists()
