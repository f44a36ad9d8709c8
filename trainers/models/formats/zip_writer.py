"""Writes zip files that all versions of PyTorch's reader open: uncompressed, aligned, zip64 only where needed.

Python's zipfile uses zip64 for offsets beyond 2 GiB: it writes 0xFFFFFFFF in the 32-bit field and the offset in an
extra field. The reader of PyTorch 2.1 and 2.3 (miniz) takes 0xFFFFFFFF as the offset when it checks that an entry is
within the file, and therefore rejects files between 2 and 4 GiB ("invalid header"). Above 4 GiB the check passes.
Format: PKWARE's APPNOTE.TXT, sections 4.3 and 4.5.3.
"""

from __future__ import annotations

import struct
import zlib
from typing import IO, NamedTuple

_ALIGNMENT = 64  # bytes; torch can map tensors whose data starts at a multiple of it
_LARGEST = 0xFFFFFFFE  # the largest value of a 32-bit field
_ELSEWHERE = 0xFFFFFFFF  # marks a 32-bit field whose value is in the zip64 field
_MOST_ENTRIES = 0xFFFF
_DATE = 0x21  # 1980-01-01 for every entry, so that equal content gives equal bytes


class _Entry(NamedTuple):
    name: bytes
    size: int
    checksum: int
    offset: int  # offset of the local header in the file


class ZipWriter:
    """Writes entries in order; :meth:`close` writes the central directory, without which the file is unreadable."""

    def __init__(self, file: IO[bytes]):
        self._file, self._entries = file, list[_Entry]()

    def add(self, name: str, content: memoryview) -> None:
        """Write an entry; its data starts at a multiple of the alignment, as in torch's own files."""
        entry = _Entry(name.encode("ascii"), content.nbytes, zlib.crc32(content), self._file.tell())
        self._file.write(local_header(entry.name, entry.size, entry.checksum, at=entry.offset))
        self._file.write(content)
        self._entries.append(entry)

    def close(self) -> None:
        """Write the central directory and the records after it."""
        start = self._file.tell()
        for entry in self._entries:
            self._file.write(_directory_entry(entry))
        size, count = self._file.tell() - start, len(self._entries)
        if start > _LARGEST or size > _LARGEST or count >= _MOST_ENTRIES:
            here = self._file.tell()
            self._file.write(
                struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, count, count, size, start)
            )
            self._file.write(struct.pack("<4sIQI", b"PK\6\7", 0, here, 1))
        stored_count = min(count, _MOST_ENTRIES)
        self._file.write(
            struct.pack(
                "<4sHHHHIIH", b"PK\5\6", 0, 0, stored_count, stored_count, _field(size), _field(start), 0
            )
        )


def local_header(name: bytes, size: int, checksum: int, *, at: int) -> bytes:
    """Return the bytes before an entry's data: local header, name, and extra fields that pad to the alignment."""
    large = size > _LARGEST
    extra = struct.pack("<HHQQ", 1, 16, size, size) if large else b""
    padding = -(at + 30 + len(name) + len(extra)) % _ALIGNMENT
    if 0 < padding < 4:
        padding += _ALIGNMENT
    if padding:
        extra += struct.pack("<2sH", b"FB", padding - 4) + b"Z" * (padding - 4)
    head = struct.pack(
        "<4sHHHHHIIIHH", b"PK\3\4", 45 if large else 20, 0, 0, 0, _DATE, checksum, _field(size), _field(size),
        len(name), len(extra),
    )  # fmt: skip
    return head + name + extra


def _directory_entry(entry: _Entry) -> bytes:
    values = [value for value in (entry.size, entry.size, entry.offset) if value > _LARGEST]
    extra = struct.pack(f"<HH{len(values)}Q", 1, 8 * len(values), *values) if values else b""
    version, size, offset = 45 if values else 20, _field(entry.size), _field(entry.offset)
    head = struct.pack(
        "<4sHHHHHHIIIHHHHHII", b"PK\1\2", version, version, 0, 0, 0, _DATE, entry.checksum, size, size,
        len(entry.name), len(extra), 0, 0, 0, 0, offset,
    )  # fmt: skip
    return head + entry.name + extra


def _field(value: int) -> int:
    return value if value <= _LARGEST else _ELSEWHERE
