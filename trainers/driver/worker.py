"""One training process on a Ray cluster: calls run_worker with its rank and device, and polls for a stop."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from dreamfleet.datasets.environment import apply_variables
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.distributed.pulse import Pulse, training_here
from dreamfleet.trainers.driver.progress import log_to_run, watch_for_stop
from dreamfleet.trainers.driver.ray_metrics import publish_runs
from dreamfleet.trainers.report.events import set_node

# Environment variables that workers get from the driver; no secrets, as Ray displays and logs them.
PASSED_ON = ("TORCH_EXTENSIONS_DIR", "TOKENIZERS_PARALLELISM")
PASSED_ON_PREFIXES = ("DREAMFLEET_",)


def train_worker(config: dict[str, Any], sent: Mapping[str, str]) -> dict[str, Any]:
    """Train as one of the workers that Ray Train starts; return the run's summary as plain data.

    ``config`` holds ``recipe`` (plain data), ``threads``, ``gpu_share``, ``waited`` and ``owner``; ``sent`` is the
    result of ``environment.variables_to_send``. When a worker dies, Ray restarts the whole group and does not
    tell the new workers: so a worker always resumes from the newest valid checkpoint in the run folder. For a
    new run the driver has checked that there is none.
    """
    apply_variables(sent)
    import ray.train
    import ray.train.torch
    import torch

    from dreamfleet.trainers.driver.evaluator import RayEvaluator
    from dreamfleet.trainers.recipe import build_recipe
    from dreamfleet.trainers.run.fence import Fence
    from dreamfleet.trainers.run.run import run_worker

    publish_runs()
    torch.set_num_threads(config["threads"])
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    recipe = build_recipe(config["recipe"])
    fence = Fence(Storage(recipe.output_dir), config["owner"])
    run = fence.guarded()
    set_node(ray.util.get_node_ip_address())
    with (
        training_here(Pulse()) as pulse,
        log_to_run(run, verbose=rank == 0),
        watch_for_stop(run, watch=rank == 0) as should_stop,
    ):
        summary = run_worker(
            recipe,
            rank=rank,
            world=world,
            device=ray.train.torch.get_device(),
            gpu_share=config["gpu_share"],
            resume=True,
            should_stop=should_stop,
            waited=config["waited"],
            make_evaluator=lambda begins: RayEvaluator(
                recipe, sent, environment=worker_environment, begins=begins
            ),
            pulse=pulse,
            fence=fence,
        )
    return dataclasses.asdict(summary)


def worker_environment(threads: int) -> dict[str, str]:
    """Return the environment variables of a training worker.

    The number of threads is set explicitly: Ray gives a worker with one reserved CPU a single thread
    (OMP_NUM_THREADS=1), which slows torch.
    """
    passed = {
        name: value
        for name, value in os.environ.items()
        if name in PASSED_ON or name.startswith(PASSED_ON_PREFIXES)
    }
    return passed | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}
