"""Image sources: the interface that reads the URLs of a recipe's `data:` section, and the registry of sources.

The built-in sources read a folder on disk or in a bucket, and images that are named one by one. Installed packages add
others, such as a shard format or a table of URLs, through the entry-point group `dreamfleet.sources`; a source is used
for every URL that it matches.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

from dreamfleet.datasets.config import CAPTION_EXTENSIONS, Concept, DataConfig
from dreamfleet.datasets.errors import DataError, StorageError
from dreamfleet.datasets.images.image_formats import ATTENTION_ENDING
from dreamfleet.datasets.images.masks import Mask
from dreamfleet.datasets.index.exclusions import BadFile, Skipped
from dreamfleet.datasets.processing.mapping import Mapper, in_parallel
from dreamfleet.datasets.registry import Registry
from dreamfleet.datasets.storage.object_store import is_address
from dreamfleet.datasets.storage.storage import Storage, read_uri

FOLDER = "folder"  # the source that reads every URL that no other source matches


class SourceImage(NamedTuple):
    """One image that a source lists. Hashes and sizes are left empty if they are unknown without reading the image.

    ``uri`` is a local path, a bucket address, or ``NAME://...`` if the source called NAME reads the file itself, for
    example as a byte range of a shard. ``sha256`` is the hash of the image file's bytes. ``width`` and ``height`` are
    in pixels after the EXIF rotation. ``mask`` is a URI of the same kind as ``uri``. ``name`` is a relative path that
    tells the images of the source apart, such as `10_cat/a.jpg`; ``columns`` are other facts that the source has about
    the image, for `data.where`: texts, numbers, booleans and lists of texts.
    """

    uri: str
    caption: str | None = None
    sha256: str = ""
    width: int = 0
    height: int = 0
    mask: str | None = None
    mask_sha256: str = ""
    bytes: int = 0
    format: str = ""
    orientation: int = 0
    name: str = ""
    columns: Mapping[str, Any] | None = None


@dataclass
class Listing:
    """The content of a source: its images, unusable files with the reason, and deliberately skipped files.

    ``others`` counts files that are not images, by extension. ``shared`` maps a caption file to the images that share
    it.
    """

    images: list[SourceImage]
    bad: list[BadFile] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)
    shared: dict[str, list[str]] = field(default_factory=dict)

    def add(self, one: SourceImage | BadFile) -> None:
        """Add an image, or the reason why it cannot be used."""
        if isinstance(one, BadFile):
            self.bad.append(one)
        else:
            self.images.append(one)

    def extend(self, other: Listing) -> None:
        """Add the content of another listing."""
        self.images += other.images
        self.bad += other.bad
        self.skipped += other.skipped
        self.others += other.others
        self.shared |= other.shared


@dataclass(frozen=True)
class ScanOptions:
    """The keys of the `data:` section that affect a scan, and ``excluded``: address of a folder to skip -> purpose.

    ``edits_for``: the section at whose training sizes the set's edits are applied after the scan; None: without edits.
    """

    caption_extension: Sequence[str] = CAPTION_EXTENSIONS
    caption_column: str | None = None
    mask_dir: str | None = None
    recursive: bool = True
    excluded: Mapping[str, str] = field(default_factory=dict)
    edits_for: DataConfig | None = None
    mapper: Mapper = in_parallel  # scans shards and reads images
    allow_private: bool = False  # read http(s) addresses of private networks


class Source(ABC):
    """Base class of image sources. The constructor takes no arguments; one instance per process serves all URLs.

    ``matches`` and ``scan`` run in the process that builds the index, ``read`` also in workers on other machines.
    ``name`` is the name under which the source is registered. With ``reads_web``, ``matches`` is also asked about
    http(s) addresses.
    """

    name: str
    reads_web = False

    @abstractmethod
    def matches(self, url: str) -> bool:
        """Return whether this source reads ``url``, an absolute path or an address, which may not exist.

        The source called NAME reads all ``NAME://...`` URLs, whether it matches them or not.
        """

    @abstractmethod
    def scan(self, url: str, options: ScanOptions) -> Listing:
        """List the images at ``url`` without reading them, in the same order on every machine.

        Raises DataError if the source itself is unusable.
        """

    def read(self, uri: str) -> bytes:
        """Return the bytes of an image file or mask that :meth:`scan` listed. Raises StorageError."""
        return read_uri(uri)

    def concepts(self, url: str, data: DataConfig) -> list[Concept]:
        """Return the concepts at a URL (``data.train_data_dir`` or ``data.concepts_list``); one unless overridden."""
        return [one_concept(url, data)]

    def stamps(self, url: str) -> dict[str, str]:
        """Return URI -> stamp of the files at ``url``; a stamp changes with the content, such as size and mtime.

        With ``data.cache_dir`` a file with an unchanged stamp is not read again. Only needed for images whose hash and
        size :meth:`scan` does not list.
        """
        return {}

    def count(self, url: str, options: ScanOptions) -> int:
        """Return the number of images at ``url``."""
        return len(self.scan(url, options).images)


SOURCES: Registry[type[Source]] = Registry(
    "source",
    group="dreamfleet.sources",
    builtin={
        FOLDER: "dreamfleet.datasets.index.folder_source:FolderSource",
        "list": "dreamfleet.datasets.index.list_source:ListSource",
        "tar": "dreamfleet.datasets.index.tar_source:TarSource",
        "parquet": "dreamfleet.datasets.index.parquet_source:ParquetSource",
        "arrow": "dreamfleet.datasets.index.arrow_source:ArrowSource",
        "table": "dreamfleet.datasets.index.table_source:TableSource",
        "kohya": "dreamfleet.datasets.index.kohya_toml_source:KohyaTomlSource",
        "onetrainer": "dreamfleet.datasets.index.onetrainer_source:OneTrainerSource",
        "simpletuner": "dreamfleet.datasets.index.simpletuner_source:SimpleTunerSource",
        "everydream": "dreamfleet.datasets.index.everydream_source:EveryDreamSource",
        "metadata": "dreamfleet.datasets.index.metadata_source:MetadataSource",
        "url": "dreamfleet.datasets.index.url_source:UrlSource",
        "edited": "dreamfleet.datasets.index.edited_source:EditedSource",
    },
)


def find_source(url: str) -> Source:
    """Return the source that reads a URL: the one named by its scheme, the one that matches, or the folder source.

    Raises DataError for an unknown scheme, and if several sources match.
    """
    if own := _named_in(url):
        return own
    found = {name: _instance(kind, name) for name, kind in SOURCES.items() if name != FOLDER}
    asked = found if is_address(url) else {name: one for name, one in found.items() if one.reads_web}
    matching = [name for name, source in asked.items() if source.matches(url)]
    if not matching and not is_address(url):
        names = [name for name in SOURCES.names() if name != FOLDER]
        raise DataError(
            f"{url}: no source reads {url.partition('://')[0]}:// URLs. Use a folder, s3:// or gs://, or install the "
            f"package that adds the source (installed: {', '.join(names) or 'none'})"
        )
    if len(matching) > 1:
        raise DataError(f"{url} is matched by several sources: {', '.join(matching)}. Uninstall all but one")
    return found[matching[0]] if matching else _instance(SOURCES.get(FOLDER), FOLDER)


def read_image_file(uri: str) -> bytes:
    """Return the bytes of an image file or mask, given its URI in an index, in any process. Raises StorageError."""
    own = _named_in(uri)
    return read_uri(uri) if own is None else own.read(uri)


def read_mask(uri: str) -> Mask:
    """Read a mask, given its URI in an index. Raises StorageError."""
    return Mask(read_image_file(uri), os.path.splitext(uri)[0].endswith(ATTENTION_ENDING))


def can_read(uri: str) -> bool:
    """Return whether this machine can read the file at a URI of an index. Raises StorageError if a bucket fails."""
    own = _named_in(uri)
    if own is None:
        folder, _, name = uri.rpartition("/")
        return Storage(folder or "/").exists(name)
    try:
        own.read(uri)
    except StorageError:
        return False
    return True


def one_concept(url: str, data: DataConfig) -> Concept:
    """Return the concept of a `data:` section with a single subject, whose images are at ``url``.

    Raises DataError if there is a class folder without a class prompt.
    """
    if data.class_data_dir is not None and data.class_prompt is None:
        raise DataError(
            f"class_data_dir {data.class_data_dir} without class_prompt: {url} has no subfolders such as '10_sks dog', "
            "so the class prompt is unknown. Set data.class_prompt"
        )
    return Concept(
        instance_data_dir=url,
        instance_prompt=data.instance_prompt,
        class_data_dir=data.class_data_dir,
        class_prompt=data.class_prompt,
        mask_dir=data.mask_dir,
    )


def _named_in(url: str) -> Source | None:
    """Return the source whose name is the scheme of a URL; None if there is none."""
    scheme = url.partition("://")[0]
    if is_address(url) or scheme == FOLDER or scheme not in SOURCES:
        return None
    return _instance(SOURCES.get(scheme), scheme)


@lru_cache
def _instance(kind: type[Source], name: str) -> Source:
    source = kind()
    source.name = name
    return source
