"""Test imported kinds of LoRA: LyCORIS's LoKr and LoHa, and the options that they do not have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dreamfleet.trainers.imports.rules import Effect
from dreamfleet.trainers.imports.translate import Imported, import_files

KOHYA = {
    "pretrained_model_name_or_path": "pocket",
    "train_data_dir": "images",
    "network_module": "lycoris.kohya",
    "network_dim": 16,
    "network_alpha": 8,
    "network_dropout": 0.1,
    "max_train_steps": 100,
}


def kohya(folder: Path, args: list[str]) -> Imported:
    path = folder / "config.toml"
    lines = [f"{key} = {json.dumps(value)}" for key, value in {**KOHYA, "network_args": args}.items()]
    path.write_text("\n".join(lines))
    return import_files([str(path)])


def method(found: Imported) -> dict[str, Any]:
    return {
        line.key.removeprefix("method."): line.value
        for line in found.lines
        if line.key.startswith("method.lo")
    }


def test_kohyas_lokr_with_its_options_and_lycoris_layers(tmp_path: Path) -> None:
    args = ["algo=lokr", "factor=8", "decompose_both=True", "use_tucker=True", "module_dropout=0.1"]
    found = kohya(tmp_path, args)
    assert method(found) == {
        "lora_type": "lokr",
        "lokr_factor": 8,
        "lokr_decompose_both": True,
        "lora_rank": 16,
        "lora_alpha": 8,
        "lora_target_modules": "locon",
    }
    effects = {left.key: left.effect for left in found.left}
    assert effects["network_dropout"] is Effect.IGNORED, "LyCORIS has no such dropout in a LoKr"
    assert effects["network_args.use_tucker"] is Effect.CHANGES


def test_options_of_a_lokr_are_left_out_of_other_kinds(tmp_path: Path) -> None:
    found = kohya(tmp_path, ["algo=loha", "factor=8", "loraplus_lr_ratio=4"])
    assert method(found)["lora_type"] == "loha" and "lokr_factor" not in method(found)
    left = {left.key.partition(".")[2]: left.effect for left in found.left}
    assert left["factor"] is Effect.IGNORED and left["loraplus_lr_ratio"] is Effect.CHANGES


@pytest.mark.parametrize("algo", ["ia3", "diag-oft", "full"])
def test_a_kind_that_does_not_exist_here_is_reported(tmp_path: Path, algo: str) -> None:
    found = kohya(tmp_path, [f"algo={algo}"])
    assert "lora_type" not in method(found) and method(found)["lora_rank"] == 16
    [left] = [left for left in found.left if left.key == "network_args.algo"]
    assert left.effect is Effect.CHANGES and left.value == algo


def test_ai_toolkit_uses_whole_matrices_unless_told_otherwise(tmp_path: Path) -> None:
    for full, expected in ((None, True), (True, True), (False, False)):
        network = {"type": "lokr", "linear": 8, "lokr_factor": 4}
        network |= {} if full is None else {"lokr_full_rank": full}
        process = {"type": "sd_trainer", "network": network, "train": {"steps": 10}, "datasets": []}
        process["model"] = {"name_or_path": "pocket"}
        path = tmp_path / "config.json"
        path.write_text(
            json.dumps({"job": "extension", "config": {"name": "a", "process": [process]}, "meta": {}})
        )
        path = path.rename(tmp_path / "config.yaml")
        found = method(import_files([str(path)], program="ai-toolkit"))
        assert (found["lora_type"], found["lokr_factor"]) == ("lokr", 4)
        assert found.get("lokr_full_matrix", False) is expected


def test_onetrainers_lokr_has_a_rank_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    options = {"lora_rank": 32, "lokr_dim": 6, "lokr_decompose_factor": 4, "lokr_use_tucker": True}
    path.write_text(
        json.dumps({"training_method": "LORA", "peft_type": "LOKR", "base_model_name": "pocket"} | options)
    )
    found = import_files([str(path)], program="onetrainer")
    assert (method(found)["lora_rank"], method(found)["lokr_factor"]) == (6, 4)
    assert any(left.key == "lokr_use_tucker" and left.effect is Effect.CHANGES for left in found.left)
