"""Test the source of images that are named one by one."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny

from dreamfleet.datasets.errors import DataError
from dreamfleet.datasets.index.index import build_index
from dreamfleet.datasets.index.list_source import list_url
from dreamfleet.datasets.index.sources import ScanOptions, find_source


def test_images_come_in_the_order_of_the_list_with_their_captions_and_masks(tmp_path: Path) -> None:
    one = tiny.make_images(tmp_path / "one", 3, captions=True)
    two = tiny.make_images(tmp_path / "two, [2]", 1)
    (one / "002.png").rename(one / "001.mask.png")
    url = list_url([f"{two}/000.png", f"{one}/001.png", f"{two}/000.png"])
    source = find_source(url)
    listed = source.scan(url, ScanOptions()).images
    assert [image.uri for image in listed] == [f"{two}/000.png", f"{one}/001.png"]
    assert [image.caption for image in listed] == [None, "cat, tag1, round, soft"]
    assert [image.mask for image in listed] == [None, f"{one}/001.mask.png"]
    assert source.count(url, ScanOptions()) == 2
    assert sorted(build_index(url).column("uri")) == sorted(image.uri for image in listed)


def test_missing_images_are_bad_and_the_others_are_used(tmp_path: Path) -> None:
    one = tiny.make_images(tmp_path / "one", 1)
    (one / "notes.txt").write_text("x")
    missing = [f"{one}/nine.png", f"{tmp_path}/nowhere/a.png", f"{one}/notes.txt"]
    index = build_index(list_url([f"{one}/000.png", *missing]))
    assert index.column("uri") == [f"{one}/000.png"]
    assert sorted(bad.uri for bad in index.bad) == sorted(missing)


@pytest.mark.parametrize(
    "url", ["list://", "list://[]", "list://[1]", 'list://["a.png"]', "list:///data/a.png"]
)
def test_what_is_no_list_is_an_error_with_an_example(url: str) -> None:
    with pytest.raises(DataError, match=r"Write"):
        find_source(url).scan(url, ScanOptions())
