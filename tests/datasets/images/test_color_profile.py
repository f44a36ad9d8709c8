"""Test the conversion of colour profiles to sRGB for every image format and mode."""

from __future__ import annotations

import io
import struct
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from dreamfleet.datasets.images.images import open_image, open_with_alpha


def profile(name: str) -> bytes:
    """Return an ICC profile as bytes.

    The name selects Adobe RGB primaries, sRGB, LAB, or a greyscale profile and its gamma (`grey1.0`).
    """
    if name == "sRGB":
        return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    if name == "LAB":
        return ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    # A matrix profile with gamma 2.2 (ICC.1, version 2): header, tags, and D50-adapted primaries.
    grey = name.startswith("grey")
    xyz = {
        "rXYZ": (0.60974, 0.31111, 0.01947),
        "gXYZ": (0.20528, 0.62567, 0.06087),
        "bXYZ": (0.14919, 0.06322, 0.74457),
    }
    gamma = round(float(name[4:] or 2.2) * 256) if grey else 563
    number = lambda value: struct.pack(">i", round(value * 65536))  # noqa: E731
    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, gamma) + bytes(2)
    data = {"wtpt": b"XYZ " + bytes(4) + number(0.9642) + number(1.0) + number(0.8249)}
    data["desc"] = b"desc" + bytes(4) + struct.pack(">I", 6) + b"Adobe\0" + bytes(80)
    data["cprt"] = b"text" + bytes(4) + b"none\0"
    if grey:
        data["kTRC"] = curve
    else:
        data |= {tag: b"XYZ " + bytes(4) + b"".join(map(number, values)) for tag, values in xyz.items()}
        data |= dict.fromkeys(("rTRC", "gTRC", "bTRC"), curve)
    table, body = b"", b""
    start = 128 + 4 + 12 * len(data)
    for tag, content in data.items():
        content += bytes(-len(content) % 4)
        table += tag.encode() + struct.pack(">II", start + len(body), len(content))
        body += content
    space = b"GRAY" if grey else b"RGB "
    head = (
        struct.pack(">I", start + len(body))
        + bytes(4)
        + struct.pack(">I", 0x02400000)
        + b"mntr"
        + space
        + b"XYZ "
    )
    head += (
        struct.pack(">6H", 2020, 1, 1, 0, 0, 0)
        + b"acsp"
        + bytes(28)
        + number(0.9642)
        + number(1.0)
        + number(0.8249)
    )
    return head.ljust(128, b"\0") + struct.pack(">I", len(data)) + table + body


def saved(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_profiles_are_converted_to_srgb(kind: str) -> None:
    green = Image.new("RGB", (16, 16), (60, 200, 60))
    exact = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}.get(kind, {})
    plain = open_image(saved(green, kind, **exact), uri="a")
    wide = open_image(saved(green, kind, icc_profile=profile("Adobe"), **exact), uri="a")
    assert plain.getpixel((8, 8)) == pytest.approx((60, 200, 60), abs=3)
    # Adobe RGB's green is outside the sRGB gamut, so red is clipped to 0.
    assert wide.getpixel((8, 8))[0] < 5 and wide.getpixel((8, 8))[1] == pytest.approx(200, abs=4)
    assert "icc_profile" not in wide.info  # otherwise a saved copy would be converted again
    same = open_image(saved(green, kind, icc_profile=profile("sRGB"), **exact), uri="a")
    assert same.tobytes() == plain.tobytes()


@pytest.mark.parametrize("broken", [b"junk", b"", profile("LAB"), profile("grey")[:200]])
def test_unusable_profiles_are_ignored(broken: bytes) -> None:
    image = Image.new("RGB", (8, 8), (10, 200, 30))
    found = open_image(saved(image, icc_profile=broken), uri="a")
    assert found.getpixel((0, 0)) == (10, 200, 30)


def test_grey_transparent_and_deep_images_with_profiles() -> None:
    ramp = Image.linear_gradient("L").resize((16, 16))
    linear = profile("grey1.0")  # linear: 50 % intensity is 188 in sRGB
    half = Image.new("L", (8, 8), 128)
    for image, given, grey in (
        (half, linear, 188),
        (half, profile("Adobe"), 128),
        (Image.merge("LA", (half, Image.new("L", (8, 8), 255))), linear, 188),
        (Image.fromarray(np.full((8, 8), 128 * 257, np.uint16)), linear, 188),
    ):
        found = open_image(saved(image, icc_profile=given), uri="a").getpixel((0, 0))
        assert found == pytest.approx((grey,) * 3, abs=2), image.mode
    green = Image.new("RGBA", (8, 8), (60, 200, 60, 255))
    rgb, alpha = open_with_alpha(saved(green, icc_profile=profile("Adobe")), uri="a")
    assert rgb.getpixel((0, 0))[0] < 5 and alpha is not None and alpha.getextrema() == (255, 255)
    palette = Image.new("RGB", (8, 8), (60, 200, 60)).quantize(4)
    assert open_image(saved(palette, icc_profile=profile("Adobe")), uri="a").getpixel((0, 0))[0] < 5
    assert open_image(saved(ramp), uri="a").getpixel((0, 15)) == (ramp.getpixel((0, 15)),) * 3


def test_cmyk_without_profile_and_with_exif_rotation() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.new("CMYK", (8, 4), (0, 255, 255, 0))
    found = open_image(saved(image, "JPEG", exif=exif, quality=100), uri="a")
    assert found.size == (4, 8) and found.getpixel((0, 0)) == pytest.approx((255, 0, 0), abs=3)
