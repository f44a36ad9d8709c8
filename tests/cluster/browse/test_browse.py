"""Test `data browse`: filters, edits with undo, what training then uses, write-back, and the page in a browser."""

from __future__ import annotations

import base64
import io
import json
import shutil
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
from chromium import CTRL, Tab, chromium
from PIL import Image
from servers import S3Server, s3_server  # noqa: F401  (a fixture)
from typer.testing import CliRunner

from dreamfleet.cluster.browse.image_table import load_table
from dreamfleet.cluster.browse.page import MAX_REQUEST_BYTES, BrowsePage
from dreamfleet.cluster.cli import program
from dreamfleet.cluster.labeling.labels import Labelling
from dreamfleet.cluster.labeling.server import PageServer
from dreamfleet.datasets.errors import DataError, UserError
from dreamfleet.datasets.images.images import fit_image
from dreamfleet.datasets.index.edits import EDITS_FOLDER, EditTable
from dreamfleet.datasets.index.sets import load_sets
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.recipe import Recipe, build_recipe


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with six images: a copy, a caption each but one, a wide one, and a broken file."""
    tiny.make_images(tmp_path / "set", 4)
    folder = tmp_path / "set"
    (folder / "copy.png").write_bytes((folder / "000.png").read_bytes())
    wide = Image.new("RGB", (128, 64), "red")
    wide.paste("blue", (64, 0, 128, 64))
    wide.save(folder / "wide.png")
    (folder / "broken.png").write_bytes(b"not an image")
    for name, caption in (
        ("000", "a cat, grass"),
        ("001", "cat, snow"),
        ("002", "dog, grass"),
        ("wide", "red, blue"),
        ("copy", "cat"),
    ):
        (folder / f"{name}.txt").write_text(caption)
    return folder


def make_recipe(folder: Path, **changes: Any) -> Recipe:
    data = {"instance_data_dir": str(folder), "instance_prompt": "a thing", "resolution": 32, **changes}
    tree = {"data": data, "method": {"name": "native"}, "output_dir": "-", "train": {"train_batch_size": 2}}
    return build_recipe(tree, source="test", folder=".")


def make_page(folder: Path, **changes: Any) -> BrowsePage:
    recipe = make_recipe(folder, **changes)
    return BrowsePage(recipe, lambda: load_table(recipe.data), title="set", modes={})


def names(page: BrowsePage, **filters: Any) -> list[str]:
    found = page.answer({"action": "page", "filter": filters, "start": 0, "count": 50, "again": True})
    assert found["total"] == len(found["rows"])
    return [row["name"] for row in found["rows"]]


def row_of(page: BrowsePage, name: str) -> int:
    return next(row for row in range(len(page.table)) if page.table.name(row) == name)


def edit(page: BrowsePage, name: str, **wanted: Any) -> dict[str, Any]:
    return page.answer({"action": "edit", "rows": [row_of(page, name)], "do": wanted})


# ---- filters -----------------------------------------------------------------------------------------------


def test_filters_select_on_edited_values(folder: Path) -> None:
    page = make_page(folder)
    assert names(page) == ["000.png", "001.png", "002.png", "003.png", "copy.png", "wide.png"]
    assert names(page, tag="cat") == ["001.png", "copy.png"], "a whole tag, not a part of one"
    assert names(page, text="CAT") == ["000.png", "001.png", "copy.png"]
    assert names(page, state="uncaptioned") == ["003.png"]
    assert names(page, state="copies") == ["000.png", "copy.png"]
    assert names(page, least=60) == ["wide.png"] and len(names(page, most=60)) == 5
    edit(page, "003.png", caption="cat")
    edit(page, "001.png", excluded=True)
    assert names(page, tag="cat", state="used") == ["003.png", "copy.png"]
    assert names(page, state="excluded") == ["001.png"] and names(page, state="edited") == [
        "001.png",
        "003.png",
    ]
    facets = page.answer({"action": "facets"})
    assert dict(facets["tags"])["cat"] == 3 and facets["states"]["errors"] == 1
    assert page.answer({"action": "errors", "start": 0})["errors"][0][0].endswith("broken.png")
    with pytest.raises(UserError, match="filter"):
        names(page, colour="red")


def test_images_in_files_are_shown_by_their_names_there(folder: Path, tmp_path: Path) -> None:
    for number, files in ((0, ("000.png", "001.png")), (1, ("002.png",))):
        with tarfile.open(tmp_path / f"s-{number:04}.tar", "w") as tar:
            for file in files:
                tar.add(folder / file, file)
    assert names(make_page(tmp_path / "s-0000.tar")) == ["000.png", "001.png"]
    shards = names(make_page(tmp_path / "s-{0000..0001}.tar"))
    assert shards == ["s-0000.tar: 000.png", "s-0000.tar: 001.png", "s-0001.tar: 002.png"]
    images = [(folder / file).read_bytes() for file in ("000.png", "001.png")]
    pq.write_table(pa.table({"image": images}), tmp_path / "cats.parquet")
    assert names(make_page(tmp_path / "cats.parquet")) == ["row 0", "row 1"]


def test_near_duplicates_are_shown_in_groups(folder: Path) -> None:
    rng = np.random.default_rng(5)
    picture = Image.fromarray(rng.integers(0, 255, (6, 6, 3), dtype=np.uint8)).resize(
        (256, 256), Image.Resampling.BICUBIC
    )
    picture.save(folder / "near-a.png")
    picture.resize((200, 200)).save(folder / "near-b.jpg", quality=90)
    recipe = make_recipe(folder)
    page = BrowsePage(recipe, lambda: load_table(recipe.data, near=True), title="set", modes={})
    found = names(page, state="near")
    assert {"near-a.png", "near-b.jpg", "000.png", "copy.png"} <= set(found)
    groups = [int(page.table.near[row_of(page, name)]) for name in found]
    assert groups == sorted(groups) and len(set(groups)) < len(groups)
    assert names(make_page(folder), state="near") == []


def test_buckets_follow_a_crop(folder: Path) -> None:
    page = make_page(folder, enable_bucket=True, min_bucket_reso=16, max_bucket_reso=64, bucket_reso_steps=8)
    (size,) = [
        row["size"]
        for row in page.answer({"action": "page", "filter": {"text": "wide"}, "start": 0, "count": 9})["rows"]
    ]
    assert size[0] > size[1] and names(page, bucket=f"{size[0]}x{size[1]}") == ["wide.png"]
    found = edit(page, "wide.png", crop=[0, 0, 0.5, 1])
    assert found["rows"][0]["size"] == [32, 32] and names(page, bucket=f"{size[0]}x{size[1]}") == []


# ---- edits -------------------------------------------------------------------------------------------------


def test_edits_of_a_selection_are_stored_undone_and_repeated(folder: Path) -> None:
    page = make_page(folder)
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    wanted = {"action": "edit", "filter": {"tag": "grass"}, "without": [row_of(page, "002.png")]}
    assert page.answer({**wanted, "do": {"add": "sun, grass"}})["changed"] == 1
    assert page.table.captions[row_of(page, "000.png")] == "a cat, grass, sun"
    rows = [row_of(page, name) for name in ("000.png", "wide.png")]
    page.answer({"action": "edit", "rows": rows, "do": {"replace": ["grass", "lawn"]}})
    page.answer({"action": "edit", "rows": rows, "do": {"excluded": True}})
    assert EditTable(str(folder)).edits["000.png"].caption == "a cat, lawn, sun"
    again = make_page(folder)
    assert again.table.excluded.sum() == 2 and again.table.captions[rows[0]] == "a cat, lawn, sun"
    for _ in range(3):
        page.answer({"action": "undo"})
    assert EditTable(str(folder)).edits == {} and not page.answer({"action": "undo"})["can_undo"]
    page.answer({"action": "redo"})
    assert EditTable(str(folder)).edits["000.png"].caption == "a cat, grass, sun"
    edit(page, "000.png", caption="a cat, grass")
    assert EditTable(str(folder)).edits == {}, "the caption of the set is no edit"
    assert before == {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_masks_are_painted_cleared_and_used(folder: Path) -> None:
    page = make_page(folder, alpha_mask=True)
    grey = np.full((48, 96), 255, np.uint8)
    grey[:, :48] = 0
    stream = io.BytesIO()
    Image.fromarray(grey).save(stream, "PNG")
    edit(page, "wide.png", mask=base64.b64encode(stream.getvalue()).decode())
    row = row_of(page, "wide.png")
    shown = np.asarray(Image.open(io.BytesIO(page.find_image(f"weights/{row}/1")[0])))  # type: ignore[index]
    assert shown[:, :12].max() <= 2 and shown[:, 20:].min() >= 253
    index = load_sets(make_recipe(folder, alpha_mask=True).data).instances
    assert [uri for uri, mask in zip(index.column("uri"), index.column("mask"), strict=True) if mask] == [
        str(folder / "wide.png")
    ]
    edit(page, "wide.png", mask="")
    assert not page.table.masked.any()
    with pytest.raises(DataError):
        edit(page, "wide.png", mask=base64.b64encode(b"text").decode())


@pytest.mark.parametrize(
    ("wanted", "reason"),
    [
        ({"crop": [0, 0, 2, 1]}, "crop"),
        ({"focus": [0.5]}, "focus"),
        ({"caption": 5}, "text"),
        ({"add": " , "}, "tag"),
        ({"dance": 1}, "no such edit"),
        ({"excluded": "yes"}, "true or false"),
    ],
)
def test_invalid_edits_change_nothing(wanted: dict[str, Any], reason: str, folder: Path) -> None:
    page = make_page(folder)
    with pytest.raises(UserError, match=reason):
        edit(page, "000.png", **wanted)
    with pytest.raises(UserError, match="number"):
        page.answer({"action": "edit", "rows": [99], "do": {"excluded": True}})
    assert not (folder / EDITS_FOLDER).exists()


# ---- training ----------------------------------------------------------------------------------------------


def test_steps_are_those_of_the_trainer_with_all_edits(folder: Path) -> None:
    page = make_page(folder, random_flip=True, shuffle_tags=True)
    edit(page, "000.png", excluded=True)
    edit(page, "001.png", caption="edited, caption")
    edit(page, "wide.png", focus=[1, 0.5])
    steps = [page.answer({"action": "step", "number": number}) for number in range(1, 21)]
    images = [(step, k, image) for step in steps for k, image in enumerate(step["images"])]
    assert len(images) == 40 and {one["name"] for _, _, one in images} == {
        "001.png",
        "002.png",
        "003.png",
        "copy.png",
        "wide.png",
    }
    captions = {
        name: {one["caption"] for _, _, one in images if one["name"] == name}
        for name in ("001.png", "003.png")
    }
    assert captions == {"001.png": {"edited, caption", "caption, edited"}, "003.png": {"a thing"}}
    assert {one["mirrored"] for _, _, one in images} == {False, True}
    step, k, one = next(found for found in images if found[2]["name"] == "wide.png")
    pixels = np.asarray(Image.open(io.BytesIO(page.find_image(f"step/{step['step']}/{k}/0")[0])))  # type: ignore[index]
    assert (pixels == [0, 0, 255]).all(), "the focus point is in the blue half"
    step, k, one = next(found for found in images if found[2]["name"] == "002.png")
    pixels = np.asarray(Image.open(io.BytesIO(page.find_image(f"step/{step['step']}/{k}/0")[0])))  # type: ignore[index]
    with Image.open(folder / "002.png") as image:
        assert (pixels == fit_image(image.convert("RGB"), 32, flip=one["mirrored"])).all()
    edit(page, "wide.png", excluded=True)
    later = [page.answer({"action": "step", "number": number}) for number in range(1, 9)]
    assert "wide.png" not in {one["name"] for step in later for one in step["images"]}


def test_write_back_writes_sidecars_once(folder: Path) -> None:
    page = make_page(folder, alpha_mask=True)
    stream = io.BytesIO()
    Image.new("L", (32, 32), 0).save(stream, "PNG")
    edit(page, "000.png", caption="new caption")
    edit(page, "003.png", mask=base64.b64encode(stream.getvalue()).decode())
    edit(page, "wide.png", crop=[0, 0, 0.5, 1])
    result = CliRunner().invoke(program.app, ["data", "browse", str(folder), "--write-back", "--json"])
    assert result.exit_code == 0, result.output
    written = json.loads(result.stdout)
    assert (written["captions"], written["masks"], written["kept"]) == (1, 1, 1)
    assert (folder / "000.txt").read_text() == "new caption\n" and (folder / "003.png.mask.png").exists()
    assert [path.read_text() for path in folder.rglob(".tags-before-*/000.txt")] == ["a cat, grass"]
    after = make_page(folder, alpha_mask=True).table
    assert len(after) == 6 and after.captions[0] == "new caption" and len(after.edits) == 1


@pytest.mark.s3
def test_a_set_in_a_bucket_is_edited_in_place(
    s3_server: S3Server,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    s3_server.set_environment(monkeypatch)
    address = f"{s3_server.new_folder()}/set"
    Storage(address).upload(tiny.make_images(tmp_path / "set", 3, captions=True))
    recipe = make_recipe(Path(tmp_path), instance_data_dir=address, cache_dir=str(tmp_path / "cache"))
    page = BrowsePage(recipe, lambda: load_table(recipe.data), title="set", modes={})
    edit(page, "000.png", excluded=True)
    edit(page, "001.png", crop=[0, 0, 0.5, 0.5])
    rows = load_sets(recipe.data).instances.rows()
    assert sorted(row.width for row in rows) == [24, 48] and any("edited://" in row.uri for row in rows)
    assert page.find_image("thumb/1/0") is not None
    page.answer({"action": "undo"})
    assert list(EditTable(address).edits) == ["000.png"]
    assert len(Storage(address).list("", True)) == 7, "three images, their captions, and the table of edits"


# ---- the page ----------------------------------------------------------------------------------------------


@pytest.fixture
def address(folder: Path) -> Iterator[str]:
    label = Labelling(str(folder), str(folder / "dataset.json"), ["other", "good"], back=True)
    recipe = make_recipe(folder, alpha_mask=True)
    page = BrowsePage(recipe, lambda: load_table(recipe.data), title="set", modes={"label": "Label"})
    server = PageServer(page, modes={"label": label}, max_request_bytes=MAX_REQUEST_BYTES)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server.url
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_a_person_edits_with_the_keyboard_alone(address: str, folder: Path, tmp_path: Path) -> None:
    def stored(name: str) -> Any:
        return EditTable(str(folder)).edits.get(name)

    with chromium(tmp_path / "browser") as tab:
        tab.open(address)
        tab.wait("document.body.dataset.ready && cards[0].querySelector('img').naturalWidth")
        tab.press("x")
        tab.wait("at('status').textContent.startsWith('1 image')")
        assert stored("000.png").excluded
        for key in ("ArrowRight", " ", "ArrowRight", " ", "t"):
            tab.press(key)
        tab.wait("at('ask').open")
        tab.type("evening")
        tab.press("Enter")
        tab.wait("at('status').textContent.startsWith('2 images')")
        assert stored("001.png").caption == "cat, snow, evening" and stored("002.png").caption.endswith(
            "evening"
        )
        tab.press("u")
        tab.wait("at('status').textContent.startsWith('Undone')")
        assert stored("001.png") is None
        tab.press("Escape")
        tab.press("End")
        tab.press("Enter")
        tab.wait("at('editor').open && current.name === 'wide.png' && at('paint').width === 128")
        edit_by_keys(tab)
        found = stored("wide.png")
        assert (
            found.crop is not None
            and found.crop[2] - found.crop[0] < 0.5
            and found.mask
            and found.focus[0] > 0.5
        )
        tab.press("Escape")
        tab.press("a", modifiers=CTRL)
        assert tab.run("at('selected').textContent") == "6 selected"
        for width, dark in ((1400, False), (390, False), (390, True)):
            tab.open(address, width=width, height=844, dark=dark)
            tab.wait("document.body.dataset.ready")
            assert tab.run("document.documentElement.scrollWidth") <= width
        tab.open(address + "label/")
        tab.wait("at('name').textContent === '000.png' && at('image').naturalWidth")
        tab.press("1")
        tab.wait("at('name').textContent === '001.png'")
        assert json.loads((folder / "dataset.json").read_text()) == {"000.png": 1}
        assert [error for error in tab.errors if "favicon" not in error] == []


def edit_by_keys(tab: Tab) -> None:
    """Crop, set the focus point and paint the mask of the open image with keys, and wait until all is stored."""
    tab.run("at('stage').focus()")
    for key in ("-", "-", "ArrowRight"):
        tab.press(key)
    tab.wait("current.crop !== null")
    tab.run("document.querySelector('[name=tool][value=focus]').click(); at('stage').focus()")
    tab.press("ArrowRight")
    tab.wait("current.focus !== null")
    tab.run("document.querySelector('[name=tool][value=mask]').click(); at('stage').focus()")
    tab.press(" ")
    tab.wait("current.own_mask")
