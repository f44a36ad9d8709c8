"""Sources of a feed's images: resident latents, resident image files, or images streamed in plan order."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from torch import Tensor

from dreamfleet.datasets.buckets import training_sizes
from dreamfleet.datasets.config import DataConfig
from dreamfleet.datasets.images.masks import ImageView, cut_for_training
from dreamfleet.datasets.images.resampling import place_target
from dreamfleet.datasets.index.index import BadFile, Index
from dreamfleet.datasets.index.sources import read_image_file, read_mask
from dreamfleet.datasets.plan import Draw
from dreamfleet.datasets.rng import numpy_rng
from dreamfleet.trainers.batches.vae_encoding import Encoded, encode_index, read_cut, to_tensors
from dreamfleet.trainers.distributed.context import DistributedContext
from dreamfleet.trainers.models.family import DiffusionModel

if TYPE_CHECKING:
    from dreamfleet.datasets.serve.stream import ImageStream


class Images(Protocol):
    """Interface of a source of images for the feed."""

    shown: Shown

    def take(self, draws: Sequence[Draw]) -> dict[str, Tensor]:
        """Return ``mean`` and ``std`` ``[B, C, h, w]`` of cached latents, or ``pixels`` ``[B, 3, H, W]`` in [-1, 1].

        With ``data.alpha_mask`` also ``mask`` ``[B, 1, h, w]``, the weights of the loss. All images must have
        the same size. ``rows`` ``[B]`` are the index rows of the images, if some may replace undecodable
        images.
        """
        ...


@runtime_checkable
class FollowsPlan(Protocol):
    """Interface of a source that looks ahead along the draws of the feed."""

    @property
    def bad(self) -> list[BadFile]:
        """Images that could not be decoded so far; others were used in their place."""
        ...

    @property
    def waits(self) -> dict[str, float]:
        """Seconds that were waited for images so far, by cause."""
        ...

    def follow(self, draws: Iterable[Draw]) -> None:
        """Start to look ahead along these draws; ``take`` must then be called for exactly these."""
        ...

    def close(self) -> None:
        """Stop looking ahead."""
        ...


class Shown:
    """The view of each draw's image: the size of its bucket, its crop, and whether it is mirrored.

    Crop and mirroring are keyed by (seed, epoch, image id).
    """

    def __init__(self, index: Index, data: DataConfig, seed: int):
        self.ids: Sequence[str] = index.lazily(("id",), str)
        self.data, self.seed = data, seed
        self.sizes = training_sizes(index.sizes(), data)
        self.files = index.sizes()

    def time_ids(self, draws: Sequence[Draw], rows: Sequence[int] | None = None) -> Tensor:
        """Return SDXL's size condition of each draw ``[B, 6]``; see :class:`Condition`.

        ``rows``: the index rows of the images that are used, with the crops of the draws; None: those of the
        draws. Top and left of a mirrored image are those of the crop in the mirrored image, as in kohya's
        scripts.
        """
        rows = rows or [draw.row for draw in draws]
        ids = [self._size_ids(self.of(draw), row) for draw, row in zip(draws, rows, strict=True)]
        return torch.tensor(ids, dtype=torch.float32)

    def _size_ids(self, draw: ImageView, row: int) -> tuple[int, ...]:
        (file_width, file_height), (width, height) = self.files[row], self.sizes[draw.row]
        placed = place_target((file_width, file_height), (width, height), crop_key=draw.crop)
        left = placed.width - width - placed.left if draw.flip else placed.left
        return file_height, file_width, placed.top, left, height, width

    def of(self, draw: Draw) -> ImageView:
        """Return the view (crop, mirroring and size) of one draw's image."""
        where = ("crop", self.seed, draw.epoch, self.ids[draw.row])
        crop = None if self.data.center_crop else tuple(numpy_rng(*where).random(2).tolist())
        return ImageView(draw.row, crop, self.flips(draw), self.sizes[draw.row])

    def flips(self, draw: Draw) -> bool:
        """Return whether one draw's image is mirrored."""
        if not self.data.random_flip:
            return False
        return bool(numpy_rng("flip", self.seed, draw.epoch, self.ids[draw.row]).integers(2))


class ResidentLatents:
    """Latents of every image (with ``data.random_flip`` also mirrored), in memory before the first step."""

    def __init__(self, encoded: Encoded, shown: Shown):
        self.encoded, self.shown = encoded, shown

    def take(self, draws: Sequence[Draw]) -> dict[str, Tensor]:
        """Return ``mean`` and ``std`` ``[B, C, h, w]`` of each draw's image, and ``mask`` if weighted."""
        half = len(self.shown.ids)
        rows = [draw.row + half * self.shown.flips(draw) for draw in draws]
        every = self.encoded._asdict().items()
        return {name: torch.stack([kept[row] for row in rows]) for name, kept in every if kept is not None}


class ResidentPixels:
    """Image files in memory, decoded at each use: for random crops, whose latents cannot be cached."""

    def __init__(self, index: Index, shown: Shown, *, cell: int):
        self.uris, self.shown, self._cell = index.column("uri"), shown, cell
        self.files = [read_image_file(uri) for uri in self.uris]
        weighted = shown.data.alpha_mask
        self.masks = [read_mask(uri) if weighted and uri else None for uri in index.column("mask")]

    def take(self, draws: Sequence[Draw]) -> dict[str, Tensor]:
        """Decode, crop and mirror each draw's image as its view requires."""
        cuts = [
            cut_for_training(
                self.files[draw.row],
                self.shown.of(draw),
                self.shown.data,
                uri=self.uris[draw.row],
                mask=self.masks[draw.row],
            )
            for draw in draws
        ]
        return to_tensors(cuts, cell=self._cell)


class StreamedPixels:
    """Images decoded by Ray tasks on the cluster's CPUs, for sets too large for one worker's memory.

    The stream receives all future draws in advance and delivers images in that order. Without a stream (in a
    dry run), images are decoded in this process.
    """

    def __init__(self, index: Index, shown: Shown, *, cell: int):
        self.index, self.shown, self._cell = index, shown, cell
        self._stream: ImageStream | None = None
        self._announced: deque[Draw] = deque()  # draws sent to the stream, images not taken yet

    def follow(self, draws: Iterable[Draw]) -> None:
        """Start to read ahead along these draws; :meth:`take` must then be called for exactly these."""
        from dreamfleet.datasets.serve.stream import ImageStream

        def announce() -> Iterator[ImageView]:
            for draw in draws:
                self._announced.append(draw)
                yield self.shown.of(draw)

        data = self.shown.data
        self._stream = ImageStream(
            self.index,
            announce(),
            resolution=data.resolution,
            resampling=data.image_interpolation_mode,
            max_pixels=data.max_pixels,
            weighted=data.alpha_mask,
        )

    def take(self, draws: Sequence[Draw]) -> dict[str, Tensor]:
        """Return the pixels of the next draws of the stream, and their index rows."""
        if self._stream is None:
            cuts = [read_cut(self.index, self.shown.of(draw), self.shown.data) for draw in draws]
            return to_tensors(cuts, cell=self._cell)
        found = []
        for draw in draws:
            found.append((next(self._stream), self._stream.row))
            assert self._announced.popleft() == draw, "the stream has another order"
        tensors = to_tensors([cut for cut, _ in found], cell=self._cell)
        return {**tensors, "rows": torch.tensor([row for _, row in found])}

    @property
    def bad(self) -> list[BadFile]:
        """Images that could not be decoded so far; others were used in their place."""
        found = self._stream.bad if self._stream is not None else {}
        return [BadFile(uri, reason.removeprefix(f"{uri}: ")) for uri, reason in sorted(found.items())]

    @property
    def waits(self) -> dict[str, float]:
        """Seconds that were waited for images so far, by cause."""
        return self._stream.waits if self._stream is not None else {}

    def close(self) -> None:
        """Stop reading ahead."""
        if self._stream is not None:
            self._stream.close()


def streams(index: Index, data: DataConfig) -> bool:
    """Return whether a set is streamed: if the recipe says so, or if it exceeds ``data.resident_limit_mb``.

    Its size is counted as decoded images of ``data.resolution`` squared, 3 bytes per pixel (mean and std of
    SD 1.x latents take a sixth of that).
    """
    if data.source != "auto":
        return data.source == "stream"
    return len(index) * data.resolution**2 * 3 > data.resident_limit_mb * 2**20


def load_images(
    index: Index,
    model: DiffusionModel,
    data: DataConfig,
    *,
    seed: int,
    distributed: DistributedContext | None = None,
) -> Images:
    """Return the source of an index's images: streamed if large, else resident latents, or image files.

    Image files are kept instead of latents if crops are random or ``data.cache_latents`` is off. The ranks
    share the work of encoding.
    """
    distributed = distributed or DistributedContext()
    shown = Shown(index, data, seed)
    if streams(index, data):
        return StreamedPixels(index, shown, cell=model.vae_factor)
    if not (data.center_crop and data.cache_latents):
        return distributed.on_every_rank(lambda: ResidentPixels(index, shown, cell=model.vae_factor))
    mirrored = (False, True) if data.random_flip else (False,)
    return ResidentLatents(
        encode_index(index, model, data, mirrored=mirrored, distributed=distributed), shown
    )
