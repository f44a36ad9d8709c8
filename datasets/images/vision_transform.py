"""Fitting a picture to what a vision model looks at, with Pillow alone, wherever on the cluster that happens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image

from dreamfleet.datasets.images.images import Placed, resize_and_crop

Fit = Callable[[Image.Image], Image.Image]  # what a method does with an image before its model sees it


@dataclass(frozen=True)
class Fitting:
    """Scale a picture, then cut out its middle; a fitted picture stays as it is.

    `resize` is the short side (int) or an exact (height, width), both in pixels; `crop` the central (height, width).
    """

    resize: int | tuple[int, int] | None
    crop: tuple[int, int] | None
    resample: int = int(Image.Resampling.BICUBIC)

    def __call__(self, image: Image.Image) -> Image.Image:
        """Return the picture fitted, in RGB; black where it is smaller than the crop."""
        image, resample = image.convert("RGB"), Image.Resampling(self.resample)
        if isinstance(self.resize, int):
            short = min(image.size)
            width, height = (int(self.resize * side / short) for side in image.size)
            if self.crop and width >= self.crop[1] and height >= self.crop[0]:
                middle = Placed(width, height, (width - self.crop[1]) // 2, (height - self.crop[0]) // 2)
                return resize_and_crop(image, middle, (self.crop[1], self.crop[0]), resample)
            image = image.resize((width, height), resample)
        elif self.resize:
            image = image.resize((self.resize[1], self.resize[0]), resample)
        if self.crop and (image.height, image.width) != self.crop:
            height, width = self.crop
            top, left = (image.height - height) // 2, (image.width - width) // 2
            image = image.crop((left, top, left + width, top + height))
        return image


def as_it_is(image: Image.Image) -> Image.Image:
    """Return the picture."""
    return image
