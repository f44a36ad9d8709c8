"""The source of tar shards in webdataset's layout: images, and captions and facts with the same key."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, BinaryIO, NamedTuple

from dreamfleet.datasets.config import MAX_PIXELS
from dreamfleet.datasets.decode_text import decode_text
from dreamfleet.datasets.errors import DataError, StorageError
from dreamfleet.datasets.images.image_formats import IMAGE_SUFFIXES, MASK_ENDING, UNREADABLE_SUFFIXES
from dreamfleet.datasets.index.caption_tables import caption_columns, columns_of
from dreamfleet.datasets.index.exclusions import BadFile, is_hidden, printable
from dreamfleet.datasets.index.facts import describe
from dreamfleet.datasets.index.listing_cache import scan_files
from dreamfleet.datasets.index.shard_files import names_shards, shard_files
from dreamfleet.datasets.index.sources import Listing, ScanOptions, Source, SourceImage
from dreamfleet.datasets.index.table_rows import is_fact
from dreamfleet.datasets.index.tar_members import Member, members
from dreamfleet.datasets.storage.range_reader import open_file
from dreamfleet.datasets.storage.storage import read_uri

SCHEME, SUFFIXES = "tar", (".tar",)
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
MOST_IMAGE = 512 * 2**20  # bytes of an image that is read
MOST_TEXT = 16 * 2**20  # bytes of a caption or of the facts about an image
_URI = re.compile(r"tar://(.*?)#(\d+)-(\d+)#(.*)", re.DOTALL)


class TarSource(Source):
    """Reads `shard.tar`, `shards-{0000..0031}.tar`, `shards/*.tar`, and folders of shards."""

    def matches(self, url: str) -> bool:
        """Return whether a URL names tar files."""
        return names_shards(url, (*SUFFIXES, *COMPRESSED))

    def scan(self, url: str, options: ScanOptions) -> Listing:
        """Read each shard once, in order, and list its images with their hashes, sizes, captions and masks.

        Damaged shards are listed as bad from the place of the damage on. Raises DataError if there is no shard.
        """
        files = shard_files(url.removeprefix(f"{SCHEME}://"), (*SUFFIXES, *COMPRESSED))
        extensions, column = tuple(options.caption_extension), options.caption_column
        scan = partial(scan_shard, extensions=extensions, column=column)
        keys = {"source": SCHEME, "extensions": list(extensions), "column": column}
        return scan_files(files, scan, keys, options.mapper)

    def read(self, uri: str) -> bytes:
        """Return the bytes of a member, by its range. Raises StorageError."""
        match = _URI.fullmatch(uri)
        if match is None:
            raise StorageError(f"{uri} is not the URI of an image in a tar file")
        return read_uri(match[1], start=int(match[2]), end=int(match[3]))


class _Part(NamedTuple):
    """A member that belongs to an image: where it is, and its content, or that of an image its facts."""

    member: Member
    content: Any


def scan_shard(file: str, *, extensions: Sequence[str], column: str | None) -> Listing:
    """List the images in one tar file."""
    found = Listing([])
    parts = _Parts(file, extensions, column)
    try:
        with open_file(file) as opened:
            for member in members(opened, file):
                parts.add(member, opened)
    except (DataError, StorageError) as error:
        found.bad.append(BadFile(file, str(error).removeprefix(f"{file}: ")))
    found.images, found.others = parts.images(), parts.others
    found.bad += parts.bad
    return found


class _Parts:
    """Collects the members of a shard by the name of the image that they belong to."""

    def __init__(self, file: str, extensions: Sequence[str], column: str | None):
        self.file, self.column = file, column
        self.bad: list[BadFile] = []
        self.others: Counter[str] = Counter()
        self._extensions = tuple(extension.lower() for extension in extensions)
        self._images: list[_Part] = []
        self._masks: dict[str, _Part] = {}
        self._captions: dict[str, tuple[int, str]] = {}  # name -> rank of the extension, caption
        self._facts: dict[str, Mapping[str, Any]] = {}

    def add(self, member: Member, file: BinaryIO) -> None:
        """Read a member if it is an image or belongs to one."""
        name = _plain(member.name)
        kind = _kind_of(name.lower(), self._extensions)
        if kind == "other" or is_hidden(name):
            self.others[os.path.splitext(name)[1].lower() or "no ending"] += 1
            return
        try:
            problem = member.problem or _PROBLEMS.get(kind, "")
            if problem:
                raise DataError(problem)
            content = _read(member, file, most=MOST_TEXT if kind in ("caption", "facts") else MOST_IMAGE)
            getattr(self, f"_add_{kind}")(member, name, content)
        except (DataError, StorageError) as error:
            uri = _uri(self.file, member)
            self.bad.append(BadFile(uri, str(error).removeprefix(f"{uri}: ")))

    def images(self) -> list[SourceImage]:
        """Return the images with what belongs to each."""
        return [self._image(part) for part in self._images]

    def _add_image(self, member: Member, name: str, content: bytes) -> None:
        facts = describe(content, uri=_uri(self.file, member), max_pixels=MAX_PIXELS)
        self._images.append(_Part(member, facts))

    def _add_mask(self, member: Member, name: str, content: bytes) -> None:
        part = _Part(member, hashlib.sha256(content).hexdigest())
        self._masks[name[: -len(MASK_ENDING)]] = part

    def _add_caption(self, member: Member, name: str, content: bytes) -> None:
        ending = next(one for one in self._extensions if name.lower().endswith(one))
        rank, text = self._extensions.index(ending), decode_text(content, uri=_uri(self.file, member))
        for key in _keys(name, ending):
            if key not in self._captions or rank < self._captions[key][0]:
                self._captions[key] = rank, text

    def _add_facts(self, member: Member, name: str, content: bytes) -> None:
        try:
            found = json.loads(decode_text(content, uri=_uri(self.file, member)))
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"not JSON ({type(error).__name__}). Write an object of facts about the image"
            ) from error
        if not isinstance(found, dict):
            raise DataError("not a JSON object of facts about the image")
        for key in _keys(name, ".json"):
            self._facts.setdefault(key, found)

    def _image(self, part: _Part) -> SourceImage:
        name = _plain(part.member.name)
        stem, key = os.path.splitext(name)[0], _key(name)
        caption = next((self._captions[one] for one in (name, stem, key) if one in self._captions), None)
        facts = next((self._facts[one] for one in (name, stem, key) if one in self._facts), {})
        mask = next((self._masks[one] for one in (name, stem, key) if one in self._masks), None)
        text = caption[1].strip() if caption else _caption_in(facts, self.column)
        info = part.content
        return SourceImage(
            _uri(self.file, part.member),
            text or None,
            info.sha256,
            info.width,
            info.height,
            _uri(self.file, mask.member) if mask else None,
            mask.content if mask else "",
            info.bytes,
            info.format,
            info.orientation,
            f"{os.path.splitext(self.file.rpartition('/')[2])[0]}/{printable(name)}",
            {name: value for name, value in facts.items() if is_fact(value)} or None,
        )


# Kinds of members that are images or belong to one, but cannot be read.
_PROBLEMS = {
    "unreadable": "its format is not supported. Convert it to PNG or JPEG",
    "shard": "a tar file inside a tar file, which is not read. Name it as a source of its own",
}


def _kind_of(name: str, extensions: Sequence[str]) -> str:
    if name.endswith(MASK_ENDING):
        return "mask"
    endings = {
        "image": IMAGE_SUFFIXES,
        "caption": tuple(extensions),
        "facts": (".json",),
        "unreadable": UNREADABLE_SUFFIXES,
        "shard": (*SUFFIXES, *COMPRESSED),
    }
    return next((kind for kind, suffixes in endings.items() if name.endswith(suffixes)), "other")


def _read(member: Member, file: BinaryIO, *, most: int) -> bytes:
    if member.size > most:
        raise DataError(f"it has {member.size:,} bytes, more than the {most:,} that are read")
    file.seek(member.start)
    content = file.read(member.size)
    if len(content) < member.size:
        raise DataError(f"truncated: the shard ends after {len(content):,} of its {member.size:,} bytes")
    return content


def _plain(name: str) -> str:
    """Return the name of a member as a path inside the shard; nothing is written to it."""
    return "/".join(part for part in name.split("/") if part not in ("", ".", ".."))


def _key(name: str) -> str:
    """Return webdataset's key: the path up to the first dot of the file name."""
    folder, separator, file = name.rpartition("/")
    return f"{folder}{separator}{file.partition('.')[0]}"


def _keys(name: str, ending: str) -> list[str]:
    """Return the names of images that a caption belongs to: with its stem, or with its key."""
    return list(dict.fromkeys((name[: -len(ending)], _key(name))))


def _caption_in(facts: Mapping[str, Any], column: str | None) -> str:
    names = caption_columns(columns_of([facts]), column)
    value = next((facts[name] for name in names if facts[name]), "")
    lines = value if isinstance(value, list) else [value]
    return "\n".join(line for line in lines if isinstance(line, str)).strip()


def _uri(file: str, member: Member) -> str:
    return f"{SCHEME}://{file}#{member.start}-{member.start + member.size}#{printable(member.name)}"
