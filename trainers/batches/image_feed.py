"""The batches of a method that sees pictures: decoded when their turn comes, ahead, by each worker its share."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from PIL import Image

from dreamfleet.datasets.config import DataConfig
from dreamfleet.datasets.images.images import open_image
from dreamfleet.datasets.index.index import BadFile, Index
from dreamfleet.datasets.index.sources import read_image_file
from dreamfleet.datasets.plan import BatchPlan, Draw
from dreamfleet.trainers.batches.feed import to_samples
from dreamfleet.trainers.batches.sources import Shown
from dreamfleet.trainers.methods.base import Batch
from dreamfleet.trainers.methods.image_method import SeeingMethod, Use


class ImageReader:
    """Decodes the pictures of an index, one when asked."""

    def __init__(self, index: Index, *, max_pixels: int):
        self.samples, self.max_pixels = to_samples(index), max_pixels

    def __len__(self) -> int:
        return len(self.samples)

    def __call__(self, row: int) -> Use:
        """Return the picture of a row as it is."""
        sample = self.samples[row]
        image = open_image(read_image_file(sample.uri), uri=sample.uri, max_pixels=self.max_pixels)
        return Use(sample, 0, image)


class ImageFeed:
    """The batches of one rank, in the plan's order; nothing but the coming few is in memory, for any size of set.

    Pictures are decoded by this worker, or with ``data.source: stream`` by Ray Data on the cluster's CPUs, where they
    are also made as small as the method sees them.
    """

    def __init__(
        self,
        plan: BatchPlan,
        *,
        instances: Index,
        method: SeeingMethod,
        data: DataConfig,
        rank: int = 0,
        world: int = 1,
        num_micros: int = 1,
    ):
        self.plan, self.method, self.instances, self.data = plan, method, instances, data
        self.rank, self.world, self.num_micros = rank, world, num_micros
        self._read = ImageReader(instances, max_pixels=data.max_pixels)
        self._shown = Shown(instances, data, plan.seed)
        self._undecodable: dict[str, str] = {}

    @property
    def bad(self) -> list[BadFile]:
        """Pictures that could not be decoded on the way; the index has left out those that it could tell."""
        return [
            BadFile(uri, reason.removeprefix(f"{uri}: ")) for uri, reason in sorted(self._undecodable.items())
        ]

    def batch(self, step: int, micro: int = 0) -> Batch:
        """Make the batch of one micro-step, on the CPU: what the method sees, and ``num_instances``."""
        return self._see([(draw, self._read(draw.row)) for draw in self._draws(step, micro)])

    def stream(self, start_step: int, stop_step: int | None = None, *, ahead: int = 4) -> Iterator[Batch]:
        """Yield the batches of steps ``start_step`` to ``stop_step`` (None: endless), ``ahead`` made in a thread."""
        positions = self._positions(start_step, stop_step)
        if self.data.source == "stream":
            # Two of them: the stream reads ahead in a thread of its own.
            yield from self._from_cluster(positions, self._positions(start_step, stop_step))
            return
        pool = ThreadPoolExecutor(1, thread_name_prefix="feed")
        try:
            coming = deque(pool.submit(self.batch, *one) for one in itertools.islice(positions, ahead))
            while coming:
                ready = coming.popleft()
                coming.extend(pool.submit(self.batch, *one) for one in itertools.islice(positions, 1))
                yield ready.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _positions(self, start: int, stop: int | None) -> Iterator[tuple[int, int]]:
        steps = itertools.count(start) if stop is None else range(start, stop)
        return ((step, micro) for step in steps for micro in range(self.num_micros))

    def _from_cluster(
        self, positions: Iterator[tuple[int, int]], ahead: Iterator[tuple[int, int]]
    ) -> Iterator[Batch]:
        from dreamfleet.datasets.serve.stream import ImageStream, ImageView

        draws = (draw for position in ahead for draw in self._draws(*position))
        told = (ImageView(draw.row, None, False) for draw in draws)
        data = self.data
        with ImageStream(
            self.instances, told, resolution=data.resolution, max_pixels=data.max_pixels, fit=self.method.fit
        ) as images:
            self._undecodable = images.bad
            for position in positions:
                found = []
                for draw in self._draws(*position):
                    image = Image.fromarray(next(images))
                    sample = self._read.samples[draw.row]
                    found.append((draw, Use(sample, 0, image, instead=sample.uri in images.bad)))
                yield self._see(found)

    def _draws(self, step: int, micro: int) -> list[Draw]:
        return self.plan.draws(
            step, rank=self.rank, world=self.world, micro=micro, num_micros=self.num_micros
        )

    def _see(self, found: Sequence[tuple[Draw, Use]]) -> Batch:
        uses = []
        for draw, use in found:
            key = (self.plan.seed, draw.epoch, use.sample.id)
            uses.append(use._replace(epoch=draw.epoch, mirrored=self._shown.flips(draw), key=key))
        return {**self.method.see(uses), "num_instances": len(uses)}
