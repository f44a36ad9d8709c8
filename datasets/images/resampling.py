"""The filters that resize images, by name, and the geometry of resizing. A latent cache is keyed by the name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from PIL import Image

from dreamfleet.datasets.image_options import IMAGE_FILTERS

# An image is resized as a whole and then cropped, unless the resized image would have more than this many times the
# pixels of the target. Photographs and panoramas do not. (Resizing only a part gives other values in the last bits.)
MOST_RESIZED = 16

Box = tuple[float, float, float, float]  # left, top, right and bottom edges in pixels


@dataclass(frozen=True)
class Resampling:
    """A way to resize an image: Pillow's filter, and whether a JPEG may be decoded at a reduced size before it.

    With ``scaled_decode``, libjpeg decodes a JPEG at 1/2, 1/4 or 1/8 of its size if that is still at least the size
    needed. It leaves out the high frequencies of each 8 x 8 block instead of decoding and averaging them.
    """

    filter: Image.Resampling
    scaled_decode: bool = False


RESAMPLINGS: dict[str, Resampling] = {
    "scaled_lanczos": Resampling(Image.Resampling.LANCZOS, scaled_decode=True),
    "lanczos": Resampling(Image.Resampling.LANCZOS),
    "bicubic": Resampling(Image.Resampling.BICUBIC),
    "bilinear": Resampling(Image.Resampling.BILINEAR),
    "area": Resampling(Image.Resampling.BOX),
}
assert tuple(RESAMPLINGS) == IMAGE_FILTERS


class Placed(NamedTuple):
    """The size that an image is resized to, and the left and top edges of the crop; in pixels."""

    width: int
    height: int
    left: int
    top: int


def resize_and_crop(
    image: Image.Image,
    placed: Placed,
    target: tuple[int, int],
    resample: Image.Resampling,
    *,
    box: Box | None = None,
) -> Image.Image:
    """Resize an image and crop a target of (width, height) pixels from it, as `placed` specifies.

    `box` is the part of the image that is resized, by default all of it. If the resized image would be far larger than
    the target, only the crop is computed. Otherwise an image of 2000 x 1 pixels would take 4 GiB at a resolution of
    512.
    """
    covered = (placed.width, placed.height)
    whole = (0.0, 0.0, float(image.width), float(image.height))
    start_x, start_y, end_x, end_y = box = box or whole
    if covered == image.size and box == whole:
        pass
    elif placed.width * placed.height > MOST_RESIZED * target[0] * target[1]:
        across, down = (end_x - start_x) / placed.width, (end_y - start_y) / placed.height
        left, top = start_x + placed.left * across, start_y + placed.top * down
        right, bottom = left + target[0] * across, top + target[1] * down
        return image.resize(target, resample, box=(left, top, min(right, end_x), min(bottom, end_y)))
    else:
        image = image.resize(covered, resample, box=box)
    if covered == target:
        return image
    return image.crop((placed.left, placed.top, placed.left + target[0], placed.top + target[1]))


def place_target(
    size: tuple[int, int], target: tuple[int, int], *, crop_key: tuple[float, float] | None = None
) -> Placed:
    """Return how fit_image resizes an image and where it crops: in the centre, or at the relative position `crop_key`.

    Sizes are (width, height) in pixels, before flipping.
    """
    scale = max(target[0] / size[0], target[1] / size[1])
    width, height = max(target[0], round(size[0] * scale)), max(target[1], round(size[1] * scale))
    spare_x, spare_y = width - target[0], height - target[1]
    if crop_key is None:
        return Placed(width, height, spare_x // 2, spare_y // 2)
    return Placed(width, height, int(crop_key[0] * (spare_x + 1)), int(crop_key[1] * (spare_y + 1)))


def reduce_jpeg(image: Image.Image, least: tuple[int, int]) -> Box:
    """Let a JPEG that is open but not loaded be decoded at the smallest size that is at least ``least``.

    Returns the part of the decoded image that the whole image covers. Its edges are fractions if a side is not a
    multiple of the factor: libjpeg rounds the size up. Images of other formats, and smaller ones, are not changed.
    """
    whole = (0.0, 0.0, float(image.width), float(image.height))
    if image.format != "JPEG":
        return whole
    drafted = image.draft(None, least)  # type: ignore[arg-type]  # keeps the mode
    return whole if drafted is None else drafted[1]


def turn_box(box: Box, size: tuple[int, int], how: Image.Transpose) -> Box:
    """Return where a box of an image of ``size`` is after ``image.transpose(how)``."""
    left, top, right, bottom = box
    from_left, from_right = (left, right), (size[0] - right, size[0] - left)
    from_top, from_bottom = (top, bottom), (size[1] - bottom, size[1] - top)
    across, down = {
        Image.Transpose.FLIP_LEFT_RIGHT: (from_right, from_top),
        Image.Transpose.FLIP_TOP_BOTTOM: (from_left, from_bottom),
        Image.Transpose.ROTATE_180: (from_right, from_bottom),
        Image.Transpose.ROTATE_90: (from_top, from_right),  # counterclockwise
        Image.Transpose.ROTATE_270: (from_bottom, from_left),
        Image.Transpose.TRANSPOSE: (from_top, from_left),
        Image.Transpose.TRANSVERSE: (from_bottom, from_right),
    }[how]
    return across[0], down[0], across[1], down[1]
