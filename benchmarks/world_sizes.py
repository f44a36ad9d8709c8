"""Measures how far the weights of one run differ between numbers of workers, and which cause contributes how much.

DreamBooth of the cat with class images on the pocket model, STEPS steps (60) of 6 units of one image and one class
image. Every run has the same images and noise. ``difference`` is the norm of the difference of the trained weights,
over the norm of what the training changed; ``largest`` is the largest difference of a weight.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from measure import write_result

from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.distributed.process_group import leave_group
from dreamfleet.trainers.recipe import Recipe, build_recipe
from dreamfleet.trainers.run.checkpoint import Checkpoints
from dreamfleet.trainers.run.run import run_worker

ROOT = Path(__file__).parent.parent
STEPS = int(os.environ.get("STEPS", "60"))
UNITS = 6
#: name -> (workers, changes of the recipe, name of the run that it is compared with)
RUNS: dict[str, tuple[int, dict[str, Any], str]] = {
    "1 worker": (1, {}, ""),
    **{f"{world} workers, sums by unit": (world, {}, "1 worker") for world in (2, 3, 4)},
    **{f"{world} workers, sums by worker": (world, {"exchange": "step"}, "1 worker") for world in (2, 3, 4)},
    "1 worker, one micro-batch of 6": (1, {"batch": UNITS}, "1 worker"),
    "1 worker, Adam's epsilon 1e-4": (1, {"epsilon": 1e-4}, ""),
    "3 workers, sums by worker, epsilon 1e-4": (
        3,
        {"exchange": "step", "epsilon": 1e-4},
        "1 worker, Adam's epsilon 1e-4",
    ),
    "1 worker, one micro-batch of 6, epsilon 1e-4": (
        1,
        {"batch": UNITS, "epsilon": 1e-4},
        "1 worker, Adam's epsilon 1e-4",
    ),
}


def recipe_of(
    folder: Path, name: str, *, exchange: str = "unit", epsilon: float = 1e-8, batch: int = 1
) -> Recipe:
    """Return the recipe of a run."""
    method = {
        "name": "dreambooth",
        "with_prior_preservation": True,
        "num_class_images": 8,
        "prior_generation_steps": 4,
        "sample_batch_size": 8,
    }
    tree = {
        "method": method,
        "model": {"pretrained_model_name_or_path": "pocket"},
        "data": {
            "instance_data_dir": str(ROOT / "examples/cat/train"),
            "instance_prompt": "a sks cat face [filewords]",
            "class_prompt": "a cat face",
            "class_data_dir": str(folder / "class"),
            "resolution": 64,
            "random_flip": True,
        },
        "train": {"max_train_steps": STEPS, "train_batch_size": batch, "seed": 0, "export": False},
        "optimizer": {
            "learning_rate": 2e-4,
            "lr_scheduler": "cosine",
            "lr_warmup_steps": 10,
            "adam_epsilon": epsilon,
        },
        "engine": {"gradient_exchange": exchange},
        "scaling": {"num_workers": [1, UNITS // batch]},
        "output_dir": str(folder / name.replace(" ", "-").replace("'", "")),
        "report_to": [],
    }
    return build_recipe(tree)


def work(rank: int, world: int, folder: Path, name: str) -> None:
    """Train one run as one rank of ``world``."""
    torch.set_num_threads(1)
    if world > 1:
        store = f"file://{folder}/store-{abs(hash(name))}"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    run_worker(recipe_of(folder, name, **RUNS[name][1]), rank=rank, world=world)
    if world > 1:
        leave_group()


def weights_of(folder: Path, name: str) -> torch.Tensor:
    """Return the trained weights of a run as one tensor."""
    found = Checkpoints(Storage(recipe_of(folder, name).output_dir)).load_latest()
    assert found is not None
    return torch.cat([value.double().flatten() for value in found.learned.values()])


def main() -> None:
    """Train every run, and write and print the differences."""
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        from dreamfleet.trainers.distributed.context import DistributedContext
        from dreamfleet.trainers.run.build import assemble

        parts = assemble(recipe_of(folder, "start"), DistributedContext())
        start = torch.cat([value.double().flatten().clone() for value in parts.engine.weights().values()])
        parts.engine.close()
        del parts
        for name, (world, _, reference) in RUNS.items():
            torch.multiprocessing.start_processes(
                work, args=(world, folder, name), nprocs=world, start_method="fork"
            )
            if reference:
                base, found = weights_of(folder, reference), weights_of(folder, name)
                figures[name] = {
                    "difference": float((found - base).norm() / (base - start).norm()),
                    "largest": float((found - base).abs().max()),
                }
                print(f"{name}: {figures[name]}", file=sys.stderr, flush=True)
    write_result("world_sizes", {"steps": STEPS, "units": UNITS, "runs": figures})


if __name__ == "__main__":
    main()
