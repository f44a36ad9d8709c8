"""Aspect-ratio buckets: choose the size at which each image is trained, without square crops. Pure functions.

The algorithm is NovelAI's (2022; naifu's `arb`) with kohya's keys and arithmetic, so that every image is in the same
bucket as with sd-scripts (`library/model_util.py::make_bucket_resolutions` and
`library/train_util.py::BucketManager.select_bucket`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dreamfleet.datasets.config import DataConfig

Size = tuple[int, int]  # width and height in pixels
MOST_ENLARGED = 4  # images enlarged by more than this factor are reported, or left out with bucket_no_upscale


@lru_cache
def bucket_sizes(resolution: int, *, smallest: int, largest: int, step: int) -> tuple[Size, ...]:
    """Return the sorted bucket sizes: the square, and for every side the longest other side within the area.

    Sides are multiples of ``step`` from ``smallest`` to ``largest`` pixels; the area is at most ``resolution`` squared.
    """
    area = resolution * resolution
    square = resolution // step * step
    sizes = {(square, square)}
    for side in range(smallest, largest + 1, step):
        other = min(largest, area // side // step * step)
        if other >= smallest:
            sizes |= {(side, other), (other, side)}
    return tuple(sorted(sizes))


def nearest_size(width: int, height: int, sizes: Sequence[Size]) -> Size:
    """Return the bucket size for an image: its own size if that is a bucket, otherwise the nearest aspect ratio's."""
    if (width, height) in sizes:
        return width, height
    aspect = width / height
    return min(sizes, key=lambda size: abs(size[0] / size[1] - aspect))


def size_without_upscaling(width: int, height: int, *, resolution: int, step: int) -> Size:
    """Return the largest size in multiples of ``step`` within an image and within about ``resolution`` squared pixels.

    Images are not enlarged, unless a side is below one step before or after shrinking; that side is enlarged to one
    step and the other cropped. Images that would be enlarged more than MOST_ENLARGED times must have been left out.
    """
    aspect, area = width / height, resolution * resolution
    shrink = min(1.0, resolution / math.sqrt(width * height))
    if int(min(width, height) * shrink + 0.5) < step:
        other = max(step, int(min(max(width, height) * shrink, area / step)) // step * step)
        return (other, step) if width > height else (step, other)
    if width * height > area:
        # Shrink to the area so that one side is a multiple of the step; choose the side that changes the aspect less.
        by_width = _round_to(math.sqrt(area * aspect), step)
        by_height = _round_to(area / math.sqrt(area * aspect), step)
        error_by_width = abs(by_width / _round_to(by_width / aspect, step) - aspect)
        error_by_height = abs(_round_to(by_height * aspect, step) / by_height - aspect)
        if error_by_width < error_by_height:
            width, height = by_width, int(by_width / aspect + 0.5)
        else:
            width, height = int(by_height * aspect + 0.5), by_height
    return max(step, width - width % step), max(step, height - height % step)


def training_sizes(originals: Sequence[Size], data: DataConfig) -> list[Size]:
    """Return the size in pixels at which each image is trained: its bucket's, or ``resolution`` x ``resolution``."""
    if not data.enable_bucket:
        return [(data.resolution, data.resolution)] * len(originals)
    step = data.bucket_reso_steps
    if data.bucket_no_upscale:
        found = {
            pair: size_without_upscaling(*pair, resolution=data.resolution, step=step)
            for pair in set(originals)
        }
    else:
        sizes = bucket_sizes(
            data.resolution, smallest=data.min_bucket_reso, largest=data.max_bucket_reso, step=step
        )
        found = {pair: nearest_size(*pair, sizes) for pair in set(originals)}
    return [found[pair] for pair in originals]


def most_enlarged(originals: Sequence[Size], sizes: Sequence[Size]) -> tuple[int, float, int]:
    """Return the number of images enlarged more than MOST_ENLARGED times, the largest factor, and that image's row."""
    scales = [max(to[0] / size[0], to[1] / size[1]) for size, to in zip(originals, sizes, strict=True)]
    worst = max(range(len(scales)), key=scales.__getitem__)
    return sum(scale > MOST_ENLARGED for scale in scales), scales[worst], worst


def number_buckets(sizes: Sequence[Size]) -> list[int]:
    """Return the bucket number of each image. Buckets are the sizes in use, numbered by width and then height."""
    numbers = {size: number for number, size in enumerate(sorted(set(sizes)))}
    return [numbers[size] for size in sizes]


def describe_buckets(sizes: Sequence[Size]) -> str:
    """Return the number of images in each bucket as text: `448x576: 12, 512x512: 30`."""
    return ", ".join(
        f"{width}x{height}: {count}" for (width, height), count in sorted(Counter(sizes).items())
    )


def _round_to(value: float, step: int) -> int:
    # As in kohya's scripts: round to whole pixels, then down to a multiple of the step, but never to 0.
    whole = int(value + 0.5)
    return max(step, whole - whole % step)
