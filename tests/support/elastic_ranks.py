"""One of up to four ranks that train every method at each number of workers of a range; for test_elastic_ranks.py.

The ranks are forked after the imports, which take longer than the runs.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import tiny
import torch
import torch.distributed as dist
from method_cases import IMAGES, RATES, SECTIONS

from dreamfleet.trainers.config.method import METHODS
from dreamfleet.trainers.distributed.process_group import leave_group
from dreamfleet.trainers.recipe import build_recipe
from dreamfleet.trainers.run.run import run_worker

MOST = 4
WORLDS = (1, 2, 3, 4)
LORA = {"name": "dreambooth", "lora_rank": 2, "lora_dropout": 0.3, "train_text_encoder": True}
PRIOR = {
    "name": "dreambooth",
    "with_prior_preservation": True,
    "num_class_images": 3,
    "prior_generation_steps": 2,
}


def cases(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the changes of the recipe by case: every method with 8 units per step, and single options."""
    changes: dict[str, dict[str, Any]] = {}
    for name in METHODS.names():
        changes[name] = {
            "method": SECTIONS[name],
            "optimizer__learning_rate": RATES[name],
            "data__instance_data_dir": str(folder / IMAGES.get(name, "pictures")),
        }
    changes["dropout"] = {"method": LORA, "train__gradient_accumulation_steps": 1}
    changes["prior"] = {"method": PRIOR, "train__gradient_accumulation_steps": 3}
    changes["all-reduce"] = {"engine": {"gradient_exchange": "step"}}
    # an estimate, and a step count and an average, that every worker must compute alike
    changes["prodigy"] = {"optimizer": {"name": "prodigy", "learning_rate": 1.0}}
    changes["schedule-free"] = {"optimizer": {"name": "adamw_schedulefree", "learning_rate": 1e-3}}
    changes["buckets"] = {"data__instance_data_dir": str(folder / "shapes"), **tiny.SHAPES}
    return changes


def recipe_of(folder: Path, name: str, run: str) -> Any:
    """Return the recipe of a case."""
    changes: dict[str, Any] = {
        "train__gradient_accumulation_steps": 2,
        "train__train_batch_size": 1,
        "train__max_train_steps": 3,
        "train__export": False,
        "optimizer__max_grad_norm": 0.5,
        "scaling": {"num_workers": [1, MOST]},
        **cases(folder)[name],
    }
    if name == "discriminator":
        changes["validation"] = {"steps": 100}
    return build_recipe(tiny.make_recipe(folder, output_dir=str(folder / name / run), **changes))


def main(rank: int, world: int, folder: Path, names: tuple[str, ...]) -> None:
    """Train every case as one rank of ``world``."""
    torch.set_num_threads(1)
    if world > 1:
        store = f"file://{folder}/store-{world}"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    for name in names:
        run_worker(recipe_of(folder, name, str(world)), rank=rank, world=world)
    if world > 1:
        leave_group()


if __name__ == "__main__":
    place = Path(sys.argv[1])
    tiny.make_recipe(place)
    tiny.make_two_classes(place / "labelled", 12)
    tiny.make_shapes(place / "shapes")
    chosen = tuple(sys.argv[2:]) or tuple(cases(place))
    for size in WORLDS:
        torch.multiprocessing.start_processes(
            main, args=(size, place, chosen), nprocs=size, start_method="fork"
        )
