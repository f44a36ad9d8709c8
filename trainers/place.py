"""Where a worker stands among its equals."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from dreamfleet.trainers.sd.device import numbered


@dataclass(frozen=True)
class Place:
    """Where a worker stands among its equals, and what it computes on."""

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    gpu_share: float = 1.0  # of the device's memory, which this worker may fill

    def __post_init__(self) -> None:
        """Give the device its number."""
        object.__setattr__(self, "device", numbered(self.device))

    @property
    def leads(self) -> bool:
        """Whether this is rank 0, which speaks and writes."""
        return self.rank == 0

    def wait(self) -> None:
        """Wait until every worker is here."""
        if self.world == 1:
            return
        if dist.get_backend() == "nccl":  # guesses the device otherwise, and warns
            dist.barrier(device_ids=[self.device.index])
        else:
            dist.barrier()

    def union(self, items: Iterable[Any]) -> list[Any]:
        """Return what any worker has, once each and sorted; the same on every worker."""
        found: list[Any] = [list(items)]
        if self.world > 1:
            found = [None] * self.world
            dist.all_gather_object(found, list(items))
        return sorted({item for part in found for item in part})

    def told(self, value: Any) -> Any:
        """Return rank 0's value on every worker."""
        values = [value]
        if self.world > 1:
            dist.broadcast_object_list(values)
        return values[0]
