"""The batches of a method that sees files: decoded when their turn comes, ahead, by each worker its share."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from dreamfleet.datasets.config import DataConfig
from dreamfleet.datasets.images import open_picture
from dreamfleet.datasets.index import BadFile, Index
from dreamfleet.datasets.plan import BatchPlan
from dreamfleet.datasets.storage import read_uri
from dreamfleet.trainers.feed import to_samples
from dreamfleet.trainers.methods.base import Batch, Method, Use
from dreamfleet.trainers.pictures import Shown


class PictureReader:
    """Decodes the pictures of an index, one when asked."""

    def __init__(self, index: Index, *, max_pixels: int):
        self.samples, self.max_pixels = to_samples(index), max_pixels

    def __len__(self) -> int:
        return len(self.samples)

    def __call__(self, row: int) -> Use:
        """Return the picture of a row as it is."""
        sample = self.samples[row]
        picture = open_picture(read_uri(sample.uri), uri=sample.uri, max_pixels=self.max_pixels)
        return Use(sample, 0, picture)


class PictureFeed:
    """The batches of one rank, in the plan's order; nothing but the coming few is in memory, for any size of set."""

    def __init__(
        self,
        plan: BatchPlan,
        *,
        instances: Index,
        method: Method,
        data: DataConfig,
        rank: int = 0,
        world: int = 1,
        num_micros: int = 1,
    ):
        self.plan, self.method = plan, method
        self.rank, self.world, self.num_micros = rank, world, num_micros
        self._read = PictureReader(instances, max_pixels=data.max_pixels)
        self._shown = Shown(instances, data, plan.seed)
        self.bad: list[BadFile] = []  # the index has left out what cannot be decoded

    def batch(self, step: int, micro: int = 0) -> Batch:
        """Make the batch of one micro-step, on the CPU: what the method sees, and ``num_instances``."""
        draws = self.plan.draws(
            step, rank=self.rank, world=self.world, micro=micro, num_micros=self.num_micros
        )
        uses = []
        for draw in draws:
            use = self._read(draw.row)
            key = (self.plan.seed, draw.epoch, use.sample.id)
            uses.append(use._replace(epoch=draw.epoch, mirrored=self._shown.flips(draw), key=key))
        return {**self.method.see(uses), "num_instances": len(draws)}

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
