"""The built-in source: a folder of images on disk or in a bucket, including kohya's layout of numbered subfolders."""

from __future__ import annotations

import os
import time
from typing import Any

from dreamfleet.datasets.config import Concept, DataConfig
from dreamfleet.datasets.errors import StorageError
from dreamfleet.datasets.index.caption_files import Captions
from dreamfleet.datasets.index.exclusions import BadFile
from dreamfleet.datasets.index.image_folder import ImageFolder
from dreamfleet.datasets.index.kohya_folders import kohya_concepts, refuse_subset, subsets_of
from dreamfleet.datasets.index.sources import Listing, ScanOptions, Source, SourceImage, one_concept
from dreamfleet.datasets.storage.bucket_keys import stamp_of
from dreamfleet.datasets.storage.disk import explain_errors
from dreamfleet.datasets.storage.object_store import bucket_at
from dreamfleet.datasets.storage.storage import Storage

SETTLED_SECONDS = (
    2.0  # a more recent file may change again without a new modification time (clock resolution)
)


class FolderSource(Source):
    """Reads image folders; :class:`ImageFolder` matches captions and masks to images."""

    def matches(self, url: str) -> bool:
        """Return True: every URL that no other source matches is treated as a folder."""
        return True

    def scan(self, url: str, options: ScanOptions) -> Listing:
        """List a folder's images with their captions and masks.

        Raises DataError if the folder does not exist, and a single DataError that lists all unreadable captions and
        tables.
        """
        files = _open(url, options)
        captions = Captions(files, options.caption_column)
        names = sorted(files.images)
        texts = captions.of_all(names)
        missing = [
            BadFile(f"{files.storage.url}/{name}", f"named in {table}, but does not exist")
            for name, table in captions.absent
        ]
        return Listing(
            images=[
                SourceImage(files.storage.path(name), caption, mask=files.masks.get(name))
                for name, caption in zip(names, texts, strict=True)
            ],
            bad=files.bad + missing,
            skipped=files.skipped,
            others=files.others,
            shared={files.storage.path(file): images for file, images in files.shared().items()},
        )

    def concepts(self, url: str, data: DataConfig) -> list[Concept]:
        """Return one concept per numbered subfolder (kohya's layout), or one concept for a folder without them."""
        if subsets := subsets_of(url):
            return kohya_concepts(data, subsets)
        refuse_subset(url)
        return [one_concept(url, data)]

    def stamps(self, url: str) -> dict[str, str]:
        """Return the stamps of all files in a folder and its subfolders, by address."""
        return stamps_of(Storage(url))

    def count(self, url: str, options: ScanOptions) -> int:
        """Count the images without reading captions; 0 for a folder that does not exist."""
        return len(_open(url, options).images) if Storage(url).exists() else 0


def _open(url: str, options: ScanOptions) -> ImageFolder:
    return ImageFolder(
        url,
        recursive=options.recursive,
        caption_extension=options.caption_extension,
        mask_dir=options.mask_dir,
        excluded=options.excluded,
    )


def stamps_of(folder: Storage) -> dict[str, str]:
    """Return address -> stamp of all files in a folder and its subfolders.

    Local files modified in the last :data:`SETTLED_SECONDS` seconds are left out.
    """
    if folder.is_local:
        found = {}
        before = time.time() - SETTLED_SECONDS
        for name in folder.list("", True):
            path = folder.path(name)
            with explain_errors("check", path):
                status = os.stat(path) if os.path.exists(path) else None
            if status is not None and status.st_mtime < before:
                found[path] = f"{status.st_size} {status.st_mtime_ns}"
        return found

    def find(fs: Any, key: str) -> dict[str, str]:
        try:
            entries = fs.find(key, detail=True)
        except FileNotFoundError:
            return {}
        return {
            f"{folder.scheme}://{name}": stamp for name, one in entries.items() if (stamp := stamp_of(one))
        }

    return bucket_at(folder.url).run("list", folder.url, find)


def stamp_of_file(address: str) -> str:
    """Return the stamp of one file; "" if it was modified in the last seconds or cannot be looked at."""
    storage = Storage(address)
    try:
        if storage.is_local:
            status = os.stat(storage.url)
            settled = status.st_mtime < time.time() - SETTLED_SECONDS
            return f"{status.st_size} {status.st_mtime_ns}" if settled else ""
        bucket = bucket_at(storage.url)
        return stamp_of(bucket.run("check", storage.url, lambda fs, key: fs.info(key))) or ""
    except (OSError, StorageError):
        return ""
