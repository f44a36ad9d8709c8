"""Runs of two ranks that end in different ways, and their process groups afterwards; for test_process_group.py.

The ranks are forked after the imports, which take longer than the runs. The creator of the group destroys it
while the error of the run, as in Ray Train, and the engine are still referenced.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import tiny
import torch
import torch.distributed as dist

from dreamfleet.trainers.config.optimizer import OptimizerConfig
from dreamfleet.trainers.engines import gradient_exchange
from dreamfleet.trainers.engines.torch_engine import TorchEngine
from dreamfleet.trainers.methods.dreambooth import DreamBooth
from dreamfleet.trainers.recipe import build_recipe
from dreamfleet.trainers.run import build as assemble
from dreamfleet.trainers.run.run import run_worker

WORLD = 2


def fail(*_: Any, **__: Any) -> Any:
    """Raise RuntimeError, as the replaced code would when it fails."""
    raise RuntimeError("planted")


def interrupt(*_: Any, **__: Any) -> Any:
    """Raise KeyboardInterrupt, as on a second Ctrl-C."""
    raise KeyboardInterrupt


#: Name of an end -> (object, attribute, replacement) that makes a run end like that.
ENDS: dict[str, tuple[Any, str, Callable[..., Any]] | None] = {
    "completed": None,
    "fails in the forward pass": (DreamBooth, "forward", fail),
    "fails while gradients are sent": (gradient_exchange._AllReduce, "add", fail),
    "fails in a step": (TorchEngine, "step", fail),
    "is interrupted": (TorchEngine, "step", interrupt),
    "fails after the engine was built": (assemble, "make_rates", fail),
}


def end(how: str, folder: Path, rank: int) -> dict[str, Any]:
    """Run to the given end, destroy the process group, and return the error."""
    store = f"file://{folder}/store-{list(ENDS).index(how)}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD)
    recipe = build_recipe(tiny.make_recipe(folder, output_dir=str(folder / how), train__train_batch_size=1))
    planted, error = ENDS[how], None
    engines: list[TorchEngine] = []

    def build(engine: TorchEngine, optimizer: OptimizerConfig, build: Any = TorchEngine._build) -> None:
        engines.append(engine)
        build(engine, optimizer)

    with (
        mock.patch.object(TorchEngine, "_build", build),
        mock.patch.object(*planted) if planted else mock.MagicMock(),
    ):
        try:
            run_worker(recipe, rank=rank, world=WORLD)
        except BaseException as raised:  # noqa: BLE001 - kept referenced, as in Ray Train
            error = raised
    dist.destroy_process_group()
    return {"error": type(error).__name__}


def main(rank: int, folder: Path) -> None:
    """Run every kind of end, and write the results of this rank."""
    torch.set_num_threads(1)
    seen: dict[str, Any] = {}
    for how in ENDS:
        seen[how] = end(how, folder, rank)
    (folder / f"seen-{rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    place = Path(sys.argv[1])
    tiny.make_recipe(place)
    torch.multiprocessing.start_processes(main, args=(place,), nprocs=WORLD, start_method="fork")
