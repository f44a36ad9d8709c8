"""Plans and computes the crops of `data prepare`: boxes, target sizes, padding. Pure functions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageColor, ImageFilter

from dreamfleet.datasets.buckets import MOST_ENLARGED, Size, bucket_sizes, nearest_size
from dreamfleet.datasets.errors import DataError
from dreamfleet.datasets.images.smart_crop import FOCUSES, place_box

MODES = ("crop", "smart", "focal", "fit", "pad", "buckets", "auto")
# The webui's auto-sized crop, relative to the side: at 512, sides from 384 to 768 and an area of at most 640 squared
# pixels. The aspect ratio may change by at most 0.1.
AUTO_SIDES, AUTO_AREA, AUTO_ERROR, STEP = (0.75, 1.5), 1.25, 0.1, 64
BLUR = 1 / 16  # blur radius of the background, as a fraction of the longer side


@dataclass(frozen=True)
class Cutting:
    """Options of cropping; `size` is in pixels.

    Mode `crop` covers the size and crops the rest (with `smart` and `focal` around the salient part), `fit` scales the
    whole image to fit inside the size, `pad` also adds bars of `fill` (a colour, `edge` or `blur`), `buckets` crops to
    the bucket that training would use, and `auto` to the size in multiples of 64 that loses least. With `split`, an
    image of which a crop would keep at most the fraction `split_threshold` is divided into several crops that overlap
    by the fraction `overlap`.
    """

    size: Size
    mode: str = "crop"
    focus: str = "center"
    fill: str = "white"
    split: bool = False
    split_threshold: float = 0.5
    overlap: float = 0.2
    smallest: int = 256  # smallest side of a bucket in pixels
    largest: int = 1024
    step: int = STEP

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise DataError(f"mode {self.mode!r} does not exist; use one of {', '.join(MODES)}")
        if self.focus not in FOCUSES:
            raise DataError(f"focus {self.focus!r} does not exist; use one of {', '.join(FOCUSES)}")
        if not 0 <= self.overlap <= 0.9 or not 0 < self.split_threshold <= 1:
            raise DataError("the overlap must be from 0 to 0.9, the split threshold above 0 and at most 1")
        if min(self.size) < 8 or max(self.size) > 8192:
            raise DataError(f"size {self.size[0]}x{self.size[1]}: sides must be from 8 to 8192 pixels")
        if self.fill not in ("edge", "blur"):
            try:
                ImageColor.getrgb(self.fill)
            except ValueError as error:
                raise DataError(f"fill {self.fill!r}: use edge, blur or a colour such as #808080") from error
        side = self.size[0]
        if self.mode in ("buckets", "auto") and side != self.size[1]:
            raise DataError(
                f"mode {self.mode} takes a single number as size: the side of a square of that area"
            )
        if self.mode == "buckets" and not self.smallest <= side <= self.largest:
            raise DataError(
                f"size {side} is not between the limits of bucket sides, {self.smallest} and {self.largest}"
            )


class Cut(NamedTuple):
    """A crop: box (left, top, right, bottom), the size it is scaled to, and the canvas it is centred on, in pixels."""

    box: tuple[float, float, float, float]
    size: Size
    canvas: Size


def plan_cuts(image: Image.Image, how: Cutting) -> list[Cut]:
    """Return the crops of an RGB image; [] if mode `auto` has no size for its aspect ratio."""
    width, height = image.size
    if how.mode in ("fit", "pad"):
        scale = min(how.size[0] / width, how.size[1] / height)
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        return [Cut((0, 0, width, height), size, size if how.mode == "fit" else how.size)]
    focus, target = how.focus, how.size
    if how.mode in ("smart", "focal"):
        focus = how.mode
    elif how.mode == "buckets":
        sizes = bucket_sizes(how.size[0], smallest=how.smallest, largest=how.largest, step=how.step)
        target = nearest_size(width, height, sizes)
    elif how.mode == "auto":
        fitting = auto_size(width, height, how.size[0])
        if fitting is None:
            return []
        target = fitting
    scale = max(target[0] / width, target[1] / height)
    box = (min(width, target[0] / scale), min(height, target[1] / scale))
    if (
        how.split and how.mode in ("crop", "smart", "focal") and scale <= MOST_ENLARGED
    ):  # an extreme aspect ratio would give thousands of crops
        kept = min(box[0] / width, box[1] / height)
        if kept < 1 and kept <= how.split_threshold:
            return _split(image.size, box, target, how.overlap)
    left, top = place_box(image, box, focus)
    return [Cut(_inside((left, top, left + box[0], top + box[1]), image.size), target, target)]


def auto_size(width: int, height: int, side: int) -> Size | None:
    """Return the largest size in multiples of 64 with about the image's aspect ratio; None if there is none."""
    smallest, largest = (math.ceil(side * part / STEP) * STEP for part in AUTO_SIDES)
    fitting = []
    for w in range(smallest, largest + 1, STEP):
        for h in range(smallest, largest + 1, STEP):
            error = abs(1 - (width / height) / (w / h))
            if w * h <= (AUTO_AREA * side) ** 2 and error <= AUTO_ERROR:
                fitting.append((w * h, -error, (w, h)))
    return max(fitting)[2] if fitting else None


def draw_cut(image: Image.Image, cut: Cut, fill: str, *, flip: bool = False) -> Image.Image:
    """Return a crop, scaled (Lanczos) and centred on its canvas; grey images stay grey, with black bars."""
    part = image.resize(cut.size, Image.Resampling.LANCZOS, box=cut.box)
    if cut.canvas != cut.size:
        left, top = (cut.canvas[0] - cut.size[0]) // 2, (cut.canvas[1] - cut.size[1]) // 2
        canvas = _background(part, cut.canvas, (left, top), fill)
        canvas.paste(part, (left, top))
        part = canvas
    return part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else part


def _split(whole: Size, box: tuple[float, float], target: Size, overlap: float) -> list[Cut]:
    along = 0 if box[0] < whole[0] else 1
    length, piece = whole[along], box[along]
    # The subtraction compensates rounding errors: three pieces that fit exactly would become four.
    count = math.ceil((length - piece * overlap) / (piece * (1 - overlap)) - 1e-9)
    cuts = []
    for number in range(count):
        start = (length - piece) * number / (count - 1)
        corner = (start, 0.0) if along == 0 else (0.0, start)
        edges = (corner[0], corner[1], corner[0] + box[0], corner[1] + box[1])
        cuts.append(Cut(_inside(edges, whole), target, target))
    return cuts


def _inside(box: tuple[float, float, float, float], whole: Size) -> tuple[float, float, float, float]:
    """Return a box rounded to thousandths of a pixel, the precision of the manifest, and clipped to the image."""
    left, top, right, bottom = (round(value, 3) for value in box)
    return max(0.0, left), max(0.0, top), min(float(whole[0]), right), min(float(whole[1]), bottom)


def _background(part: Image.Image, canvas: Size, place: tuple[int, int], fill: str) -> Image.Image:
    if part.mode == "L":
        return Image.new("L", canvas, 0)
    if fill == "blur":
        scale = max(canvas[0] / part.width, canvas[1] / part.height)
        box = (canvas[0] / scale, canvas[1] / scale)
        left, top = (part.width - box[0]) / 2, (part.height - box[1]) / 2
        edges = _inside((left, top, left + box[0], top + box[1]), part.size)
        cover = part.resize(canvas, Image.Resampling.BICUBIC, box=edges)
        return cover.filter(ImageFilter.GaussianBlur(max(canvas) * BLUR))
    if fill != "edge":
        return Image.new("RGB", canvas, ImageColor.getrgb(fill)[:3])
    made, pixels = Image.new("RGB", canvas), np.asarray(part)
    if place[0]:
        first, last = pixels[:, 0], pixels[:, -1]
        second_half = (place[0] + part.width // 2, 0, *canvas)
    else:
        first, last = pixels[0], pixels[-1]
        second_half = (0, place[1] + part.height // 2, *canvas)
    made.paste(_mean(first), (0, 0, *canvas))
    made.paste(_mean(last), second_half)
    return made


def _mean(line: np.ndarray) -> tuple[int, int, int]:
    red, green, blue = (round(float(value)) for value in line.mean(axis=0))
    return red, green, blue
