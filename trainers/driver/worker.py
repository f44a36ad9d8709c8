"""One training process on a Ray cluster: calls run_worker with its rank and device, and polls for a stop."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from ray.train import UserCallback

from dreamfleet.datasets.environment import apply_variables
from dreamfleet.datasets.errors import RunFailed, UserError
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.driver.progress import log_to_run, watch_for_stop
from dreamfleet.trainers.report.events import CONTROLLER, EventLog

# Environment variables that workers get from the driver; no secrets, as Ray displays and logs them.
PASSED_ON = ("TORCH_EXTENSIONS_DIR", "TOKENIZERS_PARALLELISM")
PASSED_ON_PREFIXES = ("DREAMFLEET_",)


def train_worker(config: dict[str, Any], sent: Mapping[str, str]) -> dict[str, Any]:
    """Train as one of the workers that Ray Train starts; return the run's summary as plain data.

    ``config`` holds ``recipe`` (plain data), ``threads``, ``gpu_share`` and ``waited``; ``sent`` is the
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
    from dreamfleet.trainers.run.run import run_worker

    torch.set_num_threads(config["threads"])
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    recipe = build_recipe(config["recipe"])
    run = Storage(recipe.output_dir)
    with log_to_run(run, verbose=rank == 0), watch_for_stop(run, watch=rank == 0) as should_stop:
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


class RaiseAtOnce(UserCallback):
    """Ends the run at the first error that a restart would repeat; runs in Ray Train's controller.

    Ray Train restarts the workers after an exception in a worker, but not after one in a callback. A worker's
    exception raised here reaches the driver as the cause of a ControllerError, and ends the ranks that wait
    for the failed one.
    """

    def __init__(self, run: Storage, sent: Mapping[str, str]):
        self.run, self.sent = run, sent

    @cached_property
    def events(self) -> EventLog:
        """The events of the controller, which is another process than the driver."""
        apply_variables(self.sent)
        return EventLog(self.run, CONTROLLER)

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Raise the UserError or RunFailed of the lowest rank that has one."""
        for rank, error in sorted(worker_exceptions.items()):
            self.events.add("failure", rank=rank, cause=type(error).__name__, error=str(error)[:1000])
        for _, error in sorted(worker_exceptions.items()):
            if isinstance(error, UserError | RunFailed):
                raise error
