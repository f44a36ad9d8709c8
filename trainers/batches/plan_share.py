"""One rank's share of the batch plan, and the thread that prepares batches ahead of it."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from dreamfleet.datasets.plan import BatchPlan, Draw
from dreamfleet.trainers.methods.base import Batch


@dataclass(frozen=True)
class PlanShare:
    """The part of the batch plan for one of ``world`` ranks; a step has ``num_micros`` micro-batches."""

    plan: BatchPlan
    rank: int = 0
    world: int = 1
    num_micros: int = 1

    def draws(self, step: int, micro: int = 0, *, classes: bool = False) -> list[Draw]:
        """Return the draws of one micro-batch: of the instance images, or with ``classes`` of the class images."""
        draw = self.plan.class_draws if classes else self.plan.draws
        return draw(step, rank=self.rank, world=self.world, micro=micro, num_micros=self.num_micros)

    def positions(self, start: int, stop: int | None) -> Iterator[tuple[int, int]]:
        """Yield (step, micro) of the steps ``start`` to ``stop`` (None: endless)."""
        steps = itertools.count(start) if stop is None else range(start, stop)
        return ((step, micro) for step in steps for micro in range(self.num_micros))

    def all_draws(self, start: int, stop: int | None, *, classes: bool = False) -> Iterator[Draw]:
        """Yield the draws of the steps ``start`` to ``stop`` (None: endless), in order."""
        for position in self.positions(start, stop):
            yield from self.draws(*position, classes=classes)


def prepare_ahead(
    make: Callable[[int, int], Batch],
    positions: Iterator[tuple[int, int]],
    *,
    ahead: int,
    close: Callable[[], None] = lambda: None,
) -> Iterator[Batch]:
    """Yield ``make(step, micro)`` for every position; a thread prepares up to ``ahead`` of them in advance.

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
