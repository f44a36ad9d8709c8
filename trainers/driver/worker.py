"""One training process on a Ray cluster: calls run_worker with its rank and device, and polls for a stop."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from dreamfleet.datasets.environment import apply_variables
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.distributed.membership import Left, Membership, own_address
from dreamfleet.trainers.distributed.pulse import Pulse, training_here
from dreamfleet.trainers.driver.progress import be_verbose, log_to_run, watch_for_stop
from dreamfleet.trainers.driver.ray_metrics import publish_runs
from dreamfleet.trainers.report.events import set_node

# Environment variables that workers get from the driver; no secrets, as Ray displays and logs them.
PASSED_ON = ("TORCH_EXTENSIONS_DIR", "TOKENIZERS_PARALLELISM")
PASSED_ON_PREFIXES = ("DREAMFLEET_",)


def train_worker(
    config: dict[str, Any], sent: Mapping[str, str], coordinator: tuple[tuple[str, int], bytes] | None = None
) -> dict[str, Any]:
    """Train as one of the workers that Ray Train starts; return the run's summary as plain data.

    ``config`` holds ``recipe`` (plain data), ``threads``, ``gpu_share``, ``backend``, ``waited`` and ``owner``;
    ``sent`` is the result of ``environment.variables_to_send``. ``coordinator``: its address and key. A worker that
    starts while others train joins them. If all workers start, they resume from the newest valid checkpoint in the run
    folder; for a new run the driver has checked that there is none. A worker that leaves a run, which the others
    continue, returns ``{"left": reason}``.
    """
    apply_variables(sent)
    import ray.train
    import torch

    from dreamfleet.trainers.driver.evaluator import RayEvaluator
    from dreamfleet.trainers.recipe import build_recipe
    from dreamfleet.trainers.run.fence import Fence
    from dreamfleet.trainers.run.run import run_worker

    publish_runs()
    torch.set_num_threads(config["threads"])
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    device = _device(of_group=coordinator is None)
    recipe = build_recipe(config["recipe"])
    fence = Fence(Storage(recipe.output_dir), config["owner"])
    run = fence.guarded()
    set_node(ray.util.get_node_ip_address())
    with (
        training_here(Pulse()) as pulse,
        log_to_run(run, verbose=rank == 0 and coordinator is None),
        watch_for_stop(run, watch=rank == 0 or coordinator is not None) as should_stop,
        _membership(coordinator, rank, world, config["backend"]) as membership,
    ):
        try:
            summary = run_worker(
                recipe,
                rank=rank,
                world=world,
                device=device,
                gpu_share=config["gpu_share"],
                resume=True,
                should_stop=should_stop,
                waited=config["waited"],
                pulse=pulse,
                fence=fence,
                membership=membership,
                on_main=be_verbose,
                make_evaluator=lambda begins: RayEvaluator(
                    recipe, sent, environment=worker_environment, begins=begins
                ),
            )
        except Left as left:
            return {"left": str(left)}
        if membership is not None:
            membership.close(completed=True)
    return dataclasses.asdict(summary)


def _device(*, of_group: bool) -> Any:
    """Return this worker's device; ``of_group``: it was started as part of one group of Ray Train's."""
    import ray.train.torch

    device = ray.train.torch.get_device()
    if device.type == "cuda" and not of_group:  # Ray numbers the workers of a node only within a group
        os.environ["LOCAL_RANK"] = str(device.index or 0)
    return device


@contextmanager
def _membership(
    coordinator: tuple[tuple[str, int], bytes] | None, rank: int, world: int, backend: str
) -> Iterator[Membership | None]:
    """Yield this worker's membership, which ends with the context; None without a coordinator."""
    if coordinator is None:
        yield None
        return
    address, key = coordinator
    host = own_address(address)
    membership = Membership(address, key, rank=rank, expected=world, host=host, backend=backend)
    try:
        yield membership
    except BaseException as error:
        membership.close(why=f"{type(error).__name__}: {error}"[:300])
        raise
    membership.close(why="it left")


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
