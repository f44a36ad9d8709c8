"""One worker's share of the batch plan, and the thread that prepares batches ahead of it."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from dreamfleet.datasets.plan import BatchPlan, Draw
from dreamfleet.trainers.distributed.context import DistributedContext
from dreamfleet.trainers.methods.base import Batch


@dataclass(frozen=True)
class PlanShare:
    """The part of the batch plan for one worker: of the ``num_units`` units of a step, unit rank, rank + world, ...

    The rank and the number of workers are read from ``distributed`` when a stream is opened.
    """

    plan: BatchPlan
    num_units: int = 1
    distributed: DistributedContext = field(default_factory=DistributedContext)

    def draws(self, step: int, unit: int = 0, *, classes: bool = False) -> list[Draw]:
        """Return the draws of one unit: of the instance images, or with ``classes`` of the class images."""
        draw = self.plan.class_draws if classes else self.plan.draws
        return draw(step, unit=unit, num_units=self.num_units)

    def positions(self, start: int, stop: int | None) -> Iterator[tuple[int, int]]:
        """Yield (step, unit) of this worker in the steps ``start`` to ``stop`` (None: endless)."""
        steps = itertools.count(start) if stop is None else range(start, stop)
        units = self.distributed.share(self.num_units)
        return ((step, unit) for step in steps for unit in units)

    def all_draws(self, start: int, stop: int | None, *, classes: bool = False) -> Iterator[Draw]:
        """Yield this worker's draws of the steps ``start`` to ``stop`` (None: endless), in order."""
        for position in self.positions(start, stop):
            yield from self.draws(*position, classes=classes)


def prepare_ahead(
    make: Callable[[int, int], Batch],
    positions: Iterator[tuple[int, int]],
    *,
    ahead: int,
    close: Callable[[], None] = lambda: None,
) -> Iterator[Batch]:
    """Yield ``make(step, unit)`` for every position; a thread prepares up to ``ahead`` of them in advance.

    ``close`` is called at the end, before the thread is joined: it must unblock a call of ``make`` that
    waits.
    """
    pool = ThreadPoolExecutor(1, thread_name_prefix="feed")
    pending: deque[Future[Batch]] = deque()
    try:
        while True:
            for position in itertools.islice(positions, ahead - len(pending)):
                pending.append(pool.submit(make, *position))
            if not pending:
                return
            yield pending.popleft().result()
    finally:
        close()
        pool.shutdown(wait=True, cancel_futures=True)
