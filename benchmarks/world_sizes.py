"""Measures how far the weights of one run differ between numbers of workers, and which cause contributes how much.

DreamBooth of the cat with class images on the pocket model, STEPS steps (60) of 6 units of one image and one class
image. Every run has the same images and noise. ``difference`` is the norm of the difference of the trained weights,
over the norm of what the training changed; ``largest`` is the largest difference of a weight.

``exchange``: seconds to sum 64 MiB of gradients over processes of this machine, without overlap, by an all-reduce of
gloo and by the exchange in unit order. An argument selects a part: ``weights`` or ``exchange``.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from measure import spread, write_result

from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.distributed.context import DistributedContext
from dreamfleet.trainers.distributed.process_group import leave_group
from dreamfleet.trainers.engines.gradient_exchange import GradientExchange
from dreamfleet.trainers.recipe import Recipe, build_recipe
from dreamfleet.trainers.run.build import assemble
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


def time_exchange(rank: int, world: int, folder: Path) -> None:
    """Time both sums as one rank of ``world``; rank 0 writes the seconds."""
    torch.set_num_threads(1)
    store = f"file://{folder}/exchange-{world}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    params = [torch.nn.Parameter(torch.zeros(2**18)) for _ in range(64)]
    exchange = GradientExchange(params, num_units=world, by_unit=True)
    exchange.join(rank, world)
    whole = torch.ones(2**24)

    def in_order() -> None:
        for param in params:
            param.grad = torch.ones_like(param)
        dist.barrier()
        exchange.begin()
        exchange.end()
        exchange.finish()

    def all_reduce() -> None:
        dist.barrier()
        dist.all_reduce(whole.fill_(1.0))

    seconds: dict[str, list[float]] = {"all-reduce": [], "in unit order": []}
    for _ in range(8):
        for name, run in (("all-reduce", all_reduce), ("in unit order", in_order)):
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
    if rank == 0:
        found = {name: spread(each[1:]) for name, each in seconds.items()}
        (folder / f"exchange-{world}.json").write_text(json.dumps(found))
    leave_group()


def measure_exchange() -> dict[str, Any]:
    """Return the seconds of both sums by number of workers."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for world in (2, 3, 4):
            torch.multiprocessing.start_processes(
                time_exchange, args=(world, folder), nprocs=world, start_method="fork"
            )
            found[f"{world} workers"] = json.loads((folder / f"exchange-{world}.json").read_text())
            print(f"{world} workers: {found[f'{world} workers']}", file=sys.stderr, flush=True)
    return found


def measure_weights() -> dict[str, Any]:
    """Train every run; return the differences."""
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
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
    return {"steps": STEPS, "units": UNITS, "runs": figures}


PARTS = {"weights": measure_weights, "exchange": measure_exchange}

if __name__ == "__main__":
    chosen = {name: PARTS[name]() for name in sys.argv[1:] or PARTS}
    write_result(
        "world_sizes", chosen, how=f"STEPS={STEPS} python benchmarks/world_sizes.py {' '.join(chosen)}"
    )
