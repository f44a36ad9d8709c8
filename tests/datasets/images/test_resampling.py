"""Tests of the image filters: reduced decoding of JPEG files, its geometry, and what a latent cache records of it."""

import io

import numpy as np
import pytest
from PIL import Image

from dreamfleet.datasets.config import DataConfig
from dreamfleet.datasets.errors import DataError
from dreamfleet.datasets.images.images import decode_image
from dreamfleet.datasets.images.masks import ImageView, Mask, cut_image
from dreamfleet.datasets.images.resampling import RESAMPLINGS, turn_box
from dreamfleet.datasets.serve.encoding import encoding_of

ORIENTATION = 0x0112


def smooth(width: int, height: int, *, seed: int = 0) -> Image.Image:
    """Return an image without high frequencies, so that a shift by half a pixel of a small copy is visible."""
    rng = np.random.default_rng(seed)
    x, y = np.linspace(0, 1, width)[None, :, None], np.linspace(0, 1, height)[:, None, None]
    waves = [
        np.sin(2 * np.pi * (a * x + b * y) + c)
        for a, b, c in zip(*(rng.uniform(2, 6, (3, 5)) * np.array([[[1]], [[-1]], [[1]]])[:, 0]), strict=True)
    ]
    colours = rng.uniform(-1, 1, (5, 3))
    pixels = 128 + 40 * sum(wave * colour for wave, colour in zip(waves, colours, strict=True))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def jpeg(image: Image.Image, *, orientation: int = 1) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    out = io.BytesIO()
    image.save(out, "JPEG", quality=95, exif=exif)
    return out.getvalue()


CENTRED = ImageView(0)


def cut(data: bytes, size: tuple[int, int], resampling: str, view: ImageView = CENTRED) -> np.ndarray:
    return cut_image(data, view, uri="a", size=size, resampling=resampling)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("size", "target"), [((1027, 771), (90, 90)), ((515, 1033), (128, 120))])
def test_a_reduced_decode_has_the_geometry_of_a_full_one(orientation, size, target):
    data = jpeg(smooth(*size), orientation=orientation)
    assert decode_image(data, uri="a", covering=target).image.size < decode_image(data, uri="a").image.size
    for view in (CENTRED, ImageView(0, (0.0, 0.0)), ImageView(0, (0.999, 0.999), flip=True)):
        full, reduced = (cut(data, target, name, view).astype(int) for name in ("lanczos", "scaled_lanczos"))
        assert np.abs(full - reduced).max() <= 4  # an edge that is off by half a pixel gives 8 and more


@pytest.mark.parametrize(("data", "target"), [("png", 32), ("small", 64), ("same", 100)])
def test_other_images_have_the_pixels_of_plain_lanczos(data, target):
    image = smooth(120, 100)
    out = io.BytesIO()
    image.save(out, "PNG")
    content = out.getvalue() if data == "png" else jpeg(image)
    np.testing.assert_array_equal(
        cut(content, (target, target), "scaled_lanczos"), cut(content, (target, target), "lanczos")
    )


@pytest.mark.parametrize("how", list(Image.Transpose))
def test_a_box_turns_with_the_image(how):
    image = smooth(40, 30)
    box = (3, 5, 21, 27)
    turned = tuple(int(edge) for edge in turn_box(box, image.size, how))
    assert image.crop(box).transpose(how).tobytes() == image.transpose(how).crop(turned).tobytes()


def test_every_filter_gives_the_size_and_its_own_pixels():
    data = jpeg(Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)))
    made = [cut(data, (64, 64), name) for name in RESAMPLINGS]
    assert all(one.shape == (64, 64, 3) for one in made)
    assert len({one.tobytes() for one in made}) == len(RESAMPLINGS)


@pytest.mark.parametrize("mask_side", [256, 64])
def test_masks_are_cut_as_with_a_full_decode(mask_side):
    data, out = jpeg(smooth(512, 256)), io.BytesIO()
    smooth(mask_side * 2, mask_side, seed=1).convert("L").save(out, "PNG")
    weights = [
        cut_image(
            data,
            ImageView(0, (0.7, 0.0)),
            uri="a",
            size=64,
            resampling=name,
            weighted=True,
            mask=Mask(out.getvalue()),
        )[..., 3]
        for name in ("lanczos", "scaled_lanczos")
    ]
    assert np.ptp(weights[0]) > 20
    np.testing.assert_array_equal(*weights)


def test_a_truncated_file_is_refused_at_every_size():
    data = jpeg(smooth(512, 512))
    for side in (32, 512):
        with pytest.raises(DataError, match="truncated"):
            cut(data[: len(data) // 2], (side, side), "scaled_lanczos")


def test_a_cache_is_keyed_by_the_filter_and_older_caches_by_lanczos():
    data = {"instance_data_dir": "/x", "resolution": 512}
    older = encoding_of(DataConfig(**data, image_interpolation_mode="lanczos"), "v")
    assert older.folder == "512px-1060c04105"  # as recorded before the filter was a setting
    ours = encoding_of(DataConfig(**data), "v")
    assert ours.folder != older.folder
    assert ours.differences(older.to_json()) == ["resampling lanczos (here scaled_lanczos)"]
    assert older.differences(ours.to_json()) == ["resampling scaled_lanczos (here lanczos)"]
    assert older.differences(older.to_json()) == []
