"""Test the decoding of all supported formats, and the errors for damaged files."""

import io
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np
import pytest
from PIL import Image

from dreamfleet.datasets.errors import DataError
from dreamfleet.datasets.images.images import (
    check_image,
    fit_image,
    open_image,
    open_with_alpha,
    read_header,
    to_tensor_range,
)

QUADRANTS = np.zeros((20, 30, 3), np.uint8)  # one colour per quadrant: every rotation is visible
QUADRANTS[:10, :15] = (250, 10, 10)
QUADRANTS[:10, 15:] = (10, 250, 10)
QUADRANTS[10:, :15] = (10, 10, 250)
QUADRANTS[10:, 15:] = (240, 240, 10)


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def close(a: np.ndarray, b: np.ndarray, within: int = 12) -> bool:
    # Interpolation blurs the edges between colours, so 20 % of the values may differ.
    return a.shape == b.shape and bool((np.abs(a.astype(int) - b.astype(int)) <= within).mean() > 0.8)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *extra: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(extra) + data + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "AVIF"])
def test_common_formats_give_the_same_rgb(kind):
    options = {"quality": 95} if kind in ("JPEG", "AVIF") else {"lossless": True} if kind == "WEBP" else {}
    data = encode(Image.fromarray(QUADRANTS), kind, **options)
    image = open_image(data, uri="a")
    assert image.mode == "RGB"
    assert close(np.asarray(image), QUADRANTS, within=20)
    assert open_with_alpha(data, uri="a")[1] is None
    assert read_header(data, uri="a")[:2] == (30, 20)
    check_image(data, uri="a")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_all_eight_exif_orientations(kind, orientation):
    upright = Image.fromarray(QUADRANTS)
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(undo[orientation]) if orientation in undo else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = (
        {"lossless": True} if kind == "WEBP" else {"quality": 95, "subsampling": 0} if kind == "JPEG" else {}
    )
    data = encode(stored, kind, exif=exif.tobytes() if kind != "TIFF" else exif, **options)
    assert close(np.asarray(open_image(data, uri="a")), QUADRANTS)
    assert read_header(data, uri="a")[:2] == (30, 20)


def test_alpha_is_rotated_with_the_image():
    rgba = np.dstack([QUADRANTS, np.full((20, 30), 255, np.uint8)])
    rgba[:10, :15, 3] = 0
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(Image.fromarray(rgba).transpose(Image.Transpose.ROTATE_90), "PNG", exif=exif.tobytes())
    alpha = np.asarray(open_with_alpha(data, uri="a")[1])
    assert alpha.shape == (20, 30)
    assert (alpha[:10, :15] == 0).all()
    assert (alpha[10:, :] == 255).all()


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_images_with_broken_exif_are_used():
    data = encode(Image.fromarray(QUADRANTS), "JPEG", exif=b"Exif\x00\x00MM\x00*\x00\x00\xff\xff\xff\xff")
    assert open_image(data, uri="a").size == (30, 20)
    assert read_header(data, uri="a")[:2] == (30, 20)


def test_cmyk_jpeg():
    data = encode(Image.fromarray(QUADRANTS).convert("CMYK"), "JPEG", quality=95, subsampling=0)
    assert close(np.asarray(open_image(data, uri="a")), QUADRANTS, within=20)


def test_sixteen_bit_grey_is_scaled_not_clipped():
    ramp = np.linspace(0, 65535, 64 * 4).astype(np.uint16).reshape(4, 64)
    for kind in ("PNG", "TIFF"):
        got = np.asarray(open_image(encode(Image.fromarray(ramp), kind), uri="a"))[..., 0]
        np.testing.assert_array_equal(got, np.round(ramp / 257).astype(np.uint8))


def test_sixteen_bit_grey_with_a_transparent_value():
    rows = b"".join(b"\x00" + struct.pack(">HH", 1000, 65535) for _ in range(2))
    data = png(2, 2, 16, 0, rows, chunk(b"tRNS", struct.pack(">H", 1000)))
    np.testing.assert_array_equal(np.asarray(open_with_alpha(data, uri="a")[1]), [[0, 255], [0, 255]])
    # Transparent pixels are composited over white; the other pixels are white.
    assert (np.asarray(open_image(data, uri="a")) == 255).all()


def test_sixteen_bit_rgb():
    rows = b"".join(b"\x00" + struct.pack(">HHH", 65535, 32896, 0) * 3 for _ in range(2))
    got = np.asarray(open_image(png(3, 2, 16, 2, rows), uri="a"))
    assert (got == (255, 128, 0)).all()


def test_palette_with_and_without_transparency():
    palette = Image.fromarray(QUADRANTS).quantize(8)
    assert close(np.asarray(open_image(encode(palette, "PNG"), uri="a")), QUADRANTS)
    red = palette.getpixel((0, 0))
    data = encode(palette, "PNG", transparency=red)
    pixels = np.asarray(open_image(data, uri="a"))
    assert (pixels[:10, :15] == 255).all()
    assert close(pixels[10:], QUADRANTS[10:])
    alpha = np.asarray(open_with_alpha(data, uri="a")[1])
    assert (alpha[:10, :15] == 0).all()
    assert (alpha[10:] == 255).all()


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_alpha_is_composited_over_white(mode):
    colour = (0, 128) if mode == "LA" else (0, 0, 0, 128)
    data = encode(Image.new(mode, (4, 4), colour), "PNG")
    assert abs(int(np.asarray(open_image(data, uri="a"))[0, 0, 0]) - 127) <= 1
    assert (np.asarray(open_with_alpha(data, uri="a")[1]) == 128).all()


@pytest.mark.parametrize("mode", ["1", "L"])
def test_grey_and_bilevel(mode):
    data = encode(Image.new(mode, (5, 3), 1 if mode == "1" else 200), "PNG")
    assert (np.asarray(open_image(data, uri="a")) == (255 if mode == "1" else 200)).all()


@pytest.mark.parametrize(("kind", "options"), [("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {})])
def test_the_first_frame_of_an_animation_is_used(kind, options):
    frames = [Image.new("RGB", (8, 6), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:], duration=100, **options)
    assert close(np.asarray(open_image(data, uri="a")), np.full((6, 8, 3), (255, 0, 0), np.uint8))
    check_image(data, uri="a")


def noise(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (90, 120, 3), dtype=np.uint8))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP", "AVIF"])
@pytest.mark.parametrize("part", [0.3, 0.9])
def test_truncated(kind, part):
    data = encode(noise(), kind)
    cut = data[: int(len(data) * part)]
    with pytest.raises(DataError, match=r"^cat\.x: "):
        open_image(cut, uri="cat.x")
    with pytest.raises(DataError, match=r"^cat\.x: "):
        check_image(cut, uri="cat.x")


def test_empty_text_and_lfs_pointer():
    with pytest.raises(DataError, match=r"a\.png: .*empty"):
        open_image(b"", uri="a.png")
    with pytest.raises(DataError, match=r"a\.png: not an? (picture|image)"):
        read_header(b"hello, I am text", uri="a.png")
    with pytest.raises(DataError, match="git lfs pull"):
        open_image(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", uri="a.png")


@pytest.mark.filterwarnings("ignore")  # Pillow warns about some of the damaged files
def test_random_bytes_after_a_valid_header_raise_only_data_errors():
    rng = np.random.default_rng(0)
    for kind in ("PNG", "JPEG", "GIF", "WEBP", "TIFF"):
        good = bytearray(encode(noise(), kind))
        for _ in range(15):
            broken = bytearray(good)
            for at in rng.integers(8, len(good), 20):
                broken[at] = int(rng.integers(256))
            with suppress(DataError):
                open_image(bytes(broken), uri="a")


def test_postscript_is_refused():
    with pytest.raises(DataError, match=r"not an? (picture|image)"):
        open_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n", uri="a.eps")


def test_decompression_bombs_are_refused_by_their_header():
    before = Image.MAX_IMAGE_PIXELS
    with pytest.raises(DataError, match=r"40 x 40.*data\.max_pixels.*1,599"):
        open_image(encode(Image.new("RGB", (40, 40)), "PNG"), uri="a.png", max_pixels=1599)
    with pytest.raises(DataError, match="too large"):
        open_image(png(60000, 60000, 1, 0, b""), uri="a.png")
    with pytest.raises(DataError, match="10000 x 8000"):  # rejected by the header; the file has no pixel data
        check_image(png(10000, 8000, 8, 2, b""), uri="a.png", max_pixels=1_000_000)
    assert before == Image.MAX_IMAGE_PIXELS


def test_decoding_in_threads_is_deterministic():
    data = [encode(noise(seed), "JPEG") for seed in range(8)]
    alone = [np.asarray(open_image(item, uri="a")) for item in data]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda item: np.asarray(open_image(item, uri="a")), data))
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one, other)


def test_fit_crops_the_centre_or_at_the_key():
    wide = Image.fromarray(np.tile(np.arange(200, dtype=np.uint8)[None, :, None], (100, 1, 3)))
    middle = fit_image(wide, 100)
    assert middle.shape == (100, 100, 3)
    assert middle.dtype == np.uint8
    assert middle[0, 0, 0] == 50
    assert fit_image(wide, 100, center=False, crop_key=(0.0, 0.0))[0, 0, 0] == 0
    assert fit_image(wide, 100, center=False, crop_key=(0.9999999, 0.5))[0, -1, 0] == 199
    assert fit_image(wide, 100, center=True, crop_key=(0.0, 0.0))[0, 0, 0] == 50
    np.testing.assert_array_equal(fit_image(wide, 100, flip=True), middle[:, ::-1])


@pytest.mark.parametrize("size", [(1, 1), (7, 301), (301, 7), (64, 64), (65, 64), (1000, 63)])
@pytest.mark.parametrize("target", [64, (64, 32), (8, 96)])
def test_fit_returns_the_requested_size(size, target):
    width, height = (target, target) if isinstance(target, int) else target
    got = fit_image(Image.new("RGB", size, (9, 8, 7)), target, center=False, crop_key=(0.3, 0.7))
    assert got.shape == (height, width, 3)
    assert (got == (9, 8, 7)).all()
    assert got.flags.c_contiguous


def test_fit_antialiases():
    stripes = np.zeros((512, 512, 3), np.uint8)
    stripes[:, ::2] = 255
    assert np.ptp(fit_image(Image.fromarray(stripes), 64)[:, 4:-4].astype(int)) < 12


def test_to_tensor_range():
    got = to_tensor_range(np.array([[[0, 255, 128]]], np.uint8))
    assert got.shape == (3, 1, 1)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got.ravel(), [-1, 1, 128 / 127.5 - 1], atol=1e-6)
