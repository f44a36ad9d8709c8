"""Tests of the memory of files whose hash was checked, and that decoding imports little."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from dreamfleet.datasets.serve import verified_files
from dreamfleet.datasets.serve.verified_files import VerifiedFiles

SHA256 = hashlib.sha256(b"old").hexdigest()


@pytest.fixture
def photo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a file that nobody has changed for a while."""
    monkeypatch.setattr(verified_files, "SETTLED_SECONDS", -1.0)
    path = tmp_path / "photo.jpg"
    path.write_bytes(b"old")
    return path


def check(files: VerifiedFiles, path: Path, *, content: bytes | None = None) -> bool:
    before = files.stamp(str(path))
    return files.has_hash(content or path.read_bytes(), SHA256, uri=str(path), before=before)


def test_an_unchanged_file_is_hashed_once(photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = VerifiedFiles()
    assert check(files, photo)
    monkeypatch.setattr(verified_files.hashlib, "sha256", lambda content: pytest.fail("hashed again"))
    assert check(files, photo)


@pytest.mark.parametrize("how", ["write", "rename", "same time"])
def test_a_replaced_file_is_noticed(photo: Path, how: str) -> None:
    files = VerifiedFiles()
    assert check(files, photo)
    status = os.stat(photo)
    if how == "write":
        photo.write_bytes(b"new")
    else:
        other = photo.with_name("other.jpg")
        other.write_bytes(b"new")
        if how == "same time":
            os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
        other.rename(photo)
    assert not check(files, photo)
    photo.write_bytes(b"old")
    assert check(files, photo)


def test_a_file_that_was_just_changed_is_not_remembered(photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verified_files, "SETTLED_SECONDS", 3600.0)
    files = VerifiedFiles()
    assert check(files, photo)
    assert not check(files, photo, content=b"new")


def test_only_so_many_files_are_remembered_and_none_in_buckets(
    photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verified_files, "MOST_FILES", 2)
    files = VerifiedFiles()
    for number in range(4):
        copy = photo.with_name(f"{number}.jpg")
        copy.write_bytes(b"old")
        assert check(files, copy)
    assert len(files._known) == 2
    assert files.stamp("s3://bucket/photo.jpg") is None
    assert files.stamp(str(photo.with_name("missing.jpg"))) is None


def test_a_process_that_decodes_imports_neither_pydantic_nor_pyarrow() -> None:
    code = (
        "import sys, dreamfleet.datasets.serve.decode_job; "
        "print(sorted({'pydantic', 'pyarrow', 'fsspec', 'torch'} & set(sys.modules)))"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
        == "[]\n"
    )


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has mallopt")
def test_a_process_that_decodes_keeps_the_memory_of_images(tmp_path: Path) -> None:
    Image.new("RGB", (1280, 1024), "red").save(tmp_path / "photo.png")
    code = f"""
import resource
from dreamfleet.datasets.images.masks import ImageView
from dreamfleet.datasets.serve.decode_job import DecodeJob, DecodeOptions, decode_chunk, keep_freed_memory
keep_freed_memory()
job = DecodeJob({str(tmp_path / "photo.png")!r}, "", None, ImageView(0, None, False, (64, 64)))
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    assert decode_chunk([job] * 8, DecodeOptions("lanczos")).errors == [""] * 8
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults)
"""
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert int(found) < 8 * 300  # pages; about 1,000 or more for each image otherwise
