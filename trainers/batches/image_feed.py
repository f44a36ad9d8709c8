"""Batches of decoded images, for methods that train on images instead of latents."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from PIL import Image

from dreamfleet.datasets.config import DataConfig
from dreamfleet.datasets.images.images import open_image
from dreamfleet.datasets.index.index import BadFile, Index
from dreamfleet.datasets.index.sources import read_image_file
from dreamfleet.datasets.plan import Draw
from dreamfleet.trainers.batches.feed import to_samples
from dreamfleet.trainers.batches.plan_share import PlanShare, prepare_ahead
from dreamfleet.trainers.batches.sources import Shown
from dreamfleet.trainers.methods.base import Batch
from dreamfleet.trainers.methods.image_method import ImageMethod, Use


class ImageReader:
    """Decodes the images of an index, one per call."""

    def __init__(self, index: Index, *, max_pixels: int):
        self.samples, self.max_pixels = to_samples(index), max_pixels

    def __len__(self) -> int:
        return len(self.samples)

    def __call__(self, row: int) -> Use:
        """Return the image of a row without augmentation."""
        sample = self.samples[row]
        image = open_image(read_image_file(sample.uri), uri=sample.uri, max_pixels=self.max_pixels)
        return Use(sample, 0, image)


class ImageFeed:
    """The batches of one worker, in the plan's order. Only the next few are in memory, for any size of the set.

    Images are decoded by this worker, or with ``data.source: stream`` by Ray tasks on the cluster's CPUs,
    which also apply the method's :attr:`~ImageMethod.fit`, such as shrinking.
    """

    def __init__(self, share: PlanShare, *, instances: Index, method: ImageMethod, data: DataConfig):
        self.share, self.plan, self.method = share, share.plan, method
        self.instances, self.data = instances, data
        self._read = ImageReader(instances, max_pixels=data.max_pixels)
        self._shown = Shown(instances, data, share.plan.seed)
        self._undecodable: dict[str, str] = {}
        self._waits: dict[str, float] = {}

    @property
    def bad(self) -> list[BadFile]:
        """Images that could not be decoded so far, besides those that indexing has left out."""
        return [
            BadFile(uri, reason.removeprefix(f"{uri}: ")) for uri, reason in sorted(self._undecodable.items())
        ]

    @property
    def waits(self) -> dict[str, float]:
        """Seconds that this rank has waited for streamed images, by cause; {} if none are streamed."""
        return self._waits

    def batch(self, step: int, unit: int = 0) -> Batch:
        """Return the batch of one unit of a step, on the CPU: the method's tensors, and ``num_instances``."""
        return self._see([(draw, self._read(draw.row)) for draw in self.share.draws(step, unit)])

    def stream(self, start_step: int, stop_step: int | None = None, *, ahead: int = 4) -> Iterator[Batch]:
        """Yield this worker's batches of the steps ``start_step`` to ``stop_step`` (None: endless).

        A thread prepares up to ``ahead`` batches in advance; with ``data.source: stream`` Ray tasks read
        ahead.
        """
        positions = self.share.positions(start_step, stop_step)
        if self.data.source != "stream":
            yield from prepare_ahead(self.batch, positions, ahead=ahead)
            return
        from dreamfleet.datasets.serve.stream import ImageStream, ImageView

        data, draws = self.data, self.share.all_draws(start_step, stop_step)
        views = (ImageView(draw.row, None, False) for draw in draws)
        with ImageStream(
            self.instances,
            views,
            resolution=data.resolution,
            resampling=data.image_interpolation_mode,
            max_pixels=data.max_pixels,
            fit=self.method.fit,
        ) as images:
            self._undecodable, self._waits = images.bad, images.waits
            for position in positions:
                found = []
                for draw in self.share.draws(*position):
                    image = Image.fromarray(next(images))
                    sample = self._read.samples[draw.row]
                    found.append((draw, Use(sample, 0, image, instead=sample.uri in images.bad)))
                yield self._see(found)

    def _see(self, found: Sequence[tuple[Draw, Use]]) -> Batch:
        uses = []
        for draw, use in found:
            key = (self.plan.seed, draw.epoch, use.sample.id)
            uses.append(use._replace(epoch=draw.epoch, mirrored=self._shown.flips(draw), key=key))
        return {**self.method.collate(uses), "num_instances": len(uses)}
