"""Computes how many tasks fit into the memory of this process."""

from __future__ import annotations

from dreamfleet.trainers.recipe import Recipe


def fit_slots(
    recipe: Recipe, *, limit: int, uses_gpu: bool, gpu_share: float = 1.0, host_share: float = 1.0
) -> int:
    """Return how many tasks like ``recipe`` fit into memory at once, at most ``limit`` and at least one.

    ``gpu_share``, ``host_share``: the parts of the GPU's and of the machine's memory that this process may use.
    """
    if limit == 1:
        return 1
    import torch

    from dreamfleet.trainers.distributed.context import DistributedContext
    from dreamfleet.trainers.memory.slots import choose_slots

    device = torch.device("cuda" if uses_gpu else "cpu")
    distributed = DistributedContext(device=device, gpu_share=gpu_share)
    return choose_slots(recipe, distributed, host_share=host_share, limit=limit)
