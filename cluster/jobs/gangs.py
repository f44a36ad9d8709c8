"""Reserves room on a cluster for all workers of a run at once, by a placement group."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from dreamfleet.cluster.jobs.queue import Entry
from dreamfleet.trainers.config.scaling import ScalingConfig, worker_resources
from dreamfleet.trainers.driver.session import RaySession


class Gangs:
    """Reserves room for one gang of workers at a time, and knows the sizes of gangs."""

    def __init__(self, session: RaySession):
        self.session = session
        self._sizes: dict[tuple[str, str], tuple[dict[str, float], int, str]] = {}
        self._reserved: tuple[str, Any, float] | None = None  # entry's ID, placement group, since when

    def needs(self, entry: Entry, scaling: Callable[[], ScalingConfig]) -> dict[str, float]:
        """Return the sum of the resources of an entry's workers."""
        share, workers, _ = self._size(entry, scaling)
        return {name: amount * workers for name, amount in share.items()}

    def reserve(self, entry: Entry, scaling: Callable[[], ScalingConfig]) -> bool:
        """Ask Ray for an entry's whole gang, instead of any other's; return whether it is granted."""
        from ray.util.placement_group import placement_group

        if self._reserved is None or self._reserved[0] != entry.id:
            self.release()
            share, workers, strategy = self._size(entry, scaling)
            group = placement_group([dict(share) for _ in range(workers)], strategy=strategy)
            self._reserved = (entry.id, group, time.monotonic())
        return bool(self._reserved[1].wait(0.5))

    @property
    def waited(self) -> float:
        """Seconds since the gang was asked for, or since :meth:`wait_again`."""
        return time.monotonic() - self._reserved[2] if self._reserved else 0.0

    def wait_again(self) -> None:
        """Count the seconds from now on: room is being made, or was."""
        if self._reserved is not None:
            self._reserved = (*self._reserved[:2], time.monotonic())

    def release(self) -> None:
        """Give the reserved room back."""
        from ray.util.placement_group import remove_placement_group

        if self._reserved is not None:
            remove_placement_group(self._reserved[1])
            self._reserved = None

    def _size(self, entry: Entry, scaling: Callable[[], ScalingConfig]) -> tuple[dict[str, float], int, str]:
        key = (entry.id, entry.package)
        if key not in self._sizes:
            found = scaling()
            nodes = [node.resources for node in self.session.nodes()]
            share = worker_resources(found, nodes, limit=self.session.growth_limit())
            workers = found.min_workers
            self._sizes[key] = (dict(share.resources), workers, found.placement_strategy)
        return self._sizes[key]
