"""Where a feed takes pictures from: encoded once and resident, decoded and resident, or streamed in plan order."""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from dreamfleet.datasets.buckets import picture_sizes
from dreamfleet.datasets.config import DataConfig
from dreamfleet.datasets.images import fit_picture, open_picture, place_target, to_tensor_range
from dreamfleet.datasets.index import BadFile, Index
from dreamfleet.datasets.keyed import numpy_rng
from dreamfleet.datasets.masks import PictureDraw, cut_picture, loss_weights, read_mask
from dreamfleet.datasets.plan import Draw
from dreamfleet.datasets.storage import read_uri
from dreamfleet.trainers.sd.model import StableDiffusion

if TYPE_CHECKING:
    from dreamfleet.datasets.stream import PictureStream

# More at once is no faster on a card, and at 512 px it would set a run's peak memory.
ENCODE_PIXELS = 8 * 256**2
SHARED_AT_ONCE = 2**24  # numbers of latents that go over the card between workers: 64 MB


class Pictures(Protocol):
    """What a feed asks of a source of pictures."""

    shown: Shown

    def take(self, draws: Sequence[Draw]) -> dict[str, Tensor]:
        """Return ``mean`` and ``std`` ``[B, C, h, w]`` of cached latents, or ``pixels`` ``[B, 3, H, W]`` in [-1, 1].

        With ``data.alpha_mask`` also ``mask`` ``[B, 1, h, w]``, the weights. The pictures must be of one size. ``rows``
        ``[B]`` tells whose they are, where some may stand in for pictures that cannot be decoded.
        """
        ...


class Shown:
    """Says how each draw's picture is shown: its bucket's size, where it is cropped, whether it is mirrored.

    Keyed by (seed, epoch, picture id).
    """

    def __init__(self, index: Index, data: DataConfig, seed: int):
        self.ids, self.data, self.seed = index.column("id"), data, seed
        self.sizes = picture_sizes(index, data)
        self.files = list(zip(index.column("width"), index.column("height"), strict=True))

    def time_ids(self, draws: Sequence[Draw], rows: Sequence[int] | None = None) -> Tensor:
        """Return what SDXL is told of each draw's size ``[B, 6]``; see :class:`Condition`.

        ``rows``: whose pictures are shown, cut as the draws say; None: their own.
        Top and left of a mirrored picture are those of the crop in the mirror image, as kohya counts them.
        """
        rows = rows or [draw.row for draw in draws]
        told = [self._size_ids(self.of(draw), row) for draw, row in zip(draws, rows, strict=True)]
        return torch.tensor(told, dtype=torch.float32)

    def _size_ids(self, draw: PictureDraw, row: int) -> tuple[int, ...]:
        (file_width, file_height), (width, height) = self.files[row], self.sizes[draw.row]
        placed = place_target((file_width, file_height), (width, height), crop_key=draw.crop)
        left = placed.width - width - placed.left if draw.flip else placed.left
        return file_height, file_width, placed.top, left, height, width

    def of(self, draw: Draw) -> PictureDraw:
        """Return how the picture of one draw is cut."""
        where = ("crop", self.seed, draw.epoch, self.ids[draw.row])
        crop = None if self.data.center_crop else tuple(numpy_rng(*where).random(2).tolist())
        return PictureDraw(draw.row, crop, self.flips(draw), self.sizes[draw.row])

    def flips(self, draw: Draw) -> bool:
        """Say whether one draw's picture is mirrored."""
        if not self.data.random_flip:
            return False
        return bool(numpy_rng("flip", self.seed, draw.epoch, self.ids[draw.row]).integers(2))


class Encoded(NamedTuple):
    """Unscaled latents of pictures, ``[C, h, w]`` each; with ``data.alpha_mask`` their weights, ``[1, h, w]`` each."""

    mean: list[Tensor]
    std: list[Tensor]
    mask: list[Tensor] | None


class ResidentLatents:
    """Latents of every picture (and of its mirror image, with flips), encoded once before the first step."""

    def __init__(self, encoded: Encoded, shown: Shown):
        self.encoded, self.shown = encoded, shown

    def take(self, draws: Sequence[Draw]) -> dict[str, Tensor]:
        """Return the posterior of each draw's picture."""
        half = len(self.shown.ids)
        rows = [draw.row + half * self.shown.flips(draw) for draw in draws]
        every = self.encoded._asdict().items()
        return {name: torch.stack([kept[row] for row in rows]) for name, kept in every if kept is not None}


class ResidentPixels:
    """Encoded picture files kept in memory and decoded per use: for random crops, whose latents cannot be cached."""

    def __init__(self, index: Index, shown: Shown, *, cell: int):
        self.uris, self.shown, self._cell = index.column("uri"), shown, cell
        self.files = [read_uri(uri) for uri in self.uris]
        weighted = shown.data.alpha_mask
        self.masks = [read_mask(uri) if weighted and uri else None for uri in index.column("mask")]

    def take(self, draws: Sequence[Draw]) -> dict[str, Tensor]:
        """Decode, crop and flip each draw's picture as its key says."""
        data = self.shown.data
        cuts = [
            cut_picture(
                self.files[draw.row],
                self.shown.of(draw),
                uri=self.uris[draw.row],
                size=data.resolution,
                max_pixels=data.max_pixels,
                weighted=data.alpha_mask,
                mask=self.masks[draw.row],
            )
            for draw in draws
        ]
        return to_tensors(cuts, cell=self._cell)


class StreamedPixels:
    """Pictures decoded by Ray Data on the cluster's CPUs, for sets too large for one worker's memory.

    The stream is told all coming draws at once and delivers in that order, so it reads ahead; asked out of turn (a dry
    run), a picture is decoded here.
    """

    def __init__(self, index: Index, shown: Shown, *, cell: int):
        self.index, self.shown, self._cell = index, shown, cell
        self._stream: PictureStream | None = None
        self._told: deque[Draw] = deque()  # to the stream, and not taken yet

    def follow(self, draws: Iterable[Draw]) -> None:
        """Start reading ahead along these draws; :meth:`take` must then ask for exactly them."""
        from dreamfleet.datasets.stream import PictureStream

        def told() -> Iterator[PictureDraw]:  # runs in the stream's thread
            for draw in draws:
                self._told.append(draw)
                yield self.shown.of(draw)

        data = self.shown.data
        self._stream = PictureStream(
            self.index,
            told(),
            resolution=data.resolution,
            max_pixels=data.max_pixels,
            weighted=data.alpha_mask,
        )

    def take(self, draws: Sequence[Draw]) -> dict[str, Tensor]:
        """Return the pixels of the next draws of the stream, and whose they are."""
        if self._stream is None:
            cuts = [read_cut(self.index, self.shown.of(draw), self.shown.data) for draw in draws]
            return to_tensors(cuts, cell=self._cell)
        found = []
        for draw in draws:
            found.append((next(self._stream), self._stream.row))
            assert self._told.popleft() == draw, "the stream was told another order"
        tensors = to_tensors([cut for cut, _ in found], cell=self._cell)
        return {**tensors, "rows": torch.tensor([row for _, row in found])}

    @property
    def bad(self) -> list[BadFile]:
        """Pictures that could not be decoded so far; others were used in their place."""
        found = self._stream.bad if self._stream is not None else {}
        return [BadFile(uri, reason.removeprefix(f"{uri}: ")) for uri, reason in sorted(found.items())]

    def close(self) -> None:
        """Stop reading ahead."""
        if self._stream is not None:
            self._stream.close()


def streams(index: Index, data: DataConfig) -> bool:
    """Say whether a set is streamed: when asked for, or when it would not fit ``data.resident_limit_mb``.

    Counted as decoded pictures at ``data.resolution`` (latents of SD 1.x, mean and std, take a twelfth of that).
    """
    if data.source != "auto":
        return data.source == "stream"
    return len(index) * data.resolution**2 * 3 > data.resident_limit_mb * 2**20


def load_pictures(
    index: Index, model: StableDiffusion, data: DataConfig, *, seed: int, rank: int = 0, world: int = 1
) -> Pictures:
    """Make the source of an index's pictures: streamed when large, else read into memory and encoded to latents.

    Latents are not cached where crops are random or ``data.cache_latents`` is off.

    The encoding is shared by the workers: each does every ``world``-th picture.
    """
    shown = Shown(index, data, seed)
    if streams(index, data):
        return StreamedPixels(index, shown, cell=model.vae_factor)
    if not (data.center_crop and data.cache_latents):
        return ResidentPixels(index, shown, cell=model.vae_factor)
    mirrored = (False, True) if data.random_flip else (False,)
    return ResidentLatents(encode_index(index, model, data, mirrored=mirrored, rank=rank, world=world), shown)


def encode_batch(pixels: int) -> int:
    """Return how many pictures of so many pixels are encoded at once."""
    return min(8, max(1, ENCODE_PIXELS // pixels))


@torch.no_grad()
def encode_cuts(cuts: Sequence[np.ndarray], model: StableDiffusion) -> dict[str, Tensor]:
    """Encode pictures of one size, as cut_picture gives them and as many as :func:`encode_batch` at most, by name.

    The VAE sees as many in any case, the last one again: sums differ in their last bits with the number, and a
    picture's latents must not depend on what is encoded beside it.
    """
    found = to_tensors(cuts, cell=model.vae_factor)
    pixels = found.pop("pixels")
    spare = encode_batch(pixels[0, 0].numel()) - len(cuts)
    padded = torch.cat([pixels, pixels[-1:].expand(spare, -1, -1, -1)])
    posterior = model.encode_pictures(padded.to(next(model.vae.parameters()).device))
    found["mean"], found["std"] = (part[: len(cuts)].cpu() for part in posterior)
    return found


@torch.no_grad()
def encode_index(
    index: Index,
    model: StableDiffusion,
    data: DataConfig,
    *,
    mirrored: Sequence[bool] = (False,),
    rank: int = 0,
    world: int = 1,
) -> Encoded:
    """Encode every picture at its size, ``len(mirrored) * N`` in all, as float32 on the CPU."""
    device, cell = next(model.vae.parameters()).device, model.vae_factor
    sizes = picture_sizes(index, data)
    jobs = [PictureDraw(row, None, flip, size) for flip in mirrored for row, size in enumerate(sizes)]
    sizes = sizes * len(mirrored)
    channels = {"mean": model.vae.config.latent_channels, "std": model.vae.config.latent_channels}
    if data.alpha_mask:
        channels["mask"] = 1
    # One tensor for all, so that workers share it in one go, and a view of it for each picture.
    whole, views = {}, {}
    for name, num in channels.items():
        shapes = [(num, height // cell, width // cell) for width, height in sizes]
        whole[name] = torch.zeros(sum(math.prod(shape) for shape in shapes))
        parts = whole[name].split([math.prod(shape) for shape in shapes])
        views[name] = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
    mine = sorted(range(len(jobs))[rank::world], key=lambda number: sizes[number])
    for (width, height), group in itertools.groupby(mine, key=lambda number: sizes[number]):
        numbers, batch = list(group), encode_batch(width * height)
        for start in range(0, len(numbers), batch):
            chunk = numbers[start : start + batch]
            found = encode_cuts([read_cut(index, jobs[number], data) for number in chunk], model)
            for name, kept in views.items():
                for number, value in zip(chunk, found[name], strict=True):
                    kept[number].copy_(value)
    if world > 1:  # pictures of other ranks are zero here, so the sum is exact
        for part in (part for tensor in whole.values() for part in tensor.split(SHARED_AT_ONCE)):
            shared = part.to(device)
            dist.all_reduce(shared)
            part.copy_(shared)
    return Encoded(views["mean"], views["std"], views.get("mask"))


def read_cut(index: Index, draw: PictureDraw, data: DataConfig) -> np.ndarray:
    """Read one use of a picture of an index: uint8 ``[H, W, 3]``, or ``[H, W, 4]`` with ``data.alpha_mask``."""
    row = index.row(draw.row)
    return cut_picture(
        read_uri(row.uri),
        draw,
        uri=row.uri,
        size=data.resolution,
        max_pixels=data.max_pixels,
        weighted=data.alpha_mask,
        mask=read_mask(row.mask) if data.alpha_mask and row.mask else None,
    )


def to_tensors(cuts: Sequence[np.ndarray], *, cell: int) -> dict[str, Tensor]:
    """Turn what cut_picture gives into ``pixels`` ``[B, 3, H, W]`` and, weighted, ``mask`` ``[B, 1, h, w]``."""
    tensors = {"pixels": torch.stack([torch.from_numpy(to_tensor_range(cut[..., :3])) for cut in cuts])}
    if cuts[0].shape[-1] == 4:
        tensors["mask"] = torch.stack([torch.from_numpy(loss_weights(cut[..., 3], cell)) for cut in cuts])
    return tensors


def read_pixels(uri: str, data: DataConfig) -> np.ndarray:
    """Read the middle of one picture, ``data.resolution`` squared: float32 ``[3, H, W]`` in [-1, 1]."""
    picture = open_picture(read_uri(uri), uri=uri, max_pixels=data.max_pixels)
    return to_tensor_range(fit_picture(picture, data.resolution))
