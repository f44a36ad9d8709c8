"""Test `data prepare`: crops contain the subject, captions and masks are copied, no file is overwritten."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from servers import S3Server, s3_server  # noqa: F401 - a fixture
from typer.testing import CliRunner

from dreamfleet.cluster.cli import program
from dreamfleet.datasets.errors import DataError
from dreamfleet.datasets.images.crops import Cutting, auto_size, draw_cut, plan_cuts
from dreamfleet.datasets.images.smart_crop import place_box
from dreamfleet.datasets.processing.runner import Workers
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.datasets.tools.prepare import MANIFEST, prepare
from dreamfleet.datasets.tools.prepare_options import Preparing, name_of


def run(*words: Any) -> Any:
    return CliRunner().invoke(program.app, [str(word) for word in words])


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def scene(left: int, top: int, size: tuple[int, int], side: int = 40) -> Image.Image:
    """Return a plain image with a detailed, saturated square; ``size`` is (width, height) in pixels."""
    made = np.full((size[1], size[0], 3), 120, dtype=np.uint8)
    checks = (np.add.outer(np.arange(side) // 4, np.arange(side) // 4) % 2)[:, :, None]
    made[top : top + side, left : left + side] = np.where(checks, (230, 40, 30), (250, 200, 20))
    return Image.fromarray(made)


@pytest.mark.parametrize("focus", ["smart", "focal"])
@pytest.mark.parametrize("place", [4, 90, 180, 256])
@pytest.mark.parametrize("upright", [False, True])
def test_the_subject_is_inside_the_crop(focus: str, place: int, upright: bool) -> None:
    size, corner = ((100, 300), (30, place)) if upright else ((300, 100), (place, 30))
    left, top = place_box(scene(*corner, size), (100, 100), focus)
    start = top if upright else left
    assert start - 1 <= place and place + 40 <= start + 101
    assert (left if upright else top) == 0


@pytest.mark.parametrize("focus", ["center", "smart", "focal"])
def test_an_image_of_one_colour_is_cropped_in_the_centre(focus: str) -> None:
    assert place_box(Image.new("RGB", (300, 100), "grey"), (100, 100), focus) == (100, 0)


def test_skin_is_more_salient_than_equal_detail() -> None:
    image = np.full((100, 300, 3), 128, dtype=np.uint8)
    dots = (np.random.default_rng(0).random((40, 40, 1)) - 0.5) * 60
    image[30:70, 10:50] = np.clip(np.array((128, 128, 128)) + dots, 0, 255)
    image[30:70, 250:290] = np.clip(np.array((198, 145, 112)) + dots, 0, 255)
    assert place_box(Image.fromarray(image), (100, 100), "smart")[0] > 150


@pytest.mark.parametrize("mode", ["crop", "smart", "focal", "pad"])
def test_modes_return_the_requested_size(mode: str) -> None:
    image = scene(10, 10, (333, 101))
    (cut,) = plan_cuts(image, Cutting((96, 64), mode, fill="edge"))
    assert draw_cut(image, cut, "edge").size == (96, 64)
    covers = cut.box[2] - cut.box[0] < 333
    assert covers == (mode != "pad")


def test_fit_buckets_and_auto_choose_the_size() -> None:
    wide = Image.new("RGB", (1000, 500))
    assert plan_cuts(wide, Cutting((512, 512), "fit"))[0].canvas == (512, 256)
    assert plan_cuts(wide, Cutting((512, 512), "buckets"))[0].canvas == (704, 320)
    # The webui's rule at 512: sides from 384 to 768, area at most 640 x 640.
    assert auto_size(1000, 1000, 512) == (640, 640)
    assert auto_size(1500, 1000, 512) == (768, 512)
    assert auto_size(4000, 1000, 512) is None
    assert plan_cuts(Image.new("RGB", (400, 100)), Cutting((512, 512), "auto")) == []


def test_long_images_are_split_evenly_with_an_overlap() -> None:
    how = Cutting((100, 100), split=True)
    cuts = plan_cuts(Image.new("RGB", (300, 100)), how)
    assert [round(cut.box[0]) for cut in cuts] == [0, 67, 133, 200]
    assert len(plan_cuts(Image.new("RGB", (190, 100)), how)) == 1  # a crop keeps over half of the image


@pytest.mark.parametrize(
    ("fill", "left", "right"),
    [("#102030", (16, 32, 48), (16, 32, 48)), ("edge", (255, 0, 0), (0, 0, 255)), ("blur", None, None)],
)
def test_bars_are_filled(fill: str, left: Any, right: Any) -> None:
    tall = Image.new("RGB", (40, 80), "red")
    tall.paste("blue", (20, 0, 40, 80))
    how = Cutting((80, 80), "pad", fill=fill)
    made = draw_cut(tall, plan_cuts(tall, how)[0], fill)
    assert made.getpixel((40 - 10, 40)) == (255, 0, 0)
    if left is not None:
        assert made.getpixel((3, 40)) == left and made.getpixel((76, 40)) == right
    else:
        assert made.getpixel((3, 40))[0] > 200 and made.getpixel((76, 40))[2] > 200


def write_set(folder: Path) -> Path:
    (folder / "10_cat").mkdir(parents=True)
    scene(5, 30, (300, 100)).save(folder / "10_cat" / "a.png")
    (folder / "10_cat" / "a.txt").write_text("a cat, red")
    mask = Image.new("L", (300, 100), 0)
    mask.paste(255, (0, 0, 50, 100))
    mask.save(folder / "10_cat" / "a.mask.png")
    clear = scene(30, 200, (100, 300))
    clear.putalpha(Image.linear_gradient("L").resize(clear.size))
    clear.save(folder / "b.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    scene(75, 10, (120, 60)).save(folder / "c.jpg", exif=exif)
    (folder / "d.png").write_bytes(b"no picture")
    (folder / "metadata.jsonl").write_text('{"file_name": "c.jpg", "text": "from a table"}\n')
    return folder


HOW = Preparing(Cutting((64, 64), "smart"), flip=True)


def test_captions_and_masks_are_copied_and_the_input_is_unchanged(tmp_path: Path) -> None:
    source = write_set(tmp_path / "in")
    before = {path: path.read_bytes() for path in source.rglob("*") if path.is_file()}
    made = prepare(str(source), str(tmp_path / "out"), HOW)
    out = tmp_path / "out"
    assert {path: path.read_bytes() for path in source.rglob("*") if path.is_file()} == before
    assert (
        (out / "10_cat" / "a.txt").read_text()
        == (out / "10_cat" / "a-flip.txt").read_text()
        == "a cat, red\n"
    )
    assert (out / "c.txt").read_text() == "from a table\n"
    image, flipped = (pixels(out / "10_cat" / f"a{end}.png") for end in ("", "-flip"))
    assert np.array_equal(image[:, ::-1], flipped)
    entry = made["pictures"]["10_cat/a.png"]["outputs"][0]
    assert entry["box"][0] < 10 and entry["box"][2] - entry["box"][0] == 100
    mask = pixels(out / entry["mask"])
    edge = round((50 - entry["box"][0]) * 0.64)
    assert mask[:, : edge - 3].min() == 255 and mask[:, edge + 3 :].max() == 0
    gradient = pixels(out / "b.mask.png")
    assert gradient.ndim == 2 and gradient[0, 0] < gradient[-1, 0]
    left, top, right, bottom = made["pictures"]["c.jpg"]["outputs"][0]["box"]
    assert (left, right) == (0, 60) and top > 40 and bottom - top == 60  # rotated: 60 wide, 120 high
    assert "not a" in made["pictures"]["d.png"]["reason"]


def test_processes_are_deterministic_and_only_new_images_are_processed(tmp_path: Path) -> None:
    source = write_set(tmp_path / "in")
    alone = prepare(str(source), str(tmp_path / "one"), HOW)
    assert prepare(str(source), str(tmp_path / "two"), HOW, workers=Workers(2)) == alone
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*"))
    assert files == sorted(path.relative_to(tmp_path / "two") for path in (tmp_path / "two").rglob("*"))
    for file in files:
        if (tmp_path / "one" / file).is_file():
            assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    out = tmp_path / "one"
    (out / "c.txt").write_text("edited by hand")  # kept, because image c is unchanged
    (out / "b.png").unlink()  # written again
    (source / "10_cat" / "a.png").unlink()
    (source / "10_cat" / "a.mask.png").unlink()
    again = prepare(str(source), str(out), HOW)
    assert (out / "c.txt").read_text() == "edited by hand"
    assert (out / "b.png").exists()
    assert not list((out / "10_cat").glob("*")) and "10_cat/a.png" not in again["pictures"]


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    source = write_set(tmp_path / "in")
    with pytest.raises(DataError, match="not empty"):
        prepare(str(source / "10_cat"), str(source), HOW)
    with pytest.raises(DataError, match="input"):
        prepare(str(source), str(source / "out"), HOW)
    prepare(str(source), str(tmp_path / "out"), HOW)
    with pytest.raises(DataError, match="other settings"):
        prepare(str(source), str(tmp_path / "out"), Preparing(Cutting((32, 32))))
    (source / "a.png").write_bytes((source / "b.png").read_bytes())
    (source / "a.jpg").write_bytes((source / "c.jpg").read_bytes())
    with pytest.raises(DataError, match="both"):
        prepare(str(source), str(tmp_path / "other"), dataclasses.replace(HOW, name="{stem}x"))
    (source / "a.jpg").rename(source / "a-flip.jpg")
    with pytest.raises(DataError, match=r"crop.*flip"):
        prepare(str(source), str(tmp_path / "other"), HOW)
    assert not (tmp_path / "other").exists()


def test_names_follow_the_pattern_and_nothing_else() -> None:
    assert name_of("10_cat/x.JPG", 7, "{stem}-{index:03d}-{suffix}") == "10_cat/x-007-JPG"
    for pattern in ("{stem.__class__}", "{0}", "{nothing}", "../{stem}", "{stem", "", "{index:zz}"):
        with pytest.raises(DataError):
            name_of("x.png", 1, pattern)


def test_command(tmp_path: Path) -> None:
    source = write_set(tmp_path / "in")
    words = [
        "data",
        "prepare",
        source,
        tmp_path / "out",
        "--size",
        "64x48",
        "--format",
        "jpg",
        "--workers",
        1,
    ]
    done = run(*words)
    assert done.exit_code == 0, done.output
    assert "from 4" in done.stdout and "d.png: not a" in done.stdout
    assert pixels(tmp_path / "out" / "c.jpg").shape == (48, 64, 3)
    assert json.loads(run(*words, "--json").stdout) == json.loads((tmp_path / "out" / MANIFEST).read_text())


@pytest.mark.parametrize(
    "words",
    [
        ["--size", "big"],
        ["--mode", "best"],
        ["--fill", "no colour"],
        ["--format", "gif"],
        ["--size", "64x32", "--mode", "auto"],
    ],
)
def test_invalid_input_of_prepare_exits_with_2(words: list[str], tmp_path: Path) -> None:
    source = write_set(tmp_path / "in")
    result = run("data", "prepare", source, tmp_path / "out", *words)
    assert result.exit_code == 2 and not (tmp_path / "out").exists()


@pytest.mark.s3
def test_buckets_are_prepared_inspected_and_tagged(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    s3_server: S3Server,  # noqa: F811
) -> None:
    s3_server.set_environment(monkeypatch)
    source, place = write_set(tmp_path / "in"), s3_server.new_folder()
    Storage(f"{place}/in").upload(source)
    here = prepare(str(source), str(tmp_path / "out"), HOW)
    assert prepare(f"{place}/in", f"{place}/out", HOW, workers=Workers(2)) == here
    there = Storage(f"{place}/out")
    assert there.read_bytes("10_cat/a.mask.png") == (tmp_path / "out" / "10_cat" / "a.mask.png").read_bytes()
    assert prepare(f"{place}/in", f"{place}/out", HOW) == here
    message = json.loads(run("data", "inspect", f"{place}/out", "--resolution", 64, "--json").stdout)
    assert message["pictures"] == 6 and message["tags"]["a cat"] == 2
    edited = run("data", "tags", f"{place}/out", "--trigger", "sks", "--in-place", "--json")
    assert there.read_text("10_cat/a.txt") == "sks, a cat, red\n"
    assert Storage(json.loads(edited.stdout)["backup"]).read_text("10_cat/a.txt") == "a cat, red\n"
