"""Fitting a picture to what a vision model looks at, with Pillow alone, wherever on the cluster that happens."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image

from dreamfleet.datasets.images import Placed, resize_and_crop


@dataclass(frozen=True)
class Fitting:
    """Scale a picture, then cut out its middle; a fitted picture stays as it is.

    `resize` is the short side (int) or an exact (height, width), both in pixels; `crop` the central (height, width).
    """

    resize: int | tuple[int, int] | None
    crop: tuple[int, int] | None
    resample: int = int(Image.Resampling.BICUBIC)

    def __call__(self, picture: Image.Image) -> Image.Image:
        """Return the picture fitted, in RGB; black where it is smaller than the crop."""
        picture, resample = picture.convert("RGB"), Image.Resampling(self.resample)
        if isinstance(self.resize, int):
            short = min(picture.size)
            width, height = (int(self.resize * side / short) for side in picture.size)
            if self.crop and width >= self.crop[1] and height >= self.crop[0]:
                middle = Placed(width, height, (width - self.crop[1]) // 2, (height - self.crop[0]) // 2)
                return resize_and_crop(picture, middle, (self.crop[1], self.crop[0]), resample)
            picture = picture.resize((width, height), resample)
        elif self.resize:
            picture = picture.resize((self.resize[1], self.resize[0]), resample)
        if self.crop and (picture.height, picture.width) != self.crop:
            height, width = self.crop
            top, left = (picture.height - height) // 2, (picture.width - width) // 2
            picture = picture.crop((left, top, left + width, top + height))
        return picture


def as_it_is(picture: Image.Image) -> Image.Image:
    """Return the picture."""
    return picture
