"""Small runs in this process, and the comparison of two of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny
import torch

from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.run.checkpoint import Checkpoints


def recipe_tree(folder: Path, run: str, **changes: Any) -> dict[str, Any]:
    options = {
        "output_dir": str(folder / run),
        "train__max_train_steps": 6,
        "train__checkpointing_steps": 2,
        "train__gradient_accumulation_steps": 2,
        "train__checkpoints_total_limit": None,
        "optimizer__lr_scheduler": "cosine",
        "engine": {"use_ema": True, "ema_decay": 0.9},
        "method": {"name": "dreambooth", "train_text_encoder": True},
        "data__random_flip": True,
        **changes,
    }
    return tiny.make_recipe(folder, **options)


def final_state(tree: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    found = Checkpoints(Storage(tree["output_dir"])).load_latest()
    assert found is not None and found.step == 6
    return found.learned, found.engine


def assert_same(left: Any, right: Any, where: str = "") -> None:
    if isinstance(left, torch.Tensor):
        assert torch.equal(left, right), where
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), where
        for name in left:
            assert_same(left[name], right[name], f"{where}/{name}")
    elif isinstance(left, list | tuple):
        assert len(left) == len(right), where
        for number, (a, b) in enumerate(zip(left, right, strict=True)):
            assert_same(a, b, f"{where}/{number}")
    else:
        assert left == right, where
