"""Buckets and masks: pictures go where kohya's sd-scripts puts them, and weights lie where their picture lies."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dreamfleet.datasets.buckets import (
    bucket_sizes,
    nearest_size,
    number_buckets,
    picture_sizes,
    size_without_upscaling,
    tell_buckets,
)
from dreamfleet.datasets.config import DataConfig
from dreamfleet.datasets.errors import DataError, RecipeError
from dreamfleet.datasets.index import build_index
from dreamfleet.datasets.masks import PictureDraw, cut_picture, loss_weights
from dreamfleet.trainers.assemble import Parts, Place, assemble
from dreamfleet.trainers.recipe import build_recipe

# What sd-scripts 48d368f (2026-02) answers: BucketManager(no_upscale, (res, res), min, max, 64).select_bucket(w, h)[0].
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
def test_pictures_go_to_kohyas_buckets(limits: tuple[int, int, int]) -> None:
    resolution, smallest, largest = limits
    sizes = bucket_sizes(resolution, smallest=smallest, largest=largest, step=64)
    assert {picture: nearest_size(*picture, sizes) for picture in KOHYA[limits]} == KOHYA[limits]


def test_without_upscaling_they_go_to_kohyas_buckets_too() -> None:
    found = {p: size_without_upscaling(*p, resolution=512, step=64) for p in KOHYA_NO_UPSCALE_512}
    assert found == KOHYA_NO_UPSCALE_512


@given(
    width=st.integers(1, 9000),
    height=st.integers(1, 9000),
    resolution=st.integers(4, 16).map(lambda n: n * 64),
)
def test_every_picture_has_a_bucket_of_its_shape(width: int, height: int, resolution: int) -> None:
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
        Image.new("RGB", size, name_colour(name)).save(tmp_path / f"{name}.png")
    index = build_index(str(tmp_path))
    by_name = {Path(uri).stem: number for number, uri in enumerate(index.column("uri"))}
    data = DataConfig(instance_data_dir="x", enable_bucket=True)
    sizes = picture_sizes(index, data)
    assert [sizes[by_name[name]] for name in "abcd"] == [(576, 448), (448, 576), (512, 512), (576, 448)]
    assert [number_buckets(sizes)[by_name[name]] for name in "abcd"] == [2, 0, 1, 2]
    assert tell_buckets(sizes) == "448x576: 1, 512x512: 1, 576x448: 2"
    smaller = picture_sizes(index, data.model_copy(update={"bucket_no_upscale": True}))
    assert [smaller[by_name[name]] for name in "abcd"] == [(512, 384), (384, 512), (448, 448), (64, 64)]
    assert set(picture_sizes(index, DataConfig(instance_data_dir="x"))) == {(512, 512)}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"resolution": 128}, "resolution 128 is not between min_bucket_reso 256"),
        ({"max_bucket_reso": 1000}, "max_bucket_reso 1000 is not a multiple of bucket_reso_steps 64"),
    ],
)
def test_buckets_that_cannot_be_are_told(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        DataConfig(instance_data_dir="x", enable_bucket=True, **changes)
    DataConfig(instance_data_dir="x", **changes)


# ---- masks ---------------------------------------------------------------------------------------------


def name_colour(name: str) -> tuple[int, int, int]:
    return (ord(name[0]) * 2 % 256, 90, 200)


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def with_alpha(alpha: np.ndarray) -> bytes:
    picture = Image.new("RGB", alpha.shape[::-1], (200, 30, 30))
    picture.putalpha(Image.fromarray(alpha.astype(np.uint8)))
    return png(picture)


@given(
    alpha=st.lists(st.integers(0, 255), min_size=6, max_size=6),
    flip=st.booleans(),
    same=st.booleans(),
)
def test_weights_have_mean_one_and_lie_where_the_picture_lies(
    alpha: list[int], flip: bool, same: bool
) -> None:
    # 3 x 2 cells of 8 pixels, an opacity each; the webui gives NaN where all are the same.
    cells = np.array(alpha if not same else alpha[:1] * 6).reshape(2, 3)
    data = with_alpha(cells.repeat(8, 0).repeat(8, 1))
    cut = cut_picture(data, PictureDraw(0, flip=flip, size=(24, 16)), uri="a", size=1, weighted=True)
    weights = loss_weights(cut[..., 3], 8)
    assert weights.shape == (1, 2, 3) and weights.dtype == np.float32
    assert weights.mean() == pytest.approx(1.0)
    if cells.max() == cells.min():
        assert (weights == 1).all()
    else:
        shown = cells[:, ::-1] if flip else cells
        assert weights[0] == pytest.approx(shown / cells.mean(), abs=1e-5)


def test_a_mask_is_cut_like_its_picture_whatever_its_size() -> None:
    # Left half white; the picture is wide, so that a crop at the left sees more of it than one at the right.
    picture = Image.new("RGB", (64, 32), "red")
    mask = np.zeros((16, 32), np.uint8)
    mask[:, :16] = 255
    shares = []
    for x in (0.0, 0.999):
        cut = cut_picture(
            png(picture),
            PictureDraw(0, (x, 0.0)),
            uri="a",
            size=32,
            weighted=True,
            mask=png(Image.fromarray(mask)),
        )
        assert cut.shape == (32, 32, 4) and (cut[..., :3] == [255, 0, 0]).all()
        shares.append(cut[..., 3].mean() / 255)
    assert shares[0] > 0.9 and shares[1] < 0.1
    # A mask's transparent parts are black, and a mask goes before the picture's own alpha.
    cut = cut_picture(
        with_alpha(np.full((8, 8), 255)),
        PictureDraw(0),
        uri="a",
        size=8,
        weighted=True,
        mask=with_alpha(np.zeros((8, 8))),
    )
    assert (cut[..., 3] == 0).all()


@pytest.fixture
def masked(tmp_path: Path) -> Path:
    """Pictures a and b, a mask beside a and one for b in a folder of masks."""
    folder = tmp_path / "pictures"
    for name in "ab":
        (folder / "deep").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), name_colour(name)).save(folder / "deep" / f"{name}.png")
    Image.new("L", (40, 40), 255).save(folder / "deep" / "a.mask.png")
    (tmp_path / "masks" / "deep").mkdir(parents=True)
    Image.new("L", (40, 40), 9).save(tmp_path / "masks" / "deep" / "b.jpg")
    return tmp_path


def masks_of(index: Any) -> dict[str, str | None]:
    return {Path(row.uri).stem: row.mask and Path(row.mask).name for row in index.rows()}


def test_masks_are_found_and_are_no_pictures(masked: Path) -> None:
    folder = str(masked / "pictures")
    alone = build_index(folder)
    assert masks_of(alone) == {"a": "a.mask.png", "b": None}
    both = build_index(folder, mask_dir=str(masked / "masks"))
    assert masks_of(both) == {"a": "a.mask.png", "b": "b.jpg"}
    before = both.content_hash
    Image.new("L", (40, 40), 10).save(masked / "masks" / "deep" / "b.jpg")
    assert (
        len({alone.content_hash, before, build_index(folder, mask_dir=str(masked / "masks")).content_hash})
        == 3
    )
    # Without its picture, a file of that name is a picture.
    (masked / "pictures" / "deep" / "a.png").unlink()
    assert masks_of(build_index(folder)) == {"a.mask": None, "b": None}


def test_masks_that_cannot_be_used_are_told(masked: Path) -> None:
    folder = str(masked / "pictures")
    with pytest.raises(DataError, match=r"mask_dir: folder .*nowhere does not exist"):
        build_index(folder, mask_dir=str(masked / "nowhere"))
    with pytest.raises(DataError, match="lies inside the folder of pictures"):
        build_index(str(masked), mask_dir=str(masked / "masks"))
    (masked / "other").mkdir()
    with pytest.raises(DataError, match=r"none of the 0 pictures in .* is called as a training picture"):
        build_index(folder, mask_dir=str(masked / "other"))
    (masked / "pictures" / "deep" / "a.mask.png").write_bytes(b"no picture")
    index = build_index(folder)
    assert masks_of(index) == {"b": None}
    assert "its mask" in index.bad[0].reason and index.bad[0].uri.endswith("a.png")
    with pytest.raises(ValueError, match="mask_dir without alpha_mask"):
        DataConfig(instance_data_dir="x", mask_dir="y")


# ---- a run ---------------------------------------------------------------------------------------------


def make_shapes(folder: Path) -> Path:
    """Three pictures each of three shapes, with a mask of the left half for those called m."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number, (width, height) in enumerate([(48, 48), (72, 40), (40, 72)] * 3):
        small = Image.fromarray(rng.integers(0, 255, (4, 4, 3), dtype=np.uint8))
        picture = small.resize((width, height), Image.Resampling.BICUBIC)
        alpha = Image.new("L", picture.size, 255)
        alpha.paste(0, (width // 2, 0, width, height))
        picture.putalpha(alpha)
        picture.save(folder / f"{number}.png")
    return folder


BUCKETS = {
    "data__enable_bucket": True,
    "data__min_bucket_reso": 16,
    "data__max_bucket_reso": 64,
    "data__bucket_reso_steps": 8,
    "data__alpha_mask": True,
    "data__random_flip": True,
    "method": {"name": "native"},
}


def make_parts(folder: Path, **changes: Any) -> Parts:
    pictures = folder / "shapes"
    options = {"data__instance_data_dir": str(pictures if pictures.exists() else make_shapes(pictures))}
    return assemble(build_recipe(tiny.make_recipe(folder, **{**BUCKETS, **options, **changes})), Place())


@pytest.mark.parametrize("how", ["cached", "decoded", "streamed"])
def test_batches_of_every_source_are_of_one_bucket(tmp_path: Path, how: str) -> None:
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
        # Whatever the source: the same pictures, cut, mirrored and weighed in the same way.
        expected = cached.prepare(cached.feed.batch(step))
        assert torch.allclose(batch["latents"], expected["latents"], atol=1e-4)
        assert torch.equal(batch["mask"], expected["mask"])
        assert torch.isfinite(parts.method(batch).total)
    assert seen == {(8, 8), (6, 10), (10, 6)}


def test_a_mask_weighs_the_loss_and_an_opaque_picture_counts_as_ever(tmp_path: Path) -> None:
    parts = make_parts(tmp_path, train__train_batch_size=1)
    batch = parts.prepare(parts.feed.batch(0))
    mask = batch["mask"][0, 0]
    mirrored = bool(mask[0, 0] < mask[0, -1])
    lit, dark = (mask.flip(-1) if mirrored else mask).chunk(2, -1)
    assert lit.mean() > 1.9 and dark.mean() < 0.1
    plain = {**batch, "mask": torch.ones_like(batch["mask"])}
    without = {name: value for name, value in batch.items() if name != "mask"}
    with torch.no_grad():
        assert torch.equal(parts.method(plain).total, parts.method(without).total)
        assert not torch.isclose(parts.method(batch).total, parts.method(without).total, rtol=1e-3)


def test_epochs_count_every_bucket(tmp_path: Path) -> None:
    parts = make_parts(tmp_path, train__max_train_steps=None, train__num_train_epochs=2)
    assert parts.schedule.total == parts.feed.plan.steps_in(2) == 9


def test_buckets_that_do_not_suit_the_run_are_told(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="bucket_reso_steps 10 does not suit"):
        make_parts(tmp_path, data__bucket_reso_steps=10, data__min_bucket_reso=20, data__max_bucket_reso=60)
    prior = {"name": "dreambooth", "with_prior_preservation": True}
    with pytest.raises(RecipeError, match="enable_bucket does not go with prior preservation"):
        make_parts(tmp_path, method=prior)
