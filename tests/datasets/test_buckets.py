"""Test buckets: sizes equal those of kohya's sd-scripts; every image source gives batches of one size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dreamfleet.datasets.buckets import (
    bucket_sizes,
    describe_buckets,
    nearest_size,
    number_buckets,
    size_without_upscaling,
    training_sizes,
)
from dreamfleet.datasets.config import DataConfig
from dreamfleet.datasets.errors import RecipeError
from dreamfleet.datasets.index.index import build_index
from dreamfleet.trainers.distributed.context import DistributedContext
from dreamfleet.trainers.recipe import build_recipe
from dreamfleet.trainers.run.build import Parts, assemble

# Results of sd-scripts 48d368f (2026-02): BucketManager(no_upscale, (res, res), min, max, 64).select_bucket(w, h)[0].
KOHYA = {
    (512, 256, 1024): {
        (512, 512): (512, 512),
        (640, 480): (576, 448),
        (1920, 1080): (640, 384),
        (1080, 1920): (384, 640),
        (1000, 1500): (384, 640),
        (3000, 1000): (832, 256),
        (400, 2000): (256, 1024),
        (576, 448): (576, 448),
        (333, 777): (320, 768),
        (4000, 300): (1024, 256),
    },
    (768, 320, 1536): {
        (1920, 1080): (1024, 576),
        (1024, 1024): (768, 768),
        (600, 900): (640, 896),
        (1216, 832): (896, 640),
        (100, 700): (320, 1536),
    },
}
KOHYA_NO_UPSCALE_512 = {
    (512, 512): (512, 512),
    (640, 480): (512, 384),
    (1920, 1080): (640, 384),
    (1080, 1920): (384, 640),
    (300, 200): (256, 192),
    (500, 700): (384, 512),
    (129, 1000): (128, 960),
    (4000, 3000): (512, 384),
    (2200, 700): (768, 256),
}


@pytest.mark.parametrize("limits", KOHYA)
def test_images_are_in_the_buckets_of_kohya(limits: tuple[int, int, int]) -> None:
    resolution, smallest, largest = limits
    sizes = bucket_sizes(resolution, smallest=smallest, largest=largest, step=64)
    assert {image: nearest_size(*image, sizes) for image in KOHYA[limits]} == KOHYA[limits]


def test_buckets_without_upscaling_are_those_of_kohya() -> None:
    found = {p: size_without_upscaling(*p, resolution=512, step=64) for p in KOHYA_NO_UPSCALE_512}
    assert found == KOHYA_NO_UPSCALE_512


@given(
    width=st.integers(1, 9000),
    height=st.integers(1, 9000),
    resolution=st.integers(4, 16).map(lambda n: n * 64),
)
def test_the_bucket_has_the_nearest_aspect_ratio(width: int, height: int, resolution: int) -> None:
    sizes = bucket_sizes(resolution, smallest=resolution // 128 * 64, largest=resolution * 2, step=64)
    chosen = nearest_size(width, height, sizes)
    assert chosen in sizes and all(side % 64 == 0 for side in chosen)
    assert chosen[0] * chosen[1] <= resolution**2
    errors = [abs(w / h - width / height) for w, h in sizes]
    assert (width, height) in sizes or abs(chosen[0] / chosen[1] - width / height) == min(errors)
    inside = size_without_upscaling(width, height, resolution=resolution, step=64)
    assert inside[0] * inside[1] <= (resolution + 64) ** 2
    assert all(
        side % 64 == 0 and side <= max(64, own) for side, own in zip(inside, (width, height), strict=True)
    )


def test_sizes_of_an_index_and_their_numbers(tmp_path: Path) -> None:
    for name, size in (("a", (640, 480)), ("b", (480, 640)), ("c", (500, 500)), ("d", (64, 48))):
        Image.new("RGB", size, (ord(name), 90, 200)).save(tmp_path / f"{name}.png")
    index = build_index(str(tmp_path))
    by_name = {Path(uri).stem: number for number, uri in enumerate(index.column("uri"))}
    data = DataConfig(instance_data_dir="x", enable_bucket=True)
    sizes = training_sizes(index.sizes(), data)
    assert [sizes[by_name[name]] for name in "abcd"] == [(576, 448), (448, 576), (512, 512), (576, 448)]
    assert [number_buckets(sizes)[by_name[name]] for name in "abcd"] == [2, 0, 1, 2]
    assert describe_buckets(sizes) == "448x576: 1, 512x512: 1, 576x448: 2"
    smaller = training_sizes(index.sizes(), data.model_copy(update={"bucket_no_upscale": True}))
    assert [smaller[by_name[name]] for name in "abcd"] == [(512, 384), (384, 512), (448, 448), (64, 64)]
    assert set(training_sizes(index.sizes(), DataConfig(instance_data_dir="x"))) == {(512, 512)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resolution": 128}, "resolution 128 .*min_bucket_reso 256"),
        ({"max_bucket_reso": 1000}, "max_bucket_reso 1000 .*bucket_reso_steps 64"),
    ],
)
def test_invalid_bucket_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(instance_data_dir="x", enable_bucket=True, **changes)
    DataConfig(instance_data_dir="x", **changes)


def make_parts(folder: Path, **changes: Any) -> Parts:
    shapes = folder / "shapes"
    images = shapes if shapes.exists() else tiny.make_shapes(shapes)
    options = {
        **tiny.SHAPES,
        "method": {"name": "native"},
        "data__instance_data_dir": str(images),
        "data__random_flip": True,
        **changes,
    }
    return assemble(build_recipe(tiny.make_recipe(folder, **options)), DistributedContext())


@pytest.mark.parametrize("how", ["cached", "decoded", "streamed"])
def test_batches_contain_one_bucket_for_every_data_source(tmp_path: Path, how: str) -> None:
    cached = make_parts(tmp_path)
    sources = {
        "cached": {},
        "decoded": {"data__cache_latents": False},
        "streamed": {"data__source": "stream"},
    }
    parts = make_parts(tmp_path, **sources[how])
    seen = set()
    for step in range(6):
        batch = parts.prepare(parts.feed.batch(step))
        shape = batch["latents"].shape
        seen.add(tuple(shape[2:]))
        assert batch["noise"].shape == shape and batch["mask"].shape == (2, 1, *shape[2:])
        # All image sources give equal images, crops, flips and loss weights.
        expected = cached.prepare(cached.feed.batch(step))
        assert torch.allclose(batch["latents"], expected["latents"], atol=1e-4)
        assert torch.equal(batch["mask"], expected["mask"])
        assert torch.isfinite(parts.method(batch).total)
    assert seen == {(8, 8), (6, 10), (10, 6)}


def test_epochs_count_every_bucket(tmp_path: Path) -> None:
    parts = make_parts(tmp_path, train__max_train_steps=None, train__num_train_epochs=2)
    assert parts.schedule.total == parts.feed.plan.steps_in(2) == 9
    often = make_parts(
        tmp_path,
        train__max_train_steps=None,
        train__num_train_epochs=5,
        train__save_every_n_epochs=2,
        train__checkpointing_steps=None,
    )
    assert [step for step in range(1, 25) if often.schedule.saves_at(step)] == [9, 18, 24]


def test_bucket_settings_that_conflict_with_the_run_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="bucket_reso_steps 10"):
        make_parts(tmp_path, data__bucket_reso_steps=10, data__min_bucket_reso=20, data__max_bucket_reso=60)
    prior = {"name": "dreambooth", "with_prior_preservation": True}
    with pytest.raises(RecipeError, match=r"enable_bucket.*prior"):
        make_parts(tmp_path, method=prior)
