"""Test kohya's metadata files: captions and tags by image, in a set, in a dataset TOML, and imported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from image_files import image, put

from dreamfleet.datasets.config import DataConfig
from dreamfleet.datasets.errors import DataError
from dreamfleet.datasets.index.metadata_source import metadata_url
from dreamfleet.datasets.index.sets import load_sets
from dreamfleet.datasets.index.sources import ScanOptions, find_source
from dreamfleet.trainers.imports.translate import import_files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    names = (("a.png", "PNG"), ("b.jpg", "JPEG"), ("deep/c.webp", "WEBP"), ("loose.png", "PNG"))
    for seed, (name, kind) in enumerate(names):
        put(tmp_path / "images", name, image(seed, kind=kind))
    return tmp_path


def write(folder: Path, entries: dict[str, Any], name: str = "meta.json") -> Path:
    return put(folder, name, json.dumps(entries))


def captions(url: str) -> dict[str, str | None]:
    return {one.name: one.caption for one in find_source(url).scan(url, ScanOptions()).images}


def test_caption_and_tags_are_joined_as_kohya_does(folder: Path) -> None:
    entries = {
        "a": {"caption": "a cat", "tags": "cat, sofa", "train_resolution": [512, 512]},
        str(folder / "images" / "b"): {"tags": "dog"},
        "deep\\c.webp": {"caption": "a bird"},
        "gone": {"caption": "nothing"},
    }
    url = metadata_url(str(write(folder, entries)), str(folder / "images"))
    found = find_source(url).scan(url, ScanOptions())
    assert captions(url) == {"a.png": "a cat, cat, sofa", "b.jpg": "dog", "deep/c.webp": "a bird"}
    assert [bad.uri.rpartition("/")[2] for bad in found.bad] == ["gone"] and "meta.json" in found.bad[
        0
    ].reason
    assert found.images[0].columns == {"caption": "a cat", "tags": "cat, sofa"}


def test_a_file_beside_its_images_is_a_set_and_its_tags_are_a_condition(folder: Path) -> None:
    entries = {name: {"caption": name, "tags": "cat" if name == "a" else "dog"} for name in ("a", "b")}
    file = write(folder / "images", entries)
    data = DataConfig.model_validate({"sets": [{"source": str(file)}], "where": "tags == 'cat'"})
    [row] = load_sets(data).instances.rows()
    assert row.caption == "a, cat"


def test_a_dataset_toml_and_imported_options_name_it(folder: Path) -> None:
    file = write(folder, {"a": {"tags": "cat"}})
    toml = put(
        folder,
        "set.toml",
        f"[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'images'\nmetadata_file = '{file.name}'\n",
    )
    assert [one.caption for one in find_source(str(toml)).scan(str(toml), ScanOptions()).images] == ["cat"]
    command = put(
        folder,
        "run.sh",
        "accelerate launch fine_tune.py --in_json=meta.json --train_data_dir=images --max_train_steps=5",
    )
    expected = metadata_url(str(file), str(folder / "images"))
    for each in (command, toml):
        found = import_files([str(each)])
        line = next(line for line in found.lines if line.key == "data.instance_data_dir")
        assert line.value == expected
        assert not any("json" in left.key or "metadata" in left.key for left in found.left)


@pytest.mark.parametrize(
    ("text", "match"),
    [("{", "not JSON"), ("[]", "not a metadata file"), ('{"a": {"width": 3}}', "not a metadata file")],
)
def test_other_files_are_errors(folder: Path, text: str, match: str) -> None:
    url = metadata_url(str(put(folder, "meta.json", text)), str(folder / "images"))
    with pytest.raises(DataError, match=match):
        find_source(url).scan(url, ScanOptions())


def test_an_entry_that_is_not_text_makes_its_image_bad(folder: Path) -> None:
    url = metadata_url(
        str(write(folder, {"a": {"caption": 3}, "b": {"tags": "dog"}})), str(folder / "images")
    )
    found = find_source(url).scan(url, ScanOptions())
    assert [one.name for one in found.images] == ["b.jpg"] and "not text" in found.bad[0].reason
