"""Reads images as training uses them (resized, cropped, mirrored), and encodes them to latents."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from dreamfleet.datasets.buckets import training_sizes
from dreamfleet.datasets.config import DataConfig
from dreamfleet.datasets.images.images import to_tensor_range
from dreamfleet.datasets.images.masks import ImageView, cut_for_training, cut_image, loss_weights
from dreamfleet.datasets.index.index import Index
from dreamfleet.datasets.index.sources import read_image_file, read_mask
from dreamfleet.trainers.distributed.context import DistributedContext
from dreamfleet.trainers.models.family import VAE_PIXELS, DiffusionModel

SHARED_AT_ONCE = 2**24  # float32 values of latents that one all-reduce sends through the GPU: 64 MB


class Encoded(NamedTuple):
    """Unscaled latents ``[C, h, w]`` of each image, and its loss weights ``[1, h, w]`` if it has a mask."""

    mean: list[Tensor]
    std: list[Tensor]
    mask: list[Tensor] | None


def encode_batch(pixels: int) -> int:
    """Return how many images of ``pixels`` pixels are encoded at once."""
    return min(8, max(1, VAE_PIXELS // pixels))


@torch.no_grad()
def encode_cuts(cuts: Sequence[np.ndarray], model: DiffusionModel) -> dict[str, Tensor]:
    """Encode N images of one size from :func:`read_cut`, at most :func:`encode_batch` of them.

    Returns ``mean`` and ``std`` ``[N, C, h, w]``, and ``mask`` if weighted. The batch is always filled up
    with copies of the last image: sums differ in their last bits with the batch size, and the latents of an
    image must not depend on the others in its batch.
    """
    found = to_tensors(cuts, cell=model.vae_factor)
    pixels = found.pop("pixels")
    spare = encode_batch(pixels[0, 0].numel()) - len(cuts)
    padded = torch.cat([pixels, pixels[-1:].expand(spare, -1, -1, -1)])
    posterior = model.encode_images(padded.to(next(model.vae.parameters()).device))
    found["mean"], found["std"] = (part[: len(cuts)].cpu() for part in posterior)
    return found


def encode_all(cuts: Sequence[np.ndarray], model: DiffusionModel) -> list[dict[str, np.ndarray]]:
    """Encode images of any sizes as :func:`encode_each` does; return for each image its arrays by name."""
    return [{name: values.numpy() for name, values in found.items()} for found in encode_each(cuts, model)]


def encode_each(cuts: Iterable[np.ndarray], model: DiffusionModel) -> Iterator[dict[str, Tensor]]:
    """Encode images of any sizes from :func:`read_cut`; neighbours of equal size are encoded together.

    Yields for each image its tensors by name: ``mean`` and ``std`` ``[C, h, w]``, and ``mask`` if it has weights. Takes
    the images of one batch at a time.
    """
    for shape, group in itertools.groupby(cuts, key=lambda cut: cut.shape):
        while batch := list(itertools.islice(group, encode_batch(shape[0] * shape[1]))):
            found = encode_cuts(batch, model)
            for row in range(len(batch)):
                yield {name: values[row] for name, values in found.items()}


@torch.no_grad()
def encode_index(
    index: Index,
    model: DiffusionModel,
    data: DataConfig,
    *,
    mirrored: Sequence[bool] = (False,),
    enlarged: float = 1.0,
    distributed: DistributedContext | None = None,
) -> Encoded:
    """Encode all N images at their training sizes: ``len(mirrored) * N`` latents in float32 on the CPU.

    ``enlarged``: factor by which the images are enlarged around their centre; what exceeds the training size is cut
    off. The ranks share the work, and each of them returns the whole result.
    """
    distributed = distributed or DistributedContext()
    device, cell = next(model.vae.parameters()).device, model.vae_factor
    sizes = training_sizes(index.sizes(), data)
    jobs = [ImageView(row, None, flip, size) for flip in mirrored for row, size in enumerate(sizes)]
    sizes = sizes * len(mirrored)
    channels = {"mean": model.latent_channels, "std": model.latent_channels}
    if data.alpha_mask:
        channels["mask"] = 1
    # One tensor for all images, so that few collective operations share it, and a view of it for each image.
    whole, views = {}, {}
    for name, num in channels.items():
        shapes = [(num, height // cell, width // cell) for width, height in sizes]
        whole[name] = torch.zeros(sum(math.prod(shape) for shape in shapes))
        parts = whole[name].split([math.prod(shape) for shape in shapes])
        views[name] = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

    def encode_mine() -> None:
        mine = sorted(distributed.share(len(jobs)), key=lambda number: sizes[number])
        cuts = (read_cut(index, jobs[number], data, enlarged=enlarged) for number in mine)
        for number, found in zip(mine, encode_each(cuts, model), strict=True):
            for name, kept in views.items():
                kept[number].copy_(found[name])

    distributed.on_every_rank(encode_mine)
    if distributed.world > 1:  # images of other ranks are zero here, so the sum is exact
        for part in (part for tensor in whole.values() for part in tensor.split(SHARED_AT_ONCE)):
            shared = part.to(device)
            dist.all_reduce(shared)
            part.copy_(shared)
    return Encoded(views["mean"], views["std"], views.get("mask"))


def read_cut(index: Index, draw: ImageView, data: DataConfig, *, enlarged: float = 1.0) -> np.ndarray:
    """Read one view of an indexed image: uint8 ``[H, W, 3]``, or ``[H, W, 4]`` with ``data.alpha_mask``.

    ``enlarged``: factor by which the view is enlarged around its centre before it is cut to its size.
    """
    row = index.row(draw.row)
    width, height = draw.size or (data.resolution, data.resolution)
    wide, high = round(width * enlarged), round(height * enlarged)
    cut = cut_for_training(
        read_image_file(row.uri),
        draw._replace(size=(wide, high)),
        data,
        uri=row.uri,
        mask=read_mask(row.mask) if data.alpha_mask and row.mask else None,
    )
    left, top = (wide - width) // 2, (high - height) // 2
    return np.ascontiguousarray(cut[top : top + height, left : left + width])


def to_tensors(cuts: Sequence[np.ndarray], *, cell: int) -> dict[str, Tensor]:
    """Stack results of :func:`read_cut`: ``pixels`` ``[B, 3, H, W]`` and, if weighted, ``mask`` ``[B, 1, h, w]``."""
    height, width = cuts[0].shape[:2]
    pixels = np.empty((len(cuts), 3, height, width), np.float32)
    for cut, out in zip(cuts, pixels, strict=True):
        to_tensor_range(cut[..., :3], out=out)
    tensors = {"pixels": torch.from_numpy(pixels)}
    if cuts[0].shape[-1] == 4:
        tensors["mask"] = torch.stack([torch.from_numpy(loss_weights(cut[..., 3], cell)) for cut in cuts])
    return tensors


def read_pixels(uri: str, data: DataConfig) -> np.ndarray:
    """Read the centre crop of one image, ``data.resolution`` squared: float32 ``[3, H, W]`` in [-1, 1]."""
    return to_tensor_range(
        cut_image(
            read_image_file(uri),
            ImageView(0),
            uri=uri,
            size=data.resolution,
            resampling=data.image_interpolation_mode,
            max_pixels=data.max_pixels,
        )
    )
