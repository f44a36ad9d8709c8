"""Test the index of an image folder: ids, captions, and every kind of invalid folder."""

import os
import shutil
import tempfile
import time
from collections import Counter
from pathlib import Path

import pytest
from image_files import image, put

from dreamfleet.datasets.errors import DataError
from dreamfleet.datasets.index import set_table
from dreamfleet.datasets.index.index import Index, build_index, log_left_out
from dreamfleet.datasets.index.sources import ScanOptions
from dreamfleet.datasets.storage.storage import Storage


def by_name(index: Index) -> dict[str, str | None]:
    return {Path(row.uri).name: row.caption for row in index.rows()}


def test_columns_sizes_and_order(tmp_path):
    for seed in range(6):
        put(tmp_path, f"{seed}.png", image(seed, size=(12 + seed, 10)))
    index = build_index(str(tmp_path), concept=3, role="class", repeats=4)
    assert len(index) == 6
    assert index.column("id") == sorted(index.column("id"))
    for row in index.rows():
        assert (row.concept, row.role, row.repeats, row.caption) == (3, "class", 4, None)
        assert (row.width, row.height) == (12 + int(Path(row.uri).stem), 10)
        assert row.id == row.sha256[:16]
        assert os.path.isabs(row.uri)
    assert index.row(2) == index.rows()[2]
    assert index.bad == []


def test_the_index_does_not_depend_on_location_or_listing_order(tmp_path, monkeypatch):
    for seed in range(8):
        put(tmp_path / "a", f"{seed}.png", image(seed % 5))  # three images have a copy
        put(tmp_path / "a", f"{seed}.txt", f"caption {seed}")
    shutil.copytree(tmp_path / "a", tmp_path / "b" / "elsewhere")
    one = build_index(str(tmp_path / "a"))
    listed = Storage.list
    monkeypatch.setattr(Storage, "list", lambda *args, **more: listed(*args, **more)[::-1])
    other = build_index(str(tmp_path / "b" / "elsewhere"))
    assert one.content_hash == other.content_hash
    assert one.table.drop(["uri"]).equals(other.table.drop(["uri"]))
    assert sum(name.endswith("-1") for name in one.column("id")) == 3


def test_content_hash_depends_on_captions_and_images(tmp_path):
    put(tmp_path, "a.png", image(0))
    bare = build_index(str(tmp_path)).content_hash
    put(tmp_path, "a.txt", "words")
    captioned = build_index(str(tmp_path)).content_hash
    put(tmp_path, "a.png", image(1))
    assert len({bare, captioned, build_index(str(tmp_path)).content_hash}) == 3


def test_concat_keeps_ids_unique_and_order_fixed(tmp_path):
    for folder in ("a", "b"):
        for seed in range(3):
            put(tmp_path / folder, f"{seed}.png", image(seed))
    put(tmp_path / "b", "again.png", image(0))
    a, b = build_index(str(tmp_path / "a"), concept=0), build_index(str(tmp_path / "b"), concept=1)
    both = Index.concat([a, b])
    assert len(set(both.column("id"))) == len(both) == 7
    assert both.column("id") == sorted(both.column("id"))
    copies = [
        row for row in both.rows() if row.sha256 == next(r.sha256 for r in a.rows() if "0.png" in r.uri)
    ]
    assert [(row.id.partition("-")[2], row.concept) for row in copies] == [("", 0), ("1", 1), ("2", 1)]


def test_subfolders_hidden_files_and_other_files(tmp_path):
    put(tmp_path, "a.png", image(0))
    put(tmp_path, "deep/er/b.JPG", image(1, kind="JPEG"))
    put(tmp_path, "._a.png", b"resource fork")
    put(tmp_path, ".thumbs/c.png", image(2))
    put(tmp_path, "__MACOSX/d.png", image(3))
    put(tmp_path, "notes.md", "text")
    put(tmp_path, "model.safetensors", b"123")
    index = build_index(str(tmp_path))
    assert sorted(by_name(index)) == ["a.png", "b.JPG"]
    assert index.bad == []
    assert sorted(by_name(build_index(str(tmp_path), ScanOptions(recursive=False)))) == ["a.png"]


def test_wrong_file_extensions_are_accepted(tmp_path):
    put(tmp_path, "a.jpg", image(0, kind="PNG"))
    assert len(build_index(str(tmp_path))) == 1


def test_links_are_followed_without_loops(tmp_path):
    put(tmp_path / "real", "a.png", image(0))
    put(tmp_path / "set", "b.png", image(1))
    (tmp_path / "set" / "linked").symlink_to(tmp_path / "real")
    (tmp_path / "set" / "loop").symlink_to(tmp_path / "set")
    (tmp_path / "real" / "back").symlink_to(tmp_path / "set")
    (tmp_path / "set" / "self.png").symlink_to(tmp_path / "set" / "self.png")
    (tmp_path / "set" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    started = time.monotonic()
    index = build_index(str(tmp_path / "set"))
    assert time.monotonic() - started < 5
    assert sorted(by_name(index)) == ["a.png", "b.png"]
    assert sorted(Path(item.uri).name for item in index.bad) == ["gone.png", "self.png"]


def test_a_pipe_with_an_image_name_does_not_block(tmp_path):
    put(tmp_path, "a.png", image(0))
    os.mkfifo(tmp_path / "b.png")
    assert len(build_index(str(tmp_path))) == 1


def test_bad_images_are_listed_and_good_ones_indexed(tmp_path, caplog):
    put(tmp_path, "good.png", image(0))
    put(tmp_path, "zero.png", b"")
    put(tmp_path, "text.jpg", "not a picture")
    put(tmp_path, "cut.png", image(1, size=(80, 80))[:3000])
    put(tmp_path, "big.png", image(2, size=(200, 200)))
    put(tmp_path, "phone.heic", b"\0\0\0\x18ftypheic")
    index = build_index(str(tmp_path), max_pixels=39_999)
    assert list(by_name(index)) == ["good.png"]
    reasons = {Path(item.uri).name: item.reason for item in index.bad}
    assert sorted(reasons) == ["big.png", "cut.png", "phone.heic", "text.jpg", "zero.png"]
    assert "truncated" in reasons["cut.png"]
    assert "empty" in reasons["zero.png"]
    assert "max_pixels" in reasons["big.png"]
    assert "Convert" in reasons["phone.heic"]
    assert not any(str(tmp_path) in reason for reason in reasons.values())
    log_left_out(index)
    assert all(name in caplog.text for name in reasons)


def test_truncated_images_pass_only_without_verification(tmp_path, monkeypatch):
    put(tmp_path, "good.png", image(0))
    put(tmp_path, "cut.png", image(1, size=(80, 80))[:3000])
    assert len(build_index(str(tmp_path), verify=False)) == 2
    monkeypatch.setattr(set_table, "VERIFY_LIMIT", 1)
    assert len(build_index(str(tmp_path))) == 2
    assert len(build_index(str(tmp_path), verify=True)) == 1


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"no (picture|image) in .*: .*nothing"),
        ({"a.md": b"x", "b.md": b"x"}, r"no (picture|image) in .*: .*2 other files"),
        (
            {"a.png": b"", "b.png": b"x"},
            r"no usable .*: all 2 found .*a\.png: .*empty",
        ),
    ],
)
def test_nothing_usable(tmp_path, files, message):
    for name, data in files.items():
        put(tmp_path, name, data)
    with pytest.raises(DataError, match=message):
        build_index(str(tmp_path))


def test_missing_folder_and_file_instead_of_folder(tmp_path):
    with pytest.raises(DataError, match=r"/none does not exist"):
        build_index(str(tmp_path / "none"))
    with pytest.raises(DataError, match="is a file"):
        build_index(str(put(tmp_path, "a.png", image(0))))


def test_permissions_denied():
    """Test the report of unreadable files; the folder is outside pytest's, which other users cannot enter."""
    folder = Path(tempfile.mkdtemp(prefix="dreamfleet-test-"))
    user = os.geteuid()
    try:
        folder.chmod(0o755)
        put(folder, "good.png", image(0)).chmod(0o644)
        put(folder, "locked.png", image(1)).chmod(0)
        put(folder, "shut/a.png", image(2))
        (folder / "shut").chmod(0)
        if user == 0:
            os.seteuid(65534)
        index = build_index(str(folder))
        assert list(by_name(index)) == ["good.png"]
        assert [Path(item.uri).name for item in index.bad] == ["locked.png", "shut"]
        assert all("permission denied" in item.reason for item in index.bad)
        with pytest.raises(DataError, match="permission denied"):
            build_index(str(folder / "shut"))
    finally:
        os.seteuid(user)
        (folder / "shut").chmod(0o755)
        shutil.rmtree(folder)


def test_each_file_is_read_once(tmp_path, monkeypatch):
    for seed in range(5):
        put(tmp_path, f"{seed}.png", image(seed))
        put(tmp_path, f"{seed}.txt", "words")
    reads: Counter[str] = Counter()
    read = Storage.read_bytes

    def counted(self, rel="", **ends):
        reads[rel] += 1
        return read(self, rel, **ends)

    monkeypatch.setattr(Storage, "read_bytes", counted)
    build_index(str(tmp_path))
    assert set(reads.values()) == {1}
    assert len(reads) == 10


def test_caption_files_and_their_priority(tmp_path):
    for seed, name in enumerate(("a", "b", "c", "d", "e")):
        put(tmp_path, f"{name}.png", image(seed))
    put(tmp_path, "a.txt", "  from text \n")
    put(tmp_path, "a.caption", "from caption")
    put(tmp_path, "b.caption", "bee")
    put(tmp_path, "c.txt", " \n")
    put(tmp_path, "d.png.txt", "with the whole name")
    got = by_name(build_index(str(tmp_path)))
    assert got == {
        "a.png": "from text",
        "b.png": "bee",
        "c.png": None,
        "d.png": "with the whole name",
        "e.png": None,
    }
    assert (
        by_name(build_index(str(tmp_path), ScanOptions(caption_extension=[".caption"])))["a.png"]
        == "from caption"
    )


def test_metadata_tables(tmp_path):
    for seed, name in enumerate(("a.png", "sub/b.png", "sub/c.png", "d.png")):
        put(tmp_path, name, image(seed))
    put(
        tmp_path,
        "metadata.jsonl",
        '{"file_name": "a.png", "text": "á"}\n\n{"file_name": "sub/b.png", "text": "far"}\n',
    )
    put(tmp_path, "sub/metadata.csv", 'file_name,caption\nb.png,"near, with comma"\nc.png,see\nlost.png,x\n')
    put(tmp_path, "d.txt", "dee")
    index = build_index(str(tmp_path))
    assert by_name(index) == {"a.png": "á", "b.png": "near, with comma", "c.png": "see", "d.png": "dee"}
    assert [Path(item.uri).name for item in index.bad] == ["lost.png"]
    assert "metadata.csv" in index.bad[0].reason


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"file_name": "a.png", "text": ', r"metadata\.jsonl, line 2: .*JSON"),
        ("[1, 2]", r"line 2: .*object"),
        ('{"text": "x"}', r'line 2: no "file_name"'),
        ('{"file_name": "a.png", "text": 5}', r"line 2: .*a\.png .*text: 5"),
    ],
)
def test_broken_metadata_line(tmp_path, line, message):
    put(tmp_path, "a.png", image(0))
    put(tmp_path, "metadata.jsonl", '{"file_name": "a.png", "text": "ok"}\n' + line + "\n")
    with pytest.raises(DataError, match=message):
        build_index(str(tmp_path))


def test_captions_not_utf8(tmp_path):
    put(tmp_path, "a.png", image(0))
    put(tmp_path, "a.txt", b"\xef\xbb\xbfa caf\xc3\xa9")
    assert by_name(build_index(str(tmp_path))) == {"a.png": "a café"}
    put(tmp_path, "a.txt", b"fine\na caf\xe9")
    with pytest.raises(DataError, match=r"a\.txt .*UTF-8.*0xe9 .*10, line 2"):
        build_index(str(tmp_path))
    put(tmp_path, "a.txt", "a cat".encode("utf-16"))
    with pytest.raises(DataError, match="UTF-16"):
        build_index(str(tmp_path))


def test_thousands_of_files(tmp_path):
    for seed in range(2500):
        put(tmp_path, f"{seed % 7}/{seed}.png", image(seed, size=(4, 4)))
    started = time.monotonic()
    assert len(build_index(str(tmp_path))) == 2500
    assert time.monotonic() - started < 20
