"""Process groups: a group of one process, and the destruction of a group after everything that uses it."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

# For one collective operation within a step: how much later one rank may arrive than another, because of torch's
# compiler or a slow disk. While rank 0 writes or uploads, the others wait in another group (DistributedContext.group).
STEP_TIMEOUT = timedelta(hours=2)


@contextmanager
def step_timeouts() -> Iterator[None]:
    """Set STEP_TIMEOUT for the groups created within this context; torch's default for NCCL is ten minutes."""
    groups = dist.distributed_c10d._world.pg_map
    before = set(groups)
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about backends without a timeout
        for group in set(groups) - before:
            dist.distributed_c10d._set_pg_timeout(STEP_TIMEOUT, group)


@contextmanager
def lone_group(
    device: torch.device | None = None, *, destroy: Callable[[], Any] = dist.destroy_process_group
) -> Iterator[None]:
    """Within this context a process group exists: the existing one, or else a group of this process only."""
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
    """Free the reducer of every DDP module of this process, then destroy the process group."""
    gc.collect()
    # Not isinstance: it reads __class__, for which some objects import a module or raise an error.
    for found in [item for item in gc.get_objects() if issubclass(type(item), DistributedDataParallel)]:
        release_reducer(found)
    destroy()


def end_group() -> None:
    """Destroy the process group, if there is one; it may be broken. No DDP module may use it: see leave_group."""
    if dist.is_initialized():
        with suppress(RuntimeError):
            dist.destroy_process_group()


def release_reducer(module: Any) -> None:
    """Free the reducer of a DDP module, which cannot be used afterwards; leave any other module unchanged.

    The reducer holds the process group. If it is freed after the group was destroyed, its destructor joins gloo's
    thread while it holds the GIL, and that thread may wait for the GIL: the process hangs and handles no signal. Any
    remaining reference to the module, such as the frames of a traceback, would otherwise keep the reducer until then.
    """
    if isinstance(module, DistributedDataParallel):
        module.reducer = module.logger = None  # type: ignore[assignment]
