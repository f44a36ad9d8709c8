"""Decodes, rotates, resizes, crops and flips images. Pure functions, with Pillow and numpy only."""

from __future__ import annotations

import io
from typing import NamedTuple

import numpy as np
from PIL import AvifImagePlugin as _avif  # noqa: F401  (Pillow knows a format once its reader is imported)
from PIL import Image
from PIL import Jpeg2KImagePlugin as _jpeg2000  # noqa: F401
from PIL import TiffImagePlugin as _tiff  # noqa: F401
from PIL import WebPImagePlugin as _webp  # noqa: F401

from dreamfleet.datasets.errors import DataError
from dreamfleet.datasets.image_options import MAX_PIXELS
from dreamfleet.datasets.images.color_profile import to_srgb
from dreamfleet.datasets.images.resampling import Box, place_target, reduce_jpeg, resize_and_crop, turn_box

# EPS, PDF and FITS are left out, since their readers start other programs or read other data.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "JPEG2000", "PPM")
_ROTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION_TAG = 0x0112


class Header(NamedTuple):
    """Properties in the header of an image file; sizes are in pixels after the EXIF rotation."""

    width: int
    height: int
    format: str
    orientation: int = 1  # EXIF; 1 for formats whose reader applies it


class Decoded(NamedTuple):
    """A decoded image, upright and in sRGB, and its alpha channel (8-bit grey, 255 is opaque; None without one).

    ``size`` is the size of the file in pixels after the EXIF rotation. ``box`` is the part of ``image`` that the file
    covers: all of it, unless a JPEG was decoded at a reduced size.
    """

    image: Image.Image
    alpha: Image.Image | None
    size: tuple[int, int]
    box: Box


def open_image(data: bytes, *, uri: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode an image to sRGB, rotated by its EXIF orientation, with transparency composited over white.

    Colours are converted by the embedded profile. The first frame of an animation is used. 16-bit grey is scaled to 8
    bits. Raises DataError, naming `uri`, for a file that is not an image, is truncated, or has more than `max_pixels`
    pixels (checked before decoding).
    """
    return open_with_alpha(data, uri=uri, max_pixels=max_pixels)[0]


def open_with_alpha(
    data: bytes, *, uri: str, max_pixels: int = MAX_PIXELS
) -> tuple[Image.Image, Image.Image | None]:
    """Decode an image as open_image does, and its alpha channel (8-bit grey, 255 is opaque; None without one)."""
    return decode_image(data, uri=uri, max_pixels=max_pixels)[:2]


def decode_image(
    data: bytes, *, uri: str, max_pixels: int = MAX_PIXELS, covering: tuple[int, int] | None = None
) -> Decoded:
    """Decode an image as open_image does.

    With ``covering``, a (width, height) in pixels to which fit_image will cut it, a JPEG may be decoded at a reduced
    size, in a fraction of the time (see reduce_jpeg).
    """
    with _named_errors(uri, data), _open(data, uri=uri, max_pixels=max_pixels) as image:
        box: Box = (0.0, 0.0, float(image.width), float(image.height))
        full = image.size
        if covering is not None and image.format == "JPEG":  # the EXIF data of a JPEG precede its pixels
            is_turned = _orientation(image) >= 5
            placed = place_target(full[::-1] if is_turned else full, covering)
            least = (placed.height, placed.width) if is_turned else (placed.width, placed.height)
            box = reduce_jpeg(image, least)
        image.load()
        orientation = _orientation(image)
        rgb, alpha = _to_rgb_and_alpha(image, uri)
        if orientation in _ROTATIONS:
            how = _ROTATIONS[orientation]
            full = full[::-1] if orientation >= 5 else full
            box = turn_box(box, rgb.size, how)
            rgb = rgb.transpose(how)
            alpha = alpha.transpose(how) if alpha is not None else None
        return Decoded(rgb, alpha, full, box)


def read_header(data: bytes, *, uri: str, max_pixels: int = MAX_PIXELS) -> Header:
    """Read an image's header without decoding its pixels. Raises DataError as open_image does."""
    with _named_errors(uri, data), _open(data, uri=uri, max_pixels=max_pixels) as image:
        width, height = image.size
        # Pillow reports the size of a TIFF after rotation. It decodes a whole PNG to find EXIF data after the pixels.
        if image.format == "TIFF" or (
            image.format == "PNG" and b"eXIf" not in data and b"tiff:Orient" not in data
        ):
            orientation = 1
        else:
            orientation = _orientation(image)
        if orientation >= 5:
            width, height = height, width
        return Header(width, height, str(image.format), orientation)


def check_image(data: bytes, *, uri: str, max_pixels: int = MAX_PIXELS) -> None:
    """Decode all pixels of an image. Raises DataError if it is truncated or broken."""
    with _named_errors(uri, data), _open(data, uri=uri, max_pixels=max_pixels) as image:
        if (
            image.format == "JPEG"
        ):  # decode at reduced size, which takes an eighth of the time and reads all bytes
            image.draft("RGB" if image.mode != "L" else "L", (image.width // 8, image.height // 8))
        image.load()
        _to_rgb_and_alpha(image.crop((0, 0, 1, 1)) if image.mode not in ("I", "F") else image, uri)


def fit_image(
    image: Image.Image,
    resolution: int | tuple[int, int],
    *,
    center: bool = True,
    crop_key: tuple[float, float] | None = None,
    flip: bool = False,
    resample: Image.Resampling = Image.Resampling.LANCZOS,
    decoded: Decoded | None = None,
) -> np.ndarray:
    """Resize an image to just cover the target, crop it and flip it; return uint8 [H,W,3], or [H,W] for grey images.

    `resolution` is a side or (width, height) in pixels. `crop_key`, two numbers in [0,1), is the relative position
    (x, y) of the crop if `center` is false. `resample` is Pillow's filter, which averages when it shrinks. `decoded` is
    needed if `image` was decoded at a reduced size: the result has the geometry of the full size.
    """
    if image.mode not in ("RGB", "L"):
        raise AssertionError(f"fit_image takes RGB and grey images, not {image.mode}")
    target = (resolution, resolution) if isinstance(resolution, int) else resolution
    size, box = (image.size, None) if decoded is None else (decoded.size, decoded.box)
    placed = place_target(size, target, crop_key=None if center else crop_key)
    image = resize_and_crop(image, placed, target, resample, box=box)
    pixels = np.asarray(image, dtype=np.uint8)
    if flip:
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def to_tensor_range(pixels: np.ndarray, *, out: np.ndarray | None = None) -> np.ndarray:
    """Convert uint8 [H,W,3] to float32 [3,H,W] in [-1,1], the input range of the VAE; write it to `out` if given."""
    made = np.empty((3, *pixels.shape[:2]), np.float32) if out is None else out
    np.copyto(made, pixels.transpose(2, 0, 1))
    made /= np.float32(127.5)
    made -= np.float32(1)
    return made


class _named_errors:
    """Convert any exception that Pillow raises for a broken file into a DataError that names the file."""

    def __init__(self, uri: str, data: bytes) -> None:
        self.uri = uri
        self.data = data

    def __enter__(self) -> None:
        if not self.data:
            raise DataError(f"{self.uri}: the file is empty (0 bytes)")

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        # For broken data, Pillow's readers raise nearly anything (struct.error, IndexError, SyntaxError ...).
        if not isinstance(error, Exception) or isinstance(error, DataError):
            return
        raise DataError(f"{self.uri}: {_reason(error, self.data)}") from error


def _reason(error: Exception, data: bytes) -> str:
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return f"the image is too large ({error}): at most {MAX_PIXELS:,} pixels are read. Make it smaller"
    if isinstance(error, Image.UnidentifiedImageError):
        if data.startswith(b"version https://git-lfs.github.com/spec"):
            return "a Git LFS pointer instead of the image. Run `git lfs pull`"
        return "not an image in a supported format (JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF)"
    text = str(error) or type(error).__name__
    if "truncated" in text.lower() or isinstance(error, EOFError):
        return f"truncated ({text}). Copy or download it again"
    return f"broken image ({text})"


def _open(data: bytes, *, uri: str, max_pixels: int) -> Image.Image:
    image = Image.open(io.BytesIO(data), formats=_FORMATS)
    width, height = image.size
    if width * height > max_pixels:
        image.close()
        raise DataError(
            f"{uri}: {width} x {height} = {width * height:,} pixels, more than data.max_pixels = "
            f"{max_pixels:,}. Make the image smaller, or raise the limit if you trust it"
        )
    if not width or not height:
        raise DataError(f"{uri}: the image has no pixels ({width} x {height})")
    return image


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8; 1 if there is none or the EXIF data are broken."""
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # noqa: BLE001  broken EXIF data raise anything, and the image may be good
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _to_rgb_and_alpha(image: Image.Image, uri: str) -> tuple[Image.Image, Image.Image | None]:
    mode = image.mode
    if mode.startswith("I;16") or mode == "I":
        grey = np.asarray(image).astype(np.int64)
        if grey.min() < 0 or grey.max() > 65535:
            raise DataError(f"{uri}: 32-bit integers outside 0..65535. Save it with 8 or 16 bits per channel")
        transparent = image.info.get("transparency")
        alpha = None
        if isinstance(transparent, int):
            alpha = Image.fromarray(np.where(grey == transparent, 0, 255).astype(np.uint8))
        eight_bit = Image.fromarray(((grey * 255 + 32767) // 65535).astype(np.uint8))
        return _over_white(_in_srgb(eight_bit, image), alpha)
    if mode == "F":
        raise DataError(
            f"{uri}: floating-point pixels have no defined range. Save it with 8 or 16 bits per channel"
        )
    if mode in ("PA", "LA", "La", "RGBA", "RGBa") or "transparency" in image.info:
        straight = image.convert("RGBA")
        colours = straight.convert("L" if mode in ("LA", "La") else "RGB")
        return _over_white(_in_srgb(colours, image), straight.getchannel("A"))
    if mode == "LAB":
        raise DataError(f"{uri}: colour space LAB. Save it as RGB")
    return _in_srgb(image if mode in ("RGB", "L", "CMYK") else image.convert("RGB"), image), None


def _in_srgb(colours: Image.Image, image: Image.Image) -> Image.Image:
    """Convert colours to sRGB by the profile of `image`, from which they come."""
    profile = image.info.get("icc_profile")
    if profile and colours is not image:
        colours.info["icc_profile"] = profile
    return to_srgb(colours)


def _over_white(rgb: Image.Image, alpha: Image.Image | None) -> tuple[Image.Image, Image.Image | None]:
    if alpha is None:
        return rgb, None
    return Image.composite(rgb, Image.new("RGB", rgb.size, "white"), alpha), alpha
