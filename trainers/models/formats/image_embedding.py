"""Reads and writes images that contain a textual inversion embedding, in a PNG text chunk and in pixels at the sides.

The format is the webui's: the text chunk exists only in PNG, the pixel blocks in any lossless format. Both contain the
dict of a webui `.pt` as JSON, with tensors as `{"TORCHTENSOR": nested list}`.

Shapes: H, W height and width of the whole image in pixels; K columns of one block of hidden nibbles.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import os
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, PngImagePlugin, UnidentifiedImageError

from dreamfleet.datasets.errors import FormatError
from dreamfleet.datasets.storage.disk import as_storage_error
from dreamfleet.trainers.models.formats import lossless_image
from dreamfleet.trainers.models.formats.embedding_card import captioned, plain_card
from dreamfleet.trainers.models.formats.file_names import EMBEDDING_IMAGES, LOSSLESS_IMAGES
from dreamfleet.trainers.models.formats.pickle_writer import replacing

TEXT_KEY = "sd-ti-embedding"

MAX_PIXELS = 64_000_000  # limit for reading; 75 vectors beside a 4K image need a tenth of it
MAX_JSON_BYTES = 32_000_000  # decompressed; 75 vectors of 1024 numbers need 2 MB
MAX_JSON_DEPTH = 16  # the webui dict has 5

_TENSOR_KEY = "TORCHTENSOR"
_SAVE_OPTIONS: dict[str, dict[str, Any]] = {
    ".png": {"format": "PNG"},
    ".webp": {"format": "WEBP", "lossless": True, "quality": 100, "exact": True},
}

Pixels = NDArray[np.uint8]


def write_image_embedding(
    data: dict[str, Any],
    path: str | os.PathLike[str],
    *,
    image: Image.Image | None = None,
    caption: Sequence[str] = (),
) -> Path:
    """Write an image that contains `data`, the dict of a webui `.pt`, in its pixels and, for PNG, also as text.

    `image` is the visible image (None: a default one); `caption` is a title and up to three footers drawn on it.
    Raises FormatError for a suffix that is not in EMBEDDING_IMAGES or needs a package that is not installed, and
    StorageError if writing fails.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in EMBEDDING_IMAGES:
        raise FormatError(
            f"{path}: an image embedding cannot be a {suffix or 'file without suffix'}; write a .png."
        )
    payload = _to_json(data)
    shown = captioned(image or plain_card(), caption)
    vectors = next((value for value in _tensors_of(data)), torch.ones(1, 1))
    pixels_HW3 = _hide(np.asarray(shown), payload, decoration=vectors[0].float().numpy())
    written = _encode(pixels_HW3, suffix, payload, str(path))
    if _carried_by_pixels(_open(written, str(path))) != payload:
        raise FormatError(
            f"{path}: {suffix} as written by this Pillow is not lossless; write a .png or .webp instead."
        )
    with replacing(path) as temporary:
        temporary.write_bytes(written)
    return path


def read_image_embedding(source: str | os.PathLike[str] | bytes) -> dict[str, Any]:
    """Read the dict that an image contains, from the text chunk or otherwise from the pixels. Tensors are float32.

    Raises FormatError if the image contains none, is damaged, or is larger than an embedding can be.
    """
    where = "this image" if isinstance(source, bytes) else str(source)
    if isinstance(source, bytes):
        content = source
    else:
        try:
            content = Path(source).read_bytes()
        except OSError as error:
            raise as_storage_error("read", where, error) from error
    image = _open(content, where)
    text = getattr(image, "text", {}).get(TEXT_KEY)
    if text is not None:
        try:
            payload: bytes | None = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError) as error:
            raise FormatError(f"{where}: its text chunk {TEXT_KEY!r} is damaged.") from error
    else:
        payload = _carried_by_pixels(image)
    if payload is None:
        raise FormatError(
            f"{where}: this image carries no embedding. If it once did, it was saved again with loss "
            "(as JPEG, or by a site that recompresses); use the original file."
        )
    return _from_json(payload, where)


def lcg_noise(count: int) -> NDArray[np.uint8]:
    """Return the first `count` values (0 to 254) of the pseudo-random sequence that masks the nibbles.

    x <- (1664525 x + 1013904223) mod 2^32, starting at 0; the values are x mod 255. Source: webui,
    modules/textual_inversion/image_embedding.
    """
    multiplier, increment, mask = 1664525, 1013904223, 2**32 - 1
    states = np.array([increment], dtype=np.uint64)
    while (
        len(states) < count
    ):  # advancing by n values is again x -> multiplier x + increment, so each round doubles n
        states = np.concatenate([states, (states * multiplier + increment) & mask])
        multiplier, increment = multiplier * multiplier & mask, (multiplier * increment + increment) & mask
    return (states[:count] % 255).astype(np.uint8)


def _to_json(data: dict[str, Any]) -> bytes:
    def plain(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return {_TENSOR_KEY: _short_floats(value.detach().float().cpu().numpy())}
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return value

    return json.dumps(plain(data), allow_nan=False).encode("utf-8")


def _short_floats(array: NDArray[np.float32]) -> Any:
    """Return float32 numbers as nested lists with the fewest digits that restore the same bits; halves the size."""
    flat = [float(str(value)) for value in array.ravel()]
    exact = np.array(flat, dtype=np.float64).astype(np.float32)
    kept = np.array(flat) if np.array_equal(exact, array.ravel()) else array.ravel().astype(np.float64)
    return kept.reshape(array.shape).tolist()


def _from_json(payload: bytes, where: str) -> dict[str, Any]:
    if len(payload) > MAX_JSON_BYTES:
        raise FormatError(f"{where}: holds {len(payload)} bytes of text, more than an embedding needs.")
    levels = np.zeros(256, dtype=np.int32)
    levels[[ord("["), ord("{")]] = 1
    levels[[ord("]"), ord("}")]] = -1
    if np.cumsum(levels[np.frombuffer(payload, dtype=np.uint8)]).max(initial=0) > MAX_JSON_DEPTH:
        raise FormatError(f"{where}: its content is nested too deeply for an embedding.")

    def restore(value: dict[str, Any]) -> Any:
        if set(value) != {_TENSOR_KEY}:
            return value
        return torch.from_numpy(np.asarray(value[_TENSOR_KEY], dtype=np.float64).astype(np.float32))

    try:
        data = json.loads(payload.decode("utf-8"), object_hook=restore)
    except (ValueError, TypeError, OverflowError) as error:
        raise FormatError(f"{where}: its content is not the JSON of an embedding ({error}).") from error
    if not isinstance(data, dict):
        raise FormatError(f"{where}: its content is not an embedding.")
    return data


def _hide(image_HW3: Pixels, payload: bytes, *, decoration: NDArray[np.float32]) -> Pixels:
    """Return the image with columns that contain the payload: low nibbles at its left, high nibbles at its right."""
    height = image_HW3.shape[0]
    packed = np.frombuffer(zlib.compress(payload, 9), dtype=np.uint8)
    size = len(packed) + height - len(packed) % height
    size += 3 * height - size % (3 * height)
    low_HK3, high_HK3 = (
        np.resize(part, size).reshape(height, -1, 3) for part in (packed & 0x0F, packed >> 4)
    )
    noise_HK3 = lcg_noise(size).reshape(low_HK3.shape) & 0x0F
    greys = _greys(decoration)
    discs = [_discs(low_HK3.shape[1], height, shades) for shades in (greys, greys[::-1])]
    black_H13 = np.zeros((height, 1, 3), dtype=np.uint8)
    left, right = low_HK3 ^ noise_HK3 ^ discs[0], high_HK3 ^ noise_HK3 ^ discs[1]
    return np.concatenate([left, black_H13, image_HW3, black_H13, right], axis=1)


def _carried_by_pixels(image: Image.Image) -> bytes | None:
    """Return the payload hidden in an image's pixels; None if there is none or it is damaged."""
    pixels_HW3 = np.asarray(image.convert("RGB"))
    bright_HW = np.asarray((pixels_HW3 > 0).all(axis=2))
    rows, columns = np.flatnonzero(bright_HW.any(axis=1)), np.flatnonzero(bright_HW.any(axis=0))
    if not len(rows):
        return None
    nibbles_HW3 = pixels_HW3[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] & 0x0F
    walls = np.flatnonzero((nibbles_HW3 == 0).all(axis=(0, 2)))
    if len(walls) < 2:
        return None
    low_HK3, high_HK3 = nibbles_HW3[:, : walls[0]], nibbles_HW3[:, walls[-1] + 1 :]
    if low_HK3.shape != high_HK3.shape or not low_HK3.size:
        return None
    noise = lcg_noise(low_HK3.size) & 0x0F
    packed = ((high_HK3.ravel() ^ noise) << 4) | (low_HK3.ravel() ^ noise)
    inflater = zlib.decompressobj()
    try:
        payload = inflater.decompress(packed.tobytes(), MAX_JSON_BYTES + 1)
    except zlib.error:
        return None
    return payload if inflater.eof or len(payload) > MAX_JSON_BYTES else None


def _encode(pixels_HW3: Pixels, suffix: str, payload: bytes, where: str) -> bytes:
    """Return the image encoded in the format of ``suffix``; in a PNG also with the payload as text."""
    if suffix in LOSSLESS_IMAGES:
        return lossless_image.encode(pixels_HW3, suffix, where)
    options = dict(_SAVE_OPTIONS[suffix])
    if suffix == ".png":
        options["pnginfo"] = PngImagePlugin.PngInfo()
        options["pnginfo"].add_text(TEXT_KEY, base64.b64encode(payload).decode("ascii"))
    written = io.BytesIO()
    try:
        Image.fromarray(pixels_HW3).save(written, **options)
    except (KeyError, OSError) as error:
        raise FormatError(
            f"{where}: this Pillow cannot write {suffix} images; write a .png instead."
        ) from error
    return written.getvalue()


def _open(content: bytes, where: str) -> Image.Image:
    try:
        if lossless_image.is_jxl(content):
            size = lossless_image.size_of(content)
            if size is None:
                raise FormatError(f"{where}: the image is damaged (truncated).")
            _require_size(size, where)
            return lossless_image.decode_jxl(content, size, where)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is stricter
            image = Image.open(io.BytesIO(content))
        _require_size(image.size, where)
        image.load()
    except FormatError:
        raise
    except UnidentifiedImageError as error:
        raise FormatError(f"{where}: not an image that can be read.") from error
    except Exception as error:  # Pillow's decoders raise many types for damaged images
        raise FormatError(f"{where}: the image is damaged ({_first_line(error)}).") from error
    return image


def _require_size(size: tuple[int, int], where: str) -> None:
    if size[0] * size[1] > MAX_PIXELS:
        raise FormatError(f"{where}: {size[0]}x{size[1]} pixels are more than an embedding needs.")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _tensors_of(data: Any) -> list[torch.Tensor]:
    if isinstance(data, torch.Tensor):
        return [data] if data.ndim == 2 and data.numel() else []
    return (
        [tensor for item in data.values() for tensor in _tensors_of(item)] if isinstance(data, dict) else []
    )


def _greys(vector: NDArray[np.float32]) -> Pixels:
    """Return the grey levels of the discs drawn over the nibbles, derived from the first vector."""
    size = np.abs(vector[:1024])
    return (size / max(float(size.max(initial=0)), 1e-12) * 255).astype(np.uint8)


def _discs(columns: int, height: int, greys: Pixels) -> Pixels:
    """Return an image of discs of 6 pixels on a grid of 8, odd rows shifted by 4, of which only bits 4 to 7 are set."""
    sheet = Image.new("L", (columns, height))
    draw = ImageDraw.Draw(sheet)
    count = 0
    for row, top in enumerate(range(-6, height, 8)):
        for left in range(-6 + 4 * (row % 2), columns, 8):
            draw.ellipse((left, top, left + 6, top + 6), fill=int(greys[count % len(greys)]))
            count += 1
    return np.repeat((np.asarray(sheet) & 0xF0)[:, :, None], 3, axis=2)
