"""Lists an image set of any source, with a relative name for each image, from which outputs get their names."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from dreamfleet.datasets.errors import DataError
from dreamfleet.datasets.index.exclusions import BadFile
from dreamfleet.datasets.index.sources import FOLDER, ScanOptions, SourceImage, find_source
from dreamfleet.datasets.storage.object_store import is_address
from dreamfleet.datasets.storage.storage import Storage

log = logging.getLogger(__name__)

LOGGED = 20  # maximum number of unusable files that are logged individually
_UNSAFE = re.compile(r"[^\w./+@=,() -]|\.\.+", re.ASCII)


class SetImage(NamedTuple):
    """One image: its name within the set (such as `10_cat/a.jpg`), and its URI, mask's URI and caption."""

    name: str
    uri: str
    mask: str | None
    caption: str | None


class ImageSet(NamedTuple):
    """The images of a set in order; ``source`` is the name of the source that lists it, ``bad`` its unusable files."""

    url: str
    source: str
    images: list[SetImage]
    bad: list[BadFile]

    @property
    def is_folder(self) -> bool:
        """Whether the set is a folder on disk or in a bucket."""
        return self.source == FOLDER

    def stamps(self) -> dict[str, str]:
        """Return URI -> stamp of the set's files, see Source.stamps."""
        return find_source(self.url).stamps(self.url)


def list_set(url: str, options: ScanOptions) -> ImageSet:
    """List an image set: a folder, or a URL that another source reads.

    Raises DataError if it has no image, or as Source.scan does.
    """
    url = Storage(url).url if is_address(url) else url
    source = find_source(url)
    listing = source.scan(url, options)
    if not listing.images:
        raise DataError(f"no image in {url}. Name a folder of images (.png, .jpg, .webp ...), or another set")
    for file in listing.bad[:LOGGED]:
        log.warning("left out %s: %s", file.uri, file.reason)
    if len(listing.bad) > LOGGED:
        log.warning("left out %d more files: `dreamfleet data inspect` lists them", len(listing.bad) - LOGGED)
    own = [image.name for image in listing.images]
    if all(own) and len({name.casefold() for name in own}) == len(own):
        names = own
    elif source.name == FOLDER:
        root = Storage(url).url
        names = [_inside(root, image.uri) for image in listing.images]
    else:
        names = names_of(listing.images)
    images = [
        SetImage(name, image.uri, image.mask, image.caption)
        for name, image in zip(names, listing.images, strict=True)
    ]
    return ImageSet(url, source.name, images, listing.bad)


def names_of(images: Sequence[SourceImage]) -> list[str]:
    """Return a relative path for each image, all different: its URI without the folder that all images share.

    Characters outside of file names (of URIs such as `tar://shard.tar#a.png`) become `/` or `_`. Equal names get a part
    of the URI's hash.
    """
    paths = [_as_path(image.uri) for image in images]
    common = os.path.commonpath([path.rpartition("/")[0] or "/" for path in paths])
    names = [path[len(common.rstrip("/")) :].lstrip("/") for path in paths]
    counts = Counter(name.casefold() for name in names)
    return [
        name if counts[name.casefold()] == 1 else _with_hash(name, image.uri)
        for name, image in zip(names, images, strict=True)
    ]


def _inside(folder: str, uri: str) -> str:
    """Return the path of a file within a folder, whose name may be in another Unicode form."""
    composed = [unicodedata.normalize("NFC", text) for text in (uri, folder)]
    depth = composed[1].rstrip("/").count("/") + 1
    assert composed[0].startswith(composed[1].rstrip("/") + "/"), (uri, folder)
    return uri.split("/", depth)[depth]


def _as_path(uri: str) -> str:
    _, found, rest = uri.partition("://")
    if not found:
        return uri  # a path on this machine: any character of its name is kept
    if is_address(uri):
        return f"/{rest}"
    return "/" + _UNSAFE.sub("_", re.sub(r"[#?!]+", "/", rest)).strip("/")


def _with_hash(name: str, uri: str) -> str:
    stem, suffix = os.path.splitext(name)
    return f"{stem}-{hashlib.sha256(uri.encode('utf-8', 'surrogateescape')).hexdigest()[:8]}{suffix}"
