"""Tests the estimates of disk against the folders of real runs, and that a run does not start without room."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny

from dreamfleet.datasets.errors import ResourceError
from dreamfleet.trainers.memory.profile import method_without_weights
from dreamfleet.trainers.recipe import Recipe, build_recipe
from dreamfleet.trainers.run.disk import (
    DiskNeed,
    disk_needs,
    estimate_many,
    estimate_run,
    require_disk,
    require_fleet_disk,
    require_search_disk,
)
from dreamfleet.trainers.run.dry_run import check_run
from dreamfleet.trainers.run.run import run_worker
from dreamfleet.trainers.run.saved_sizes import measure_weights, weight_bytes

WORD = {"placeholder_token": "<x>", "initializer_token": "cat"}
METHODS: dict[str, dict[str, Any]] = {
    "native": {"method": {"name": "native", "train_text_encoder": True}, "engine": {"use_ema": True}},
    "half": {
        "method": {"name": "dreambooth"},
        "train__save_precision": "fp16",
        "optimizer__name": "adafactor",
    },
    "lora": {
        "method": {"name": "dreambooth", "lora_rank": 16},
        "train__export_formats": ["kohya_lora", "diffusers"],
    },
    "hypernetwork": {"method": {"name": "hypernetwork", "layer_structure": [1, 8, 8, 1]}},
    "textual_inversion": {"method": {"name": "textual_inversion", **WORD}},
    "prompt_tuning": {"method": {"name": "prompt_tuning", "placeholder_token": "x"}},
    "aesthetic_gradients": {"method": {"name": "aesthetic_gradients"}},
    "bf16": {"method": {"name": "native"}, "train__mixed_precision": "bf16", "train__full_bf16": True},
}


SEARCHED: dict[str, Any] = {
    "validation__prompts": ["a cat"],
    "validation__metrics": ["clip_t"],
    "search": {
        "metric": "clip_t",
        "num_trials": 4,
        "space": {"train.seed": {"distribution": "choice", "values": [1, 2, 3, 4]}},
    },
}


def make(folder: Path, **changes: Any) -> Recipe:
    options = {
        "train__max_train_steps": 5,
        "train__checkpointing_steps": 1,
        "train__checkpoints_total_limit": 3,
        **changes,
    }
    return build_recipe(tiny.make_recipe(folder, **options))


def sizes_by_kind(folder: Path) -> dict[str, int]:
    found = {"checkpoints": 0, "exports": 0, "previews and report": 0}
    for file in folder.rglob("*"):
        if file.is_file():
            top = file.relative_to(folder).parts[0]
            found[top if top in found else "previews and report"] += file.stat().st_size
    return found


@pytest.mark.parametrize("name", METHODS)
def test_estimates_equal_the_folder_of_a_run(tmp_path: Path, name: str) -> None:
    recipe = make(tmp_path, **METHODS[name])
    need = estimate_run(recipe, measure_weights(recipe, method_without_weights(recipe)), images=6)
    run_worker(recipe)
    found = sizes_by_kind(Path(recipe.output_dir))
    assert need.total == pytest.approx(sum(found.values()), rel=0.1, abs=15_000)
    for kind, size in found.items():
        # Files of a few kilobytes consist of headers and metadata.
        assert need.lines[kind] == pytest.approx(size, rel=0.1, abs=15_000), kind


def test_previews_count_for_every_round_and_for_tensorboard(tmp_path: Path) -> None:
    quiet, shown = (
        disk_needs(make(tmp_path, report_to=["tensorboard"], **changes))["run"].lines["previews and report"]
        for changes in (
            {},
            {
                "validation": {
                    "prompts": ["a cat --w 64 --h 64"],
                    "num_images": 4,
                    "steps": 1,
                    "num_inference_steps": 1,
                }
            },
        )
    )
    assert shown - quiet > 6 * 4 * 64 * 64 * (1.5 + 1.5 + 1.5)


def test_epochs_are_counted_over_the_images(tmp_path: Path) -> None:
    recipe = make(
        tmp_path, train={"num_train_epochs": 4, "save_every_n_epochs": 2, "checkpoints_total_limit": None}
    )
    sizes = measure_weights(recipe, method_without_weights(recipe))
    few, limited = (
        estimate_run(build_recipe(tree), sizes, images=6).lines["checkpoints"]
        for tree in (
            recipe.model_dump(mode="json"),
            recipe.model_dump(mode="json") | {"validation": {"holdout": str(tmp_path / "pictures")}},
        )
    )
    assert limited == pytest.approx(few * 3 / 2), "the best checkpoint is kept as well"


def test_runs_of_a_search_keep_weights_of_the_best_and_pages_of_all(tmp_path: Path) -> None:
    recipe = make(tmp_path)
    sizes = measure_weights(recipe, method_without_weights(recipe))
    alone = estimate_run(recipe, sizes)
    need = estimate_many(recipe, sizes, runs=20, at_once=2, kept=3, exported=1)
    assert need.lines["checkpoints"] == 3 * weight_bytes(sizes)
    assert need.lines["exports"] == alone.lines["exports"]
    assert need.lines["previews and reports"] == 20 * alone.lines["previews and report"]
    assert need.writing == 2 * (alone.lines["checkpoints"] + alone.writing)
    assert estimate_many(recipe, sizes, runs=1, at_once=8, kept=3, exported=3).writing == need.writing // 2


REMEDIES = {  # kind of file: the first setting that makes it smaller
    "exports": "train.save_precision=fp16",
    "previews and report": "a larger validation.steps",
    "previews and reports": "a larger validation.steps",
    "class images": "fewer method.num_class_images",
}


def small_disk(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))


def test_a_full_disk_is_refused_with_what_where_and_remedies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, need = make(tmp_path), DiskNeed({"checkpoints": 3 * 2**30, "exports": 2**30}, writing=2**30)
    small_disk(monkeypatch, 2**30)
    with pytest.raises(ResourceError) as raised:
        require_disk(need, recipe)
    for part in ("output_dir", recipe.output_dir, "5.0 GiB", "checkpoints 3.0 GiB", "1.0 GiB free"):
        assert part in str(raised.value)
    assert "train.checkpoints_total_limit=1" in str(raised.value)
    for kind, setting in REMEDIES.items():
        with pytest.raises(ResourceError, match=f"what is kept: {setting}"):
            require_disk(DiskNeed({kind: 2**31, "other": 2**20}), recipe)
    small_disk(monkeypatch, 5 * 2**30)
    assert "5.0 GiB free" in require_disk(need, recipe)


def test_files_of_a_run_that_is_continued_count_as_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make(tmp_path)
    folder = Path(recipe.output_dir) / "checkpoints"
    folder.mkdir(parents=True)
    (folder / "old").write_bytes(bytes(3000))
    small_disk(monkeypatch, 1000)
    assert require_disk(DiskNeed({"checkpoints": 4000}), recipe)
    with pytest.raises(ResourceError):
        require_disk(DiskNeed({"checkpoints": 4001}), recipe)


def test_a_bucket_is_stated_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_disk(monkeypatch, 0)
    text = require_disk(DiskNeed({"checkpoints": 2**40}), make(tmp_path, output_dir="s3://bucket/run"))
    assert "1024.0 GiB" in text and "free" not in text


def test_nothing_starts_without_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = make(tmp_path, validation={"holdout": str(tmp_path / "pictures")})
    small_disk(monkeypatch, 1000)
    with pytest.raises(ResourceError, match="output_dir"):
        run_worker(recipe)
    assert not (Path(recipe.output_dir) / "recipe.yaml").exists()
    lines = {line.name: line for line in check_run(recipe)}
    assert not lines["disk"].ok and lines["model"].ok and lines["step"].ok, "all mistakes at once"
    with pytest.raises(ResourceError, match="this search"):
        require_search_disk(make(tmp_path, **SEARCHED))
    with pytest.raises(ResourceError, match="fleet of 1000 subjects"):
        require_fleet_disk(recipe, subjects=1000)


def test_a_model_that_only_the_workers_have_is_no_error(tmp_path: Path) -> None:
    recipe = make(tmp_path, model={"pretrained_model_name_or_path": str(tmp_path / "missing")})
    assert "not known" in require_fleet_disk(recipe, subjects=3)


def test_a_fleet_that_keeps_its_checkpoints_needs_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_disk(monkeypatch, 40 * 2**20)
    assert "checkpoints" not in require_fleet_disk(make(tmp_path), subjects=10)
    with pytest.raises(ResourceError, match="checkpoints"):
        require_fleet_disk(make(tmp_path, fleet={"keep_checkpoints": True}), subjects=10)
