"""Test zip files of any size: zip64 fields follow the rules of the oldest supported PyTorch reader."""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path

import pytest
import torch

from dreamfleet.trainers.models.formats import zip_writer
from dreamfleet.trainers.models.formats.pickle_writer import load_pickle, save_pickle
from dreamfleet.trainers.models.formats.zip_writer import ZipWriter, local_header

GIB = 2**30
ENTRIES = {"a/data.pkl": b"pickle", "a/data/0": bytes(range(256)) * 5, "a/data/1": b"", "a/version": b"3\n"}


def write_at(path: Path, start: int) -> Path:
    """Write ENTRIES as a zip that starts at byte ``start``; the gap before it is sparse. Return the path."""
    with open(path, "wb") as file:
        file.seek(start)
        archive = ZipWriter(file)
        for name, content in ENTRIES.items():
            archive.add(name, memoryview(content))
        archive.close()
    return path


def directory(path: Path) -> tuple[bytes, list[tuple[str, int, int, bytes]], int]:
    """Return the file's last bytes, each entry's (name, 32-bit size, 32-bit offset, extra), and its size."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        file.seek(max(0, size - 4096))
        tail = file.read()
    end = tail.rindex(b"PK\5\6")
    (count,) = struct.unpack_from("<H", tail, end + 10)
    at, entries = tail.index(b"PK\1\2"), []
    for _ in range(count):
        stored, whole, name, extra = struct.unpack_from("<IIHH", tail, at + 20)
        assert stored == whole
        (offset,) = struct.unpack_from("<I", tail, at + 42)
        start = at + 46
        entries.append((tail[start : start + name].decode(), whole, offset, tail[start + name :][:extra]))
        at = start + name + extra
    return tail, entries, size


def objections_of_old_torch(path: Path) -> list[str]:
    """Return the entries whose 32-bit fields point outside the file for torch up to 2.3 (miniz 2.1)."""
    _, entries, size = directory(path)
    return [name for name, whole, offset, _ in entries if whole != 0xFFFFFFFF and offset + 30 + whole > size]


@pytest.mark.parametrize("start", [0, 2 * GIB - 40, 2 * GIB, 3 * GIB, 4 * GIB - 4096])
def test_below_4_gib_no_zip64_field_is_used(start: int, tmp_path: Path) -> None:
    path = write_at(tmp_path / "a.pt", start)
    tail, entries, _ = directory(path)
    assert objections_of_old_torch(path) == []
    assert b"PK\6\6" not in tail
    assert all(extra == b"" and offset < 2**32 - 1 for _, _, offset, extra in entries)
    assert_readable(path)


@pytest.mark.parametrize("start", [4 * GIB - 1, 4 * GIB, 5 * GIB])
def test_above_4_gib_offsets_use_zip64(start: int, tmp_path: Path) -> None:
    path = write_at(tmp_path / "a.pt", start)
    tail, entries, _ = directory(path)
    assert objections_of_old_torch(path) == []
    assert tail.count(b"PK\6\6") == tail.count(b"PK\6\7") == 1
    name, size, offset, extra = entries[0]
    assert (name, size, offset, extra) == ("a/data.pkl", 6, 0xFFFFFFFF, struct.pack("<HHQ", 1, 8, start))
    assert_readable(path)


def assert_readable(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        assert {name: archive.read(name) for name in archive.namelist()} == ENTRIES
        for entry in archive.infolist():
            with open(path, "rb") as file:
                file.seek(entry.header_offset + 26)
                name, extra = struct.unpack("<HH", file.read(4))
            assert (entry.header_offset + 30 + name + extra) % 64 == 0


def test_old_torch_rejects_zips_of_python(tmp_path: Path) -> None:
    with open(tmp_path / "a.pt", "wb") as file:
        file.seek(3 * GIB)
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("a/data.pkl", b"pickle")
    assert objections_of_old_torch(tmp_path / "a.pt") == ["a/data.pkl"]


@pytest.mark.parametrize(
    ("size", "large"), [(2 * GIB, False), (2**32 - 2, False), (2**32 - 1, True), (5 * GIB, True)]
)
def test_a_size_uses_zip64_only_beyond_32_bits(size: int, large: bool) -> None:
    header = local_header(b"a/data/0", size, 7, at=128)
    version, _, _, _, _, checksum, stored, whole = struct.unpack_from("<HHHHHIII", header, 4)
    assert (version, checksum, stored == whole) == (45 if large else 20, 7, True)
    assert whole == (0xFFFFFFFF if large else size)
    field = header[30 + len("a/data/0") :]
    assert field.startswith(struct.pack("<HHQQ", 1, 16, size, size)) == large
    assert (128 + len(header)) % 64 == 0


def test_torch_reads_zip64_fields(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = {"a": torch.arange(1000.0), "b": torch.ones(3)}
    plain = save_pickle(content, tmp_path / "plain.pt").read_bytes()
    monkeypatch.setattr(zip_writer, "_LARGEST", 0)  # treats all sizes and offsets as too large
    path = save_pickle(content, tmp_path / "large.pt")
    assert b"PK\6\6" in path.read_bytes()
    assert b"PK\6\6" not in plain
    for found in (load_pickle(path), torch.load(path, weights_only=True, mmap=True)):
        assert all(torch.equal(found[key], tensor) for key, tensor in content.items())
