"""Test that images of extreme aspect ratio are cropped before upscaling; other crops are bit-identical."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from dreamfleet.cluster.cli import program
from dreamfleet.datasets.config import DataConfig
from dreamfleet.datasets.errors import DataError
from dreamfleet.datasets.images.crops import Cutting, draw_cut, plan_cuts
from dreamfleet.datasets.images.images import fit_image
from dreamfleet.datasets.images.resampling import MOST_RESIZED, place_target, resize_and_crop
from dreamfleet.datasets.images.vision_transform import Fitting
from dreamfleet.datasets.index.sets import load_sets
from dreamfleet.trainers.models.vision.wd_tagger import square_of


@pytest.mark.parametrize("size", [(20_000, 1), (1, 20_000), (30_000, 3), (3, 30_000)])
def test_extreme_aspect_ratios_take_little_memory(size: tuple[int, int]) -> None:
    ramp = np.linspace(0, 255, max(size)).astype(np.uint8)
    pixels = np.broadcast_to(ramp[:, None] if size[1] > size[0] else ramp[None], size[::-1])
    image = Image.merge("RGB", [Image.fromarray(np.ascontiguousarray(pixels))] * 3)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**29, limits[1]))
    try:
        middle = fit_image(image, 512)
        ends = [
            fit_image(image, (512, 448), center=False, crop_key=key) for key in ((0.0, 0.0), (0.9999, 0.9999))
        ]
        looked_at = Fitting(224, (224, 224))(image)
        squared = square_of(image, 64)
        cuts = [
            plan_cuts(image, Cutting((512, 512), mode, split=True))
            for mode in ("crop", "smart", "focal", "pad")
        ]
        drawn = [draw_cut(image, cut, "edge") for cutting in cuts for cut in cutting]
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert middle.shape == (512, 512, 3) and middle.mean() == pytest.approx(127, abs=2)
    assert [end.shape for end in ends] == [(448, 512, 3)] * 2
    assert ends[0].mean() < 3 and ends[1].mean() > 252
    assert looked_at.size == (224, 224) and np.asarray(looked_at).mean() == pytest.approx(127, abs=2)
    assert squared.shape == (64, 64, 3)
    assert len(drawn) == 4 and all(part.size == (512, 512) for part in drawn)


@pytest.mark.parametrize("size", [(640, 480), (480, 1280), (1000, 100), (100, 1000), (333, 77)])
def test_crops_of_other_shapes_are_unchanged_bit_for_bit(size: tuple[int, int]) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    scale = max(64 / size[0], 64 / size[1])
    whole = image.resize(
        (max(64, round(size[0] * scale)), max(64, round(size[1] * scale))), Image.Resampling.LANCZOS
    )
    left, top = (whole.width - 64) // 2, (whole.height - 64) // 2
    assert (fit_image(image, 64) == np.asarray(whole.crop((left, top, left + 64, top + 64)))).all()


def test_resizing_a_part_equals_cropping_the_resized_image() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 2000, 3), dtype=np.uint8))
    placed = place_target(image.size, (64, 64), crop_key=(0.3, 0.0))
    part = resize_and_crop(image, placed, (64, 64), Image.Resampling.LANCZOS)
    assert placed.width * placed.height > MOST_RESIZED * 64 * 64
    whole = image.resize((placed.width, placed.height), Image.Resampling.LANCZOS)
    same = whole.crop((placed.left, placed.top, placed.left + 64, placed.top + 64))
    assert np.abs(np.asarray(part, np.int16) - np.asarray(same, np.int16)).max() <= 2


def inspect(folder: Path, *words: Any) -> Any:
    shown = CliRunner().invoke(program.app, ["data", "inspect", str(folder), *map(str, words), "--json"])
    assert shown.exit_code == 0, shown.output
    return json.loads(shown.stdout)


def test_extreme_shapes_are_reported_and_left_out_without_upscaling(tmp_path: Path) -> None:
    for name, size in (("strip", (2000, 1)), ("square", (64, 64)), ("small", (40, 90)), ("tiny", (15, 15))):
        Image.new("RGB", size, "red").save(tmp_path / f"{name}.png")
    found = inspect(tmp_path, "--resolution", 64)
    assert list(found["extreme"]) == [str(tmp_path / "strip.png")]
    assert any("strip.png" in text and "2000 x 1" in text for text in found["warnings"])
    buckets = inspect(tmp_path, "--resolution", 64, "--buckets", "data.bucket_no_upscale=true")
    assert {Path(name).name for name in buckets["bad"]} == {"strip.png", "tiny.png"}
    assert buckets["largest_scale"] <= 4 and buckets["pictures"] == 2
    (tmp_path / "square.png").unlink()
    (tmp_path / "small.png").unlink()
    data = DataConfig(
        instance_data_dir=str(tmp_path), resolution=64, enable_bucket=True, bucket_no_upscale=True
    )
    with pytest.raises(DataError, match=r"no usable image.*bucket_reso_steps"):
        load_sets(data)
