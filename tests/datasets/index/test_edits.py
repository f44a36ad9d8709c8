"""Test the edits of a set: what the index of a training contains, and that the set itself is never changed."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image

from dreamfleet.datasets.buckets import training_sizes
from dreamfleet.datasets.config import DataConfig
from dreamfleet.datasets.errors import DataError, StorageError
from dreamfleet.datasets.images.crop_file import pixel_box
from dreamfleet.datasets.images.images import fit_image, open_image
from dreamfleet.datasets.images.masks import ImageView
from dreamfleet.datasets.index.edited_source import edited_uri, original_uri, split_uri
from dreamfleet.datasets.index.edits import EDITS_FOLDER, Edit, EditTable, edit_name
from dreamfleet.datasets.index.labels import find_labels
from dreamfleet.datasets.index.sets import load_sets
from dreamfleet.datasets.serve.cache import jobs_of
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.batches.vae_encoding import read_cut


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with four images, two of which have captions; 003.png is 64 x 32 with four colours."""
    tiny.make_images(tmp_path / "set", 3)
    wide = Image.new("RGB", (64, 32), "red")
    for number, colour in enumerate(("lime", "blue", "white"), 1):
        wide.paste(colour, (16 * number, 0, 64, 32))
    wide.save(tmp_path / "set" / "003.png")
    (tmp_path / "set" / "000.txt").write_text("a cat, grass")
    (tmp_path / "set" / "001.txt").write_text("a dog")
    return tmp_path / "set"


def data_for(folder: Path, **options: object) -> DataConfig:
    return DataConfig.model_validate({"instance_data_dir": str(folder), "resolution": 32, **options})


def state_of(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file() and EDITS_FOLDER not in p.parts}


def test_edits_change_the_index_and_not_the_set(folder: Path) -> None:
    before, plain = state_of(folder), load_sets(data_for(folder)).instances
    table = EditTable(str(folder))
    table.save(
        {
            "000.png": Edit(excluded=True),
            "001.png": Edit(caption="a dog, snow"),
            "002.png": Edit(caption=""),
            "003.png": Edit(crop=(0.25, 0, 0.75, 1)),
        }
    )
    found = load_sets(data_for(folder)).instances
    rows = {row.uri: row for row in found.rows()}
    assert len(rows) == 3 and str(folder / "000.png") not in rows
    assert rows[str(folder / "001.png")].caption == "a dog, snow"
    assert rows[str(folder / "002.png")].caption is None
    (cropped,) = (row for uri, row in rows.items() if uri.startswith("edited://"))
    assert original_uri(cropped.uri) == str(folder / "003.png") and (cropped.width, cropped.height) == (
        32,
        32,
    )
    assert [item.files for item in found.skipped] == [1] and "excluded" in found.skipped[0].reason
    assert found.content_hash != plain.content_hash
    assert state_of(folder) == before
    assert load_sets(data_for(folder, use_edits=False)).instances.content_hash == plain.content_hash
    table.save({name: Edit() for name in table.edits})
    assert load_sets(data_for(folder)).instances.content_hash == plain.content_hash


def test_the_crop_is_what_a_run_and_the_latent_cache_read(folder: Path) -> None:
    EditTable(str(folder)).save({"003.png": Edit(crop=(0.25, 0, 0.5, 0.5))})
    data = data_for(folder)
    index = load_sets(data).instances
    (row,) = (n for n, uri in enumerate(index.column("uri")) if uri.startswith("edited://"))
    pixels = read_cut(index, ImageView(row, None, False, (32, 32)), data)
    assert (pixels == np.array([0, 255, 0], np.uint8)).all(), "the second of the four colours alone"
    plain = load_sets(data_for(folder, use_edits=False)).instances
    keys = {job.key for job in jobs_of(index, data)} - {job.key for job in jobs_of(plain, data)}
    assert [key.sha256 for key in keys] == [index.row(row).sha256]


@pytest.mark.parametrize(
    ("focus", "box"),
    [((0.1, 0.5), (0, 0, 0.5, 1)), ((0.5, 0.5), (0.25, 0, 0.75, 1)), ((1, 0), (0.5, 0, 1, 1))],
)
def test_a_focus_point_places_the_training_size(
    focus: tuple[float, float], box: tuple[float, ...], folder: Path
) -> None:
    edit = Edit(width=64, height=32, focus=focus)
    assert edit.box(data_for(folder)) == pytest.approx(box)
    EditTable(str(folder)).save({"003.png": edit})
    index = load_sets(data_for(folder)).instances
    (uri,) = (uri for uri in index.column("uri") if uri.startswith("edited://"))
    assert split_uri(uri)[0] == pytest.approx(box)


@pytest.mark.parametrize("no_upscale", [False, True])
def test_the_focus_keeps_the_bucket_and_stays_in_the_crop(no_upscale: bool, folder: Path) -> None:
    data = data_for(folder, resolution=512, enable_bucket=True, bucket_no_upscale=no_upscale)
    for width, height in ((3000, 2000), (1000, 1777), (640, 480), (4000, 3999), (700, 2000)):
        edit = Edit(width=width, height=height, focus=(0.3, 0.9))
        box = edit.box(data)
        assert box is not None
        assert 1 in (pytest.approx(box[2] - box[0]), pytest.approx(box[3] - box[1]))
        left, top, right, bottom = pixel_box(box, (width, height))
        assert training_sizes([(right - left, bottom - top)], data) == training_sizes([(width, height)], data)
    inside = Edit(width=64, height=32, crop=(0.5, 0, 1, 1), focus=(0, 0)).box(data_for(folder))
    assert inside == pytest.approx((0.5, 0, 1, 1))


def test_masks_are_cropped_with_the_image_and_can_be_removed(folder: Path) -> None:
    Image.new("L", (64, 32), 255).save(folder / "001.mask.png")
    mask = Image.new("L", (64, 32), 0)
    mask.paste(255, (16, 0, 32, 32))
    stream = io.BytesIO()
    mask.save(stream, "PNG")
    table = EditTable(str(folder))
    table.save({"001.png": Edit(mask=""), "003.png": Edit(mask=table.add_mask(stream.getvalue()))})
    data = data_for(folder, alpha_mask=True)
    index = load_sets(data).instances
    masks = {
        Path(uri).name: mask for uri, mask in zip(index.column("uri"), index.column("mask"), strict=True)
    }
    assert masks["001.png"] is None and masks["003.png"] is not None
    table.save({"003.png": table.edits["003.png"]._replace(crop=(0.25, 0, 0.75, 1))})
    index = load_sets(data).instances
    (row,) = (n for n, uri in enumerate(index.column("uri")) if uri.startswith("edited://"))
    weights = read_cut(index, ImageView(row, None, False, (32, 32)), data)[..., 3]
    assert (weights[:, :16] == 255).all() and (weights[:, 16:] == 0).all()


def test_a_cropped_file_keeps_transparency_and_rotation(folder: Path) -> None:
    image = Image.new("RGBA", (40, 20), (200, 0, 0, 128))
    image.save(folder / "004.png")
    turned = Image.new("RGB", (40, 20), "red")
    turned.paste("blue", (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(folder / "005.jpg", exif=exif, quality=100)
    table = EditTable(str(folder))
    table.save({name: Edit(crop=(0, 0, 1, 0.5)) for name in ("004.png", "005.jpg")})
    index = load_sets(data_for(folder)).instances
    sizes = {original_uri(row.uri): (row.width, row.height) for row in index.rows()}
    assert sizes[str(folder / "004.png")] == (40, 10) and sizes[str(folder / "005.jpg")] == (20, 20)
    data = data_for(folder, alpha_mask=True)
    for name in ("004.png", "005.jpg"):
        (row,) = (n for n, uri in enumerate(index.column("uri")) if uri.endswith(f"//{folder}/{name}"[1:]))
        pixels = read_cut(index, ImageView(row, None, False, (32, 32)), data)
        whole = fit_image(
            open_image((folder / name).read_bytes(), uri=name).crop((0, 0, *sizes[str(folder / name)])), 32
        )
        assert np.abs(pixels[..., :3].astype(int) - whole).max() <= 1
        assert (pixels[..., 3] == (128 if name == "004.png" else 255)).all()


def test_labels_belong_to_cropped_images_too(folder: Path) -> None:
    (folder / "dataset.json").write_text('{"003.png": 1, "001.png": 0}')
    EditTable(str(folder)).save({"003.png": Edit(crop=(0, 0, 0.5, 1))})
    index = load_sets(data_for(folder)).instances
    assert sorted(find_labels(index, [str(folder)]).values()) == [0, 1]


def test_names_do_not_depend_on_the_place_of_the_set(folder: Path, tmp_path: Path) -> None:
    EditTable(str(folder)).save({"000.png": Edit(excluded=True)})
    moved = folder.rename(tmp_path / "elsewhere")
    assert len(load_sets(data_for(moved)).instances) == 3
    assert edit_name("tar:///data/s-0001.tar#10-20", "/data/s-{0000..0009}.tar") == "tar://s-0001.tar#10-20"
    assert edit_name("s3://b/p/a/e\u0301.png", "s3://b/p") == "a/\u00e9.png"
    assert edited_uri("s3://b/a.png", (0, 0.1, 1, 0.5)) == "edited://0,0.1,1,0.5/s3://b/a.png"


def test_tables_that_cannot_be_used_are_refused(folder: Path) -> None:
    table, other = EditTable(str(folder)), EditTable(str(folder))
    table.save({"000.png": Edit(excluded=True)})
    with pytest.raises(StorageError, match="another program"):
        other.save({"001.png": Edit(excluded=True)})
    file = Storage(folder).child(EDITS_FOLDER)
    file.write_bytes("edits.parquet", b"PAR1 broken")
    with pytest.raises(DataError, match="broken"):
        load_sets(data_for(folder))
    with pytest.raises(DataError, match="no folder"):
        EditTable('list://["/a.png"]').save({"a": Edit(excluded=True)})
    for wrong in ((0, 0, 0, 1), (0, 0, 2, 1), (0, 0, 1)):
        with pytest.raises(DataError, match="crop"):
            split_uri(edited_uri("/a.png", wrong))  # type: ignore[arg-type]
