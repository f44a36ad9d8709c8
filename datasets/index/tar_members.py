"""Reads the members of a tar file in order, with their byte ranges; nothing is unpacked to the disk."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from dreamfleet.datasets.errors import DataError

MOST_HEADER = 2**20  # bytes of one header that is read, such as a long name
MAGIC = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\x03\x04": "zip",
}


class Member(NamedTuple):
    """A member of a tar file: its name, where its content is in the file, and why it has none that can be read."""

    name: str
    start: int
    size: int
    problem: str = ""


def members(file: BinaryIO, where: str) -> Iterator[Member]:
    """Yield the files in a tar file, in order. The position of ``file`` may be changed between two of them.

    Links, devices and sparse files are yielded with a problem; folders are not. Raises DataError if the file is
    compressed, not a tar file, or damaged, with the position.
    """
    head = file.read(8)
    for magic, kind in MAGIC.items():
        if head.startswith(magic):
            raise DataError(
                f"{where}: a file compressed by {kind}. Images are read from tar files by byte ranges: decompress it"
            )
    file.seek(0)
    try:
        with tarfile.open(fileobj=_Headers(file), mode="r:", errors="surrogateescape") as tar:  # type: ignore[call-overload]
            while (info := tar.next()) is not None:
                tar.members = []  # a shard of a million members would keep them all
                if not info.isdir():
                    yield Member(info.name, info.offset_data, info.size, _problem(info))
    except (tarfile.TarError, EOFError, OverflowError, ValueError) as error:
        raise DataError(
            f"{where}: damaged at byte {file.tell():,}, or not a tar file ({error}). Write it again"
        ) from error


def _problem(info: tarfile.TarInfo) -> str:
    if info.issym() or info.islnk():
        return f"a link to {info.linkname!r}, which is not followed. Store the file itself"
    if info.issparse():
        return "a sparse file, whose bytes are not in one range. Store it as a regular file"
    return "" if info.isreg() else "neither a file nor a folder"


class _Headers:
    """The file interface that tarfile needs, with a limit on what it reads at once."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        if size > MOST_HEADER:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        return self._file.read(size)
