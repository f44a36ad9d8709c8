"""The batches of a method that sees pictures with CLIP: read when their turn comes, ahead, by each worker its share."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

from dreamfleet.datasets.images import open_picture
from dreamfleet.datasets.index import BadFile, Index
from dreamfleet.datasets.plan import BatchPlan
from dreamfleet.datasets.storage import read_uri
from dreamfleet.trainers.methods.base import Batch
from dreamfleet.trainers.sd.clip import Preprocessing


class ClipFeed:
    """The batches of one rank, in the plan's order; nothing but the coming few is in memory, for any size of set."""

    def __init__(
        self,
        plan: BatchPlan,
        *,
        instances: Index,
        preprocessing: Preprocessing,
        max_pixels: int,
        rank: int = 0,
        world: int = 1,
        num_micros: int = 1,
    ):
        self.plan, self.preprocessing, self.max_pixels = plan, preprocessing, max_pixels
        self.rank, self.world, self.num_micros = rank, world, num_micros
        self._uris = instances.column("uri")
        self.bad: list[BadFile] = []  # the index has left out what cannot be decoded

    def batch(self, step: int, micro: int = 0) -> Batch:
        """Make the batch of one micro-step, on the CPU.

        ``clip_pixels [N, 3, S, S]``; ``counted [N]``, 1 in the first pass over the set, 0 later; ``num_instances``.
        """
        draws = self.plan.draws(
            step, rank=self.rank, world=self.world, micro=micro, num_micros=self.num_micros
        )
        uris = [self._uris[draw.row] for draw in draws]
        pictures = [open_picture(read_uri(uri), uri=uri, max_pixels=self.max_pixels) for uri in uris]
        return {
            "clip_pixels": self.preprocessing(pictures),
            "counted": torch.tensor([float(draw.epoch == 0) for draw in draws]),
            "num_instances": len(draws),
        }

    def stream(self, start_step: int, stop_step: int | None = None, *, ahead: int = 4) -> Iterator[Batch]:
        """Yield the batches of steps ``start_step`` to ``stop_step`` (None: endless), ``ahead`` made in a thread."""
        steps = itertools.count(start_step) if stop_step is None else range(start_step, stop_step)
        positions = ((step, micro) for step in steps for micro in range(self.num_micros))
        pool = ThreadPoolExecutor(1, thread_name_prefix="feed")
        try:
            coming = deque(pool.submit(self.batch, *one) for one in itertools.islice(positions, ahead))
            while coming:
                ready = coming.popleft()
                coming.extend(pool.submit(self.batch, *one) for one in itertools.islice(positions, 1))
                yield ready.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
