"""Process groups: one of this process alone, and the end of a group after everything that uses it."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

# Of one collective operation within a step: how long one rank may be slower than another, as torch's compiler and a
# slow disk make it. While rank 0 writes or uploads, the others wait in a group of their own (Place.group).
STEP_TIMEOUT = timedelta(hours=2)


@contextmanager
def step_timeouts() -> Iterator[None]:
    """Give the groups that are made within this context STEP_TIMEOUT; by default torch gives NCCL's ten minutes."""
    groups = dist.distributed_c10d._world.pg_map
    before = set(groups)
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of backends that have no timeout
        for group in set(groups) - before:
            dist.distributed_c10d._set_pg_timeout(STEP_TIMEOUT, group)


@contextmanager
def lone_group(
    device: torch.device | None = None, *, destroy: Callable[[], Any] = dist.destroy_process_group
) -> Iterator[None]:
    """Within this context there is a process group: the one there is already, else one of this process alone."""
    if dist.is_initialized():
        yield
        return
    backend = "nccl" if device is not None and device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        leave_group(destroy)


def leave_group(destroy: Callable[[], Any] = dist.destroy_process_group) -> None:
    """Destroy the process group, after the reducer of every DDP module of this process."""
    gc.collect()
    # Not isinstance: it asks an object for its class, and some objects answer with an import or an error.
    for found in [item for item in gc.get_objects() if issubclass(type(item), DistributedDataParallel)]:
        release_reducer(found)
    destroy()


def release_reducer(module: Any) -> None:
    """Free the reducer of a DDP module, which cannot be used again; leave any other module as it is.

    The reducer holds the process group. If it is freed after the group was destroyed, its destructor joins gloo's
    thread while it holds the GIL, and that thread may wait for the GIL: the process hangs and no signal is handled.
    Whatever still refers to the module (the frames of an error's traceback do) would keep the reducer for later.
    """
    if isinstance(module, DistributedDataParallel):
        module.reducer = module.logger = None  # type: ignore[assignment]
