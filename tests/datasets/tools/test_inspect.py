"""Test that `data inspect` reports a folder as training would read it, with all of its problems."""

from __future__ import annotations

import io
import json
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from PIL import Image
from typer.testing import CliRunner

from dreamfleet.cluster.cli import program
from dreamfleet.datasets.config import DataConfig
from dreamfleet.datasets.index.index import Row
from dreamfleet.datasets.tools.inspect import survey, tag_counts
from dreamfleet.datasets.tools.pixel_statistics import PixelFacts, difference_hash, near_copies


def run(*words: Any) -> Any:
    return CliRunner().invoke(program.app, [str(word) for word in words])


def image(seed: int, size: tuple[int, int] = (96, 96)) -> Image.Image:
    """Return a random image smooth enough to survive compression; ``size`` is (width, height) in pixels."""
    cells = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(cells).resize(size, Image.Resampling.BICUBIC)


def write_set(folder: Path) -> Path:
    """Write eight usable images, each with one property to report, and two damaged files; return `folder`."""
    folder.mkdir()
    image(1).save(folder / "plain.png")
    (folder / "copy.png").write_bytes((folder / "plain.png").read_bytes())
    image(1).resize((80, 80)).save(folder / "near.jpg", quality=70)
    image(2, (40, 40)).save(folder / "small.png")
    image(3, (192, 96)).save(folder / "wide.png")
    image(4).convert("L").save(folder / "grey.png")
    clear = image(5)
    clear.putalpha(Image.linear_gradient("L").resize(clear.size))
    clear.save(folder / "clear.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    image(6, (64, 128)).save(folder / "turned.jpg", exif=exif)
    (folder / "broken.png").write_bytes((folder / "plain.png").read_bytes()[:-500])
    (folder / "photo.heic").write_bytes(b"x")
    (folder / "plain.txt").write_text("1girl, red hair, smile")
    (folder / "wide.txt").write_text("1girl, blue hair, 1girl")
    (folder / "grey.txt").write_text("")
    return folder


def look(folder: Path, **keys: Any) -> Any:
    data = DataConfig(instance_data_dir=str(folder), resolution=64, **keys)
    return survey(data, count_tokens=lambda text: len(text.split()), max_tokens=3)


def test_all_properties_of_a_set_are_reported(tmp_path: Path) -> None:
    found = look(write_set(tmp_path / "set"), repeats=3)
    assert (found.pictures, found.draws) == (8, 24)
    assert found.width == (40, 96, 192)  # turned.jpg is 128 pixels wide after its EXIF rotation
    assert (found.transparent, found.turned, found.grey, found.captioned) == (1, 1, 1, 2)
    assert found.formats == {"PNG": 6, "JPEG": 2}
    assert found.shown_at == {"64x64": 8}
    assert found.enlarged == 1 and found.largest_scale == 64 / 40
    assert found.most_cut_off == pytest.approx(0.5)
    assert found.tokens == (4, 4, 4)  # tokens of "1girl, red hair, smile"
    assert next(iter(found.tags.items())) == ("1girl", 2)
    assert [sorted(Path(name).name for name in group) for group in found.copies] == [
        ["copy.png", "plain.png"]
    ]
    assert [[Path(name).name for name in group] for group in found.near] == [["copy.png", "near.jpg"]]
    assert {Path(name).name for name in found.bad} == {"broken.png", "photo.heic"}
    message = "\n".join(found.warnings)
    for word in (
        "bucket_no_upscale",
        "alpha_mask",
        "1 copy",
        "grey image",
        "more than 3 tokens",
        "without caption",
        "2 files cannot be used",
    ):
        assert word in message, word


def test_buckets_are_those_of_training_and_crop_less(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set")
    keys = {"enable_bucket": True, "min_bucket_reso": 32, "max_bucket_reso": 128, "bucket_reso_steps": 16}
    found = look(folder, **keys)
    assert sum(found.shown_at.values()) == 8 and len(found.shown_at) > 1
    assert found.cut_off < look(folder).cut_off
    assert look(folder, alpha_mask=True).warnings != look(folder).warnings


def test_a_clean_set_has_no_warnings(tmp_path: Path) -> None:
    for number in range(3):
        image(number).save(tmp_path / f"{number}.png")
    assert look(tmp_path, instance_prompt="a cat").warnings == []


def test_the_hash_survives_scaling_and_compression() -> None:
    first = image(1, (300, 200))
    squeezed = io.BytesIO()
    first.resize((150, 100)).save(squeezed, "JPEG", quality=50)
    again = Image.open(squeezed)
    assert (difference_hash(first) ^ difference_hash(again)).bit_count() <= 4
    assert (difference_hash(first) ^ difference_hash(image(2))).bit_count() > 10


def test_near_duplicates_of_thousands_of_images_are_fast() -> None:
    row = Row("", "", 1, 1, None, "", 0, "instance", 1)
    rows = [row._replace(uri=f"{number:05d}", sha256=str(number)) for number in range(20_000)]
    scenes = [0b1110 << 20, 0b1111 << 20, 0b1111 << 40]  # the first two hashes differ in one bit
    looks = [PixelFacts("PNG", False, False, False, scenes[number % 3]) for number in range(len(rows))]
    began = time.process_time()
    near = near_copies(rows, looks)
    assert time.process_time() - began < 5
    assert [len(group) for group in near] == [13_334, 6_666]
    assert near[1] == [one.uri for one in rows[2::3]]


def test_tags_are_counted_once_per_caption() -> None:
    assert tag_counts(["a, b, a", "b", "c\nb, c"]) == {"b": 3, "a": 1, "c": 1}


def test_command_reads_folders_and_recipes(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set")
    shown = run("data", "inspect", folder, "--resolution", 64, "--top", 1)
    assert shown.exit_code == 0, shown.output
    assert "8 of" in shown.stdout and "1girl" in shown.stdout and "red hair" not in shown.stdout
    tree = tiny.make_recipe(tmp_path)
    tree["data"] = {"instance_data_dir": str(folder)}
    recipe = tiny.write_recipe(tmp_path / "r.yaml", tree)
    by_recipe = json.loads(run("data", "inspect", recipe, "data.resolution=64", "--json").stdout)
    by_folder = json.loads(run("data", "inspect", folder, "--resolution", 64, "--json").stdout)
    same = {"pictures", "shown_at", "near", "bad", "tags"}
    assert {key: by_recipe[key] for key in same} == {key: by_folder[key] for key in same}
    assert "pocket" in by_folder["tokenizer"] and by_folder["tokens"][0] > 3


@pytest.mark.parametrize("words", [["nowhere"], ["nowhere.yaml"], [".", "resolution=64"]])
def test_invalid_input_of_inspect_is_refused(words: list[str], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("data", "inspect", *words)
    assert result.exit_code == 2
    assert result.stderr.startswith("dreamfleet: ") and "Traceback" not in result.output


def test_the_html_report_is_one_file_with_the_same_facts(tmp_path: Path) -> None:
    tiny.make_images(tmp_path / "set", 3, captions=True)
    (tmp_path / "set" / "bad<b>.png").write_bytes(b"no image")
    (tmp_path / "set" / "copy.png").write_bytes((tmp_path / "set" / "000.png").read_bytes())
    page = tmp_path / "report.html"
    result = run("data", "inspect", tmp_path / "set", "--html", page)
    assert result.exit_code == 0, result.output
    text = page.read_text()
    assert not re.search(r"<script|https?://|@import|url\(|src=", text)
    assert (
        "bad&lt;b&gt;.png" in text
        and "bad<b>" not in text
        and "copy.png = " not in text.split("Duplicates")[0]
    )
    for fact in ("512x512", "tag1", "round", "4 of", "copy of another image"):
        assert fact in text, fact
