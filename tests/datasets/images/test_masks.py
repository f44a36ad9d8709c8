"""Test masks: found beside images or in a mask folder, cropped like their image, normalised to mean 1."""

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

from dreamfleet.datasets.config import DataConfig
from dreamfleet.datasets.errors import DataError
from dreamfleet.datasets.images.masks import ImageView, Mask, cut_image, loss_weights
from dreamfleet.datasets.index.index import build_index
from dreamfleet.datasets.index.sources import ScanOptions
from dreamfleet.trainers.distributed.context import DistributedContext
from dreamfleet.trainers.recipe import build_recipe
from dreamfleet.trainers.run.build import assemble


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def with_alpha(alpha: np.ndarray) -> bytes:
    image = Image.new("RGB", alpha.shape[::-1], (200, 30, 30))
    image.putalpha(Image.fromarray(alpha.astype(np.uint8)))
    return png(image)


@given(
    alpha=st.lists(st.integers(0, 255), min_size=6, max_size=6),
    flip=st.booleans(),
    same=st.booleans(),
)
def test_weights_have_mean_one_and_are_aligned_with_the_image(
    alpha: list[int], flip: bool, same: bool
) -> None:
    # 3 x 2 cells of 8 x 8 pixels, one opacity each. The webui computes NaN if all opacities are equal.
    cells = np.array(alpha if not same else alpha[:1] * 6).reshape(2, 3)
    data = with_alpha(cells.repeat(8, 0).repeat(8, 1))
    cut = cut_image(
        data, ImageView(0, flip=flip, size=(24, 16)), uri="a", size=1, resampling="lanczos", weighted=True
    )
    weights = loss_weights(cut[..., 3], 8)
    assert weights.shape == (1, 2, 3) and weights.dtype == np.float32
    assert weights.mean() == pytest.approx(1.0)
    if cells.max() == cells.min():
        assert (weights == 1).all()
    else:
        shown = cells[:, ::-1] if flip else cells
        assert weights[0] == pytest.approx(shown / cells.mean(), abs=1e-5)


def test_a_mask_of_any_size_is_cropped_like_its_image() -> None:
    # The mask's left half is white. The image is wide, so a left crop contains more white than a right crop.
    image = Image.new("RGB", (64, 32), "red")
    mask = np.zeros((16, 32), np.uint8)
    mask[:, :16] = 255
    shares = []
    for x in (0.0, 0.999):
        cut = cut_image(
            png(image),
            ImageView(0, (x, 0.0)),
            uri="a",
            size=32,
            resampling="lanczos",
            weighted=True,
            mask=Mask(png(Image.fromarray(mask))),
        )
        assert cut.shape == (32, 32, 4) and (cut[..., :3] == [255, 0, 0]).all()
        shares.append(cut[..., 3].mean() / 255)
    assert shares[0] > 0.9 and shares[1] < 0.1
    # Transparent parts of a mask count as black, and a mask takes precedence over the alpha channel.
    cut = cut_image(
        with_alpha(np.full((8, 8), 255)),
        ImageView(0),
        uri="a",
        size=8,
        resampling="lanczos",
        weighted=True,
        mask=Mask(with_alpha(np.zeros((8, 8)))),
    )
    assert (cut[..., 3] == 0).all()


def test_weights_of_attention_maps_are_those_of_dreamartist() -> None:
    grey = np.array([[0, 64, 127, 191, 255]], np.uint8).repeat(8, 0).repeat(8, 1)
    cut = cut_image(
        png(Image.new("RGB", (40, 8), "red")),
        ImageView(0, size=(40, 8)),
        uri="a",
        size=1,
        resampling="lanczos",
        weighted=True,
        mask=Mask(png(Image.fromarray(grey)), is_attention=True),
    )
    weights = np.array([0, 64 / 127, 1, 3, 5])
    assert loss_weights(cut[..., 3], 8)[0, 0] == pytest.approx(weights / weights.mean(), abs=0.01)


@pytest.fixture
def masked(tmp_path: Path) -> Path:
    """Return a folder with images a and b, a mask beside a, and a mask for b in a separate mask folder."""
    folder = tmp_path / "pictures"
    for name in "ab":
        (folder / "deep").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), (ord(name), 90, 200)).save(folder / "deep" / f"{name}.png")
    Image.new("L", (40, 40), 255).save(folder / "deep" / "a.mask.png")
    (tmp_path / "masks" / "deep").mkdir(parents=True)
    Image.new("L", (40, 40), 9).save(tmp_path / "masks" / "deep" / "b.jpg")
    return tmp_path


def masks_of(index: Any) -> dict[str, str | None]:
    return {Path(row.uri).stem: row.mask and Path(row.mask).name for row in index.rows()}


def test_masks_have_priority_over_attention_maps(masked: Path) -> None:
    deep = masked / "pictures" / "deep"
    for name in ("a_att.png", "b_att.jpg", "c_att.png"):
        Image.new("RGB", (40, 40), (len(name), 60, ord(name[0]))).save(deep / name)
    index = build_index(str(masked / "pictures"))
    assert masks_of(index) == {"a": "a.mask.png", "b": "b_att.jpg", "c_att": None}
    both = build_index(str(masked / "pictures"), ScanOptions(mask_dir=str(masked / "masks")))
    assert masks_of(both) == {"a": "a.mask.png", "b": "b.jpg", "c_att": None}


def test_masks_are_found_and_not_indexed(masked: Path) -> None:
    folder = str(masked / "pictures")
    alone = build_index(folder)
    assert masks_of(alone) == {"a": "a.mask.png", "b": None}
    both = build_index(folder, ScanOptions(mask_dir=str(masked / "masks")))
    assert masks_of(both) == {"a": "a.mask.png", "b": "b.jpg"}
    before = both.content_hash
    Image.new("L", (40, 40), 10).save(masked / "masks" / "deep" / "b.jpg")
    assert (
        len(
            {
                alone.content_hash,
                before,
                build_index(folder, ScanOptions(mask_dir=str(masked / "masks"))).content_hash,
            }
        )
        == 3
    )
    # Without image a, a.mask.png is indexed as an image.
    (masked / "pictures" / "deep" / "a.png").unlink()
    assert masks_of(build_index(folder)) == {"a.mask": None, "b": None}


def test_unusable_masks_are_reported(masked: Path) -> None:
    folder = str(masked / "pictures")
    with pytest.raises(DataError, match=r"mask_dir: .*nowhere does not exist"):
        build_index(folder, ScanOptions(mask_dir=str(masked / "nowhere")))
    with pytest.raises(DataError, match=r"none of the 1 "):
        build_index(str(masked), ScanOptions(mask_dir=str(masked / "masks")))
    (masked / "other").mkdir()
    with pytest.raises(DataError, match=r"none of the 0 "):
        build_index(folder, ScanOptions(mask_dir=str(masked / "other")))
    (masked / "pictures" / "deep" / "a.mask.png").write_bytes(b"no picture")
    index = build_index(folder)
    assert masks_of(index) == {"b": None}
    assert "its mask" in index.bad[0].reason and index.bad[0].uri.endswith("a.png")
    with pytest.raises(ValueError, match=r"mask_dir.*alpha_mask"):
        DataConfig(instance_data_dir="x", mask_dir="y")


def test_a_mask_weights_the_loss_and_opaque_images_are_unchanged(tmp_path: Path) -> None:
    images = tiny.make_shapes(tmp_path / "shapes")
    tree = tiny.make_recipe(
        tmp_path, **tiny.SHAPES, data__instance_data_dir=str(images), method={"name": "native"}
    )
    parts = assemble(build_recipe(tree), DistributedContext())
    batch = parts.prepare(parts.feed.batch(0))
    lit, dark = batch["mask"].chunk(2, -1)
    assert lit.mean() > 1.9 and dark.mean() < 0.1
    plain = {**batch, "mask": torch.ones_like(batch["mask"])}
    without = {name: value for name, value in batch.items() if name != "mask"}
    with torch.no_grad():
        assert torch.equal(parts.method(plain).total, parts.method(without).total)
        assert not torch.isclose(parts.method(batch).total, parts.method(without).total, rtol=1e-3)


def test_masks_weight_the_held_out_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dreamfleet.trainers.evaluation.heldout_loss import HeldOutLoss

    images = tiny.make_shapes(tmp_path / "shapes")
    options = {**tiny.SHAPES, "data__instance_data_dir": str(images), "method": {"name": "native"}}
    losses = []
    for weighed in (True, False):
        tree = tiny.make_recipe(tmp_path, **{**options, "data__alpha_mask": weighed})
        parts, recipe = assemble(build_recipe(tree), DistributedContext()), build_recipe(tree)
        held = HeldOutLoss(build_index(images), method=parts.method, data=recipe.data, count=2)
        model, shapes = parts.method.model, set[tuple[int, ...]]()

        def draw_noise(
            keys: Any, shape: tuple[int, ...], *, draw: Any = model.draw_noise, seen: Any = shapes
        ) -> Any:
            seen.add(shape[1:])
            return draw(keys, shape)

        monkeypatch.setattr(model, "draw_noise", draw_noise)
        losses.append(held.measure(parts.engine))
        assert shapes == {(8, 8), (6, 10), (10, 6)}
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)
