"""Chooses who works for the `data` commands: this machine, or the workers of a Ray cluster."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from dreamfleet.datasets.processing.runner import Workers
from dreamfleet.trainers.driver.session import Node, ray_session, uses_cluster
from dreamfleet.trainers.driver.shared_paths import PathsByKey, check_machines
from dreamfleet.trainers.driver.worker import worker_environment

MODEL_CPUS = 4  # of an actor that runs a model on CPUs; more threads gain little


@contextmanager
def data_workers(
    address: str | None,
    *,
    reads: PathsByKey,
    writes: PathsByKey,
    shared: Sequence[str] = (),
    count: int = 0,
    model: bool = False,
) -> Iterator[Workers]:
    """Yield the workers on the Ray cluster at ``address``, else RAY_ADDRESS, else on this machine.

    ``count``: their number; 0 chooses it. Without a cluster these are processes, one for each CPU; with ``model``, this
    process alone, which then uses all CPUs or the GPU. On a cluster, workers with a ``model`` get a GPU each, or
    :data:`MODEL_CPUS` CPUs if there is none. ``reads`` and ``writes`` are paths and addresses that all machines must
    see, by the option that names them. Raises UserError if there is no such cluster, or for a path that is not shared.
    """
    if not uses_cluster(address):
        here = 1 if model else count or len(os.sched_getaffinity(0))
        yield Workers(here)
        return
    with ray_session(address) as session:
        check_machines(session, reads=reads, writes=writes, shared=shared)
        nodes = session.nodes()
        number, resources = model_share(nodes, count) if model else (count or _cpus(nodes), {"CPU": 1.0})
        threads = int(resources.get("CPU", 1))
        yield Workers(number, True, resources, worker_environment(threads))


def model_share(nodes: Sequence[Node], count: int) -> tuple[int, dict[str, float]]:
    """Return the number of workers that run a model, and the resources of each; ``count`` 0 chooses the number."""
    gpus = int(sum(node.resources.get("GPU", 0) for node in nodes))
    if gpus:
        return count or gpus, {"GPU": 1.0, "CPU": 1.0}
    sizes = [int(node.resources.get("CPU", 0)) for node in nodes]
    cpus = max(1, min([MODEL_CPUS, *(size for size in sizes if size)]))
    return count or max(1, sum(size // cpus for size in sizes)), {"CPU": float(cpus)}


def _cpus(nodes: Sequence[Node]) -> int:
    return max(1, int(sum(node.resources.get("CPU", 0) for node in nodes)))
