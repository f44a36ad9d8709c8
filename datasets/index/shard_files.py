"""Lists the files that the URL of a sharded set names: one file, a pattern, or a folder of shards."""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Sequence

from dreamfleet.datasets.errors import DataError
from dreamfleet.datasets.images.image_formats import IMAGE_SUFFIXES
from dreamfleet.datasets.index.exclusions import is_hidden
from dreamfleet.datasets.storage.object_store import is_address
from dreamfleet.datasets.storage.storage import Storage

MOST_LOOKED_AT = 1000  # entries of a folder that are looked at to find out what it holds
MOST_SHARDS = 1_000_000
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


def names_shards(url: str, suffixes: Sequence[str]) -> bool:
    """Return whether a URL names shards: by its ending, or as a local folder that has some and no images."""
    if not is_address(url):
        return False
    if url.lower().endswith(tuple(suffixes)):
        return not os.path.isdir(url)
    return "://" not in url and os.path.isdir(url) and _holds_shards(url, suffixes)


def shard_files(url: str, suffixes: Sequence[str]) -> list[str]:
    """Return the addresses of the files that a URL names, in order.

    The URL is a file, a folder, or a pattern such as `s3://bucket/{0000..0099}.tar` or `shards/*.tar`. Raises DataError
    if there is none.
    """
    if match := _RANGE.search(url):
        first, last = int(match[1]), int(match[2])
        if last < first or last - first >= MOST_SHARDS:
            raise DataError(
                f"{url}: {match[0]} is not a range of at most {MOST_SHARDS:,} shards, such as {{000..031}}"
            )
        width = len(match[1]) if match[1].startswith("0") or len(match[1]) == len(match[2]) else 0
        return [
            file
            for number in range(first, last + 1)
            for file in shard_files(f"{url[: match.start()]}{number:0{width}d}{url[match.end() :]}", suffixes)
        ]
    folder, _, last_part = url.rpartition("/")
    if "*" in last_part or "?" in last_part:
        names = fnmatch.filter(Storage(folder or "/").list(), last_part)
        files = [Storage(folder or "/").path(name) for name in sorted(names)]
    elif url.lower().endswith(tuple(suffixes)) and not os.path.isdir(url):
        return [url]
    else:
        storage = Storage(url)
        files = [storage.path(name) for name in storage.list("", True) if _is_shard(name, suffixes)]
    if not files:
        raise DataError(f"{url}: there is no {' or '.join(suffixes)} file. Check the path")
    return files


def _holds_shards(folder: str, suffixes: Sequence[str]) -> bool:
    """Return whether a local folder holds shards and no images, as far as its first entries tell."""
    found = False
    try:
        with os.scandir(folder) as entries:
            for number, entry in enumerate(entries):
                if number >= MOST_LOOKED_AT or entry.name.lower().endswith(IMAGE_SUFFIXES):
                    return False
                found = found or _is_shard(entry.name, suffixes)
    except OSError:
        return False
    return found


def _is_shard(name: str, suffixes: Sequence[str]) -> bool:
    last = name.rpartition("/")[2].lower()
    return name.lower().endswith(tuple(suffixes)) and not is_hidden(name) and not last.startswith("metadata.")
