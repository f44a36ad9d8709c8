"""Resizes and crops images to the input size of a vision model. Uses only Pillow, so that it runs in any worker."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image

from dreamfleet.datasets.images.resampling import Placed, resize_and_crop

Fit = Callable[[Image.Image], Image.Image]  # prepares an image for a model


@dataclass(frozen=True)
class Fitting:
    """Resizes an image and crops its centre; an image that already has the size is not changed.

    `resize` is the short side (int) or an exact (height, width); `crop` is (height, width); both in pixels.
    """

    resize: int | tuple[int, int] | None
    crop: tuple[int, int] | None
    resample: int = int(Image.Resampling.BICUBIC)

    def __call__(self, image: Image.Image) -> Image.Image:
        """Return the image resized and cropped, in RGB; it is padded with black if it is smaller than the crop."""
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


def unchanged(image: Image.Image) -> Image.Image:
    """Return the image unchanged."""
    return image
