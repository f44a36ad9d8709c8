"""Thumbnails of subjects: which images they show, and what happens without them."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from fleets import BASE, REAL, SIZE, TUNED, write_samples
from PIL import Image

from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.tune.fleet.rows import SubjectImages
from dreamfleet.tune.fleet.thumbnails import write_thumbnail


def colours(fleet: Storage, images: SubjectImages | None) -> list[tuple[int, ...]]:
    assert images is not None and images.thumbnail is not None
    strip = Image.open(io.BytesIO(fleet.read_bytes(images.thumbnail))).convert("RGB")
    assert strip.size == (SIZE * len(images.roles), SIZE)
    places = [(SIZE * n + SIZE // 2, SIZE // 2) for n in range(len(images.roles))]
    return [strip.getpixel(place) for place in places]  # type: ignore[misc]


def test_a_thumbnail_shows_the_same_prompt_and_seed_before_and_after_training(tmp_path: Path) -> None:
    fleet = Storage(tmp_path)
    write_samples(fleet.child("subjects/柴犬 #1"), {0: BASE, 50: (9, 9, 9), 100: TUNED}, REAL)
    images = write_thumbnail(fleet, "柴犬 #1", "subjects/柴犬 #1", resolution=SIZE)
    assert images == SubjectImages(
        "prompt 0",
        7,
        "subjects/柴犬 #1/samples/step-000000.png",
        "subjects/柴犬 #1/samples/step-000100.png",
        "subjects/柴犬 #1/samples/real.png",
        "thumbnails/柴犬 #1.webp",
    )
    assert colours(fleet, images) == [BASE, TUNED, REAL]


@pytest.mark.parametrize(
    ("steps", "real", "roles"),
    [
        ({0: BASE}, REAL, ["base", "real"]),  # stopped before the first previews
        ({100: TUNED}, None, ["tuned"]),  # sample_at_first: false
        ({}, REAL, ["real"]),  # no prompts
    ],
)
def test_images_that_a_run_has_not_are_left_out(
    tmp_path: Path,
    steps: dict[int, tuple[int, int, int]],
    real: tuple[int, int, int] | None,
    roles: list[str],
) -> None:
    fleet = Storage(tmp_path)
    write_samples(fleet.child("subjects/a"), steps, real)
    images = write_thumbnail(fleet, "a", "subjects/a", resolution=SIZE)
    assert images is not None and images.roles == roles
    expected = {"base": BASE, "tuned": TUNED, "real": REAL}
    assert colours(fleet, images) == [expected[role] for role in roles]


def test_unreadable_previews_are_skipped_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fleet = Storage(tmp_path)
    assert write_thumbnail(fleet, "a", "subjects/a", resolution=SIZE) is None
    write_samples(fleet.child("subjects/a"), {0: BASE, 100: TUNED}, REAL)
    fleet.write_bytes("subjects/a/samples/step-000100.png", b"damaged")
    images = write_thumbnail(fleet, "a", "subjects/a", resolution=SIZE)
    assert images is not None and images.roles == ["base", "real"] and "step-000100.png" in caplog.text


def test_large_images_are_reduced_to_squares(tmp_path: Path) -> None:
    fleet = Storage(tmp_path)
    run = fleet.child("subjects/a")
    write_samples(run, {}, None)
    buffer = io.BytesIO()
    grid = Image.linear_gradient("L").resize((1024, 512)).convert("RGB")
    grid.save(buffer, "PNG")
    run.write_bytes("samples/real.png", buffer.getvalue())
    images = write_thumbnail(fleet, "a", "subjects/a", resolution=512)
    assert images is not None and images.thumbnail is not None
    assert Image.open(io.BytesIO(fleet.read_bytes(images.thumbnail))).size == (256, 256)
