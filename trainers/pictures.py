"""Where a feed takes pictures from: encoded once and resident, decoded and resident, or streamed in plan order."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from dreamfleet.datasets.config import DataConfig
from dreamfleet.datasets.images import fit_picture, open_picture, to_tensor_range
from dreamfleet.datasets.index import BadFile, Index
from dreamfleet.datasets.keyed import numpy_rng
from dreamfleet.datasets.plan import Draw
from dreamfleet.datasets.storage import read_uri
from dreamfleet.trainers.sd.model import StableDiffusion

if TYPE_CHECKING:
    from dreamfleet.datasets.stream import PictureDraw, PictureStream

ENCODE_PIXELS = 8 * 256**2  # more at once is no faster on a card, and at 512 px it would set a run's peak memory


class Pictures(Protocol):
    """What a feed asks of a source of pictures."""

    latent_shape: tuple[int, int, int]

    def take(self, draws: Sequence[Draw]) -> dict[str, Tensor]:
        """Return ``mean`` and ``std`` ``[B, C, h, w]`` of cached latents, or ``pixels`` ``[B, 3, H, W]`` in [-1, 1]."""
        ...


class ResidentLatents:
    """Latents of every picture (and of its mirror image, with flips), encoded once before the first step."""

    def __init__(self, mean: Tensor, std: Tensor, *, flips: Flips):
        self.mean, self.std, self._flips = mean, std, flips
        self.latent_shape = (mean.shape[1], mean.shape[2], mean.shape[3])

    def take(self, draws: Sequence[Draw]) -> dict[str, Tensor]:
        """Return the posterior of each draw's picture."""
        half = len(self._flips.ids)
        rows = torch.tensor([draw.row + half * self._flips.of(draw) for draw in draws])
        return {"mean": self.mean[rows], "std": self.std[rows]}


class ResidentPixels:
    """Encoded picture files kept in memory and decoded per use: for random crops, whose latents cannot be cached."""

    def __init__(
        self,
        files: list[bytes],
        index: Index,
        data: DataConfig,
        seed: int,
        latent_shape: tuple[int, int, int],
    ):
        self.files, self.uris, self.data, self.seed = files, index.column("uri"), data, seed
        self._flips = Flips(index, seed, data.random_flip)
        self.latent_shape = latent_shape

    def take(self, draws: Sequence[Draw]) -> dict[str, Tensor]:
        """Decode, crop and flip each draw's picture as its key says."""
        pixels = []
        for draw in draws:
            picture = open_picture(
                self.files[draw.row], uri=self.uris[draw.row], max_pixels=self.data.max_pixels
            )
            crop = crop_of(self.seed, draw, self._flips.ids[draw.row])
            fitted = fit_picture(
                picture, self.data.resolution, center=False, crop_key=crop, flip=bool(self._flips.of(draw))
            )
            pixels.append(torch.from_numpy(to_tensor_range(fitted)))
        return {"pixels": torch.stack(pixels)}


class StreamedPixels:
    """Pictures decoded by Ray Data on the cluster's CPUs, for sets too large for one worker's memory.

    The stream is told all coming draws at once and delivers in that order, so it reads ahead; asked out of turn (a dry
    run), a picture is decoded here.
    """

    def __init__(self, index: Index, data: DataConfig, seed: int, latent_shape: tuple[int, int, int]):
        self.index, self.data, self.seed, self.latent_shape = index, data, seed, latent_shape
        self._flips = Flips(index, seed, data.random_flip)
        self._stream: PictureStream | None = None
        self._order: Iterator[Draw] = iter(())

    def follow(self, draws: Iterable[Draw]) -> None:
        """Start reading ahead along these draws; :meth:`take` must then ask for exactly them."""
        from dreamfleet.datasets.stream import stream_pictures

        ahead, self._order = itertools.tee(draws)
        self._stream = stream_pictures(
            self.index,
            map(self._transform, ahead),
            resolution=self.data.resolution,
            max_pixels=self.data.max_pixels,
        )

    def take(self, draws: Sequence[Draw]) -> dict[str, Tensor]:
        """Return the pixels of the next draws of the stream."""
        if self._stream is None:
            uris = self.index.column("uri")
            arrays = [
                read_pixels(
                    uris[draw.row],
                    self.data,
                    crop=self._transform(draw).crop,
                    flip=bool(self._flips.of(draw)),
                )
                for draw in draws
            ]
        else:
            expected = list(itertools.islice(self._order, len(draws)))
            assert expected == list(draws), "the stream was told another order"
            arrays = [to_tensor_range(next(self._stream)) for _ in draws]
        return {"pixels": torch.stack([torch.from_numpy(array) for array in arrays])}

    @property
    def bad(self) -> list[BadFile]:
        """Pictures that could not be decoded so far; others were used in their place."""
        found = self._stream.bad if self._stream is not None else {}
        return [BadFile(uri, reason.removeprefix(f"{uri}: ")) for uri, reason in sorted(found.items())]

    def close(self) -> None:
        """Stop reading ahead."""
        if self._stream is not None:
            self._stream.close()

    def _transform(self, draw: Draw) -> PictureDraw:
        from dreamfleet.datasets.stream import PictureDraw

        crop = None if self.data.center_crop else crop_of(self.seed, draw, self._flips.ids[draw.row])
        return PictureDraw(draw.row, crop, bool(self._flips.of(draw)))


class Flips:
    """Says which draws are mirrored, keyed by (seed, epoch, picture id)."""

    def __init__(self, index: Index, seed: int, on: bool):
        self.ids, self._seed, self._on = index.column("id"), seed, on

    def of(self, draw: Draw) -> int:
        """Return 1 for a mirrored draw, else 0."""
        if not self._on:
            return 0
        return int(numpy_rng("flip", self._seed, draw.epoch, self.ids[draw.row]).integers(2))


def crop_of(seed: int, draw: Draw, sample_id: str) -> tuple[float, float]:
    """Return where a random crop of this draw lies, each in [0, 1): 0 = left or top."""
    x, y = numpy_rng("crop", seed, draw.epoch, sample_id).random(2)
    return float(x), float(y)


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
    side = data.resolution // model.vae_factor
    latent_shape = (model.vae.config.latent_channels, side, side)
    if streams(index, data):
        return StreamedPixels(index, data, seed, latent_shape)
    if not (data.center_crop and data.cache_latents):
        files = [read_uri(uri) for uri in index.column("uri")]
        return ResidentPixels(files, index, data, seed, latent_shape)
    flips = Flips(index, seed, data.random_flip)
    mean, std = encode_index(
        index, model, data, mirrored=(False, True) if data.random_flip else (False,), rank=rank, world=world
    )
    return ResidentLatents(mean, std, flips=flips)


def encode_batch(resolution: int) -> int:
    """Return how many pictures of this many pixels a side are encoded at once."""
    return min(8, max(1, ENCODE_PIXELS // resolution**2))


@torch.no_grad()
def encode_index(
    index: Index,
    model: StableDiffusion,
    data: DataConfig,
    *,
    mirrored: Sequence[bool] = (False,),
    rank: int = 0,
    world: int = 1,
) -> tuple[Tensor, Tensor]:
    """Encode every picture -> mean and std ``[len(mirrored) * N, C, h, w]`` of its latents, float32 on the CPU."""
    device = next(model.vae.parameters()).device
    uris = index.column("uri")
    jobs = [
        (row + len(uris) * half, uri, flip)
        for half, flip in enumerate(mirrored)
        for row, uri in enumerate(uris)
    ]
    side = data.resolution // model.vae_factor
    shape = (len(jobs), model.vae.config.latent_channels, side, side)
    mean, std = torch.zeros(shape), torch.zeros(shape)
    mine = jobs[rank::world]
    batch = encode_batch(data.resolution)
    for start in range(0, len(mine), batch):
        chunk = mine[start : start + batch]
        pixels = torch.stack([torch.from_numpy(read_pixels(uri, data, flip=flip)) for _, uri, flip in chunk])
        rows = torch.tensor([row for row, _, _ in chunk])
        chunk_mean, chunk_std = model.encode_pictures(pixels.to(device))
        mean[rows], std[rows] = chunk_mean.cpu(), chunk_std.cpu()
    if world > 1:  # rows of other ranks are zero here, so the sum is exact
        for tensor in (mean, std):
            shared = tensor.to(device)
            dist.all_reduce(shared)
            tensor.copy_(shared)
    return mean, std


def read_pixels(
    uri: str, data: DataConfig, *, crop: tuple[float, float] | None = None, flip: bool = False
) -> np.ndarray:
    """Read one picture, cut to ``data.resolution`` at ``crop`` (None: the middle): float32 ``[3, H, W]`` in [-1, 1]."""
    picture = open_picture(read_uri(uri), uri=uri, max_pixels=data.max_pixels)
    return to_tensor_range(
        fit_picture(picture, data.resolution, center=crop is None, crop_key=crop, flip=flip)
    )
