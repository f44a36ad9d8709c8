"""Decodes text files: UTF-8, with an error that names the file, the byte and the remedy."""

from __future__ import annotations

from dreamfleet.datasets.errors import DataError


def decode_text(data: bytes, *, uri: str) -> str:
    """Decode UTF-8, with or without a byte order mark. Raises DataError naming the file, the byte and the remedy."""
    guess = ""
    if data[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in data:
        guess = " (it looks like UTF-16)"
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{uri} is not UTF-8 text{guess}: byte {data[error.start]:#04x} at position {error.start}, "
            f"line {line}. Save it as UTF-8"
        ) from error
    if guess:  # UTF-16 without a byte order mark: English text in it is valid UTF-8 with zero bytes
        raise DataError(f"{uri} is not UTF-8 text{guess}: it contains zero bytes. Save it as UTF-8")
    return text
