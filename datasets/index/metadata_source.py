"""The source of kohya's metadata files, `in_json` of fine_tune.py: a JSON object of captions and tags by image.

``metadata:///data/meta.json#/data/images`` names the folder of the images as well; without it, it is the file's own.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from dreamfleet.datasets.errors import DataError, StorageError
from dreamfleet.datasets.index.exclusions import BadFile
from dreamfleet.datasets.index.folder_source import stamps_of
from dreamfleet.datasets.index.image_folder import ImageFolder
from dreamfleet.datasets.index.sources import Listing, ScanOptions, Source, SourceImage
from dreamfleet.datasets.storage.object_store import is_address
from dreamfleet.datasets.storage.storage import Storage, read_text

SCHEME = "metadata"
_KEYS = frozenset({"caption", "tags", "train_resolution"})


class MetadataSource(Source):
    """Reads the images that a metadata file names, with their captions and tags joined by a comma, as kohya's does.

    Keys are paths of images, absolute or relative to the folder, with or without the extension.
    """

    def matches(self, url: str) -> bool:
        """Return whether a URL is a JSON file of this layout."""
        if not is_address(url) or not url.lower().endswith(".json") or os.path.isdir(url):
            return False
        try:
            return _recognises(json.loads(read_text(url)))
        except (StorageError, DataError, ValueError, RecursionError):
            return False

    def scan(self, url: str, options: ScanOptions) -> Listing:
        """List the named images in the order of the file; those that do not exist are bad.

        Raises DataError if the file or the folder cannot be read.
        """
        file, folder = split_url(url)
        entries = _read(file)
        files = ImageFolder(folder, recursive=True, mask_dir=options.mask_dir, excluded=options.excluded)
        names = {name: name for name in files.images} | {
            os.path.splitext(name)[0]: name for name in sorted(files.images, reverse=True)
        }
        found = Listing([], skipped=files.skipped, others=files.others)
        bad = {one.uri: one.reason for one in files.bad}
        for key, entry in entries.items():
            name = names.get(_relative(key, folder))
            if name is None:
                place = files.storage.path(_relative(key, folder))
                reason = bad.get(place, f"named in {file}, but not an image in {folder}")
                found.bad.append(BadFile(place, reason))
                continue
            try:
                found.images.append(_image(files, name, entry))
            except DataError as error:
                found.bad.append(BadFile(files.storage.path(name), f"{file}: {error}"))
        return found

    def stamps(self, url: str) -> dict[str, str]:
        """Return the stamps of all files in the folder and its subfolders."""
        return stamps_of(Storage(split_url(url)[1]))


def metadata_url(file: str, folder: str) -> str:
    """Return the URL of a metadata file and the folder of its images."""
    return f"{SCHEME}://{file}#{folder}"


def split_url(url: str) -> tuple[str, str]:
    """Return the file and the folder of the images that a URL names."""
    file, _, folder = url.removeprefix(f"{SCHEME}://").partition("#")
    return file, folder or file.rpartition("/")[0] or "/"


def _recognises(content: Any) -> bool:
    if not isinstance(content, dict) or not content:
        return False
    entries = list(content.values())[:100]
    return all(isinstance(entry, dict) and not _KEYS.isdisjoint(entry) for entry in entries)


def _read(file: str) -> Mapping[str, Any]:
    try:
        content = json.loads(read_text(file))
    except StorageError as error:
        raise DataError(str(error)) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: not JSON ({error}). Correct the file") from error
    if not _recognises(content):
        raise DataError(
            f'{file}: not a metadata file. Write {{"a": {{"caption": "a cat", "tags": "cat, sofa"}}}} with a key for '
            "each image"
        )
    return content  # type: ignore[no-any-return]


def _relative(key: str, folder: str) -> str:
    """Return the path of an image below the folder; keys of Windows have backslashes."""
    return key.replace("\\", "/").removeprefix(folder.rstrip("/") + "/").removeprefix("./")


def _image(files: ImageFolder, name: str, entry: Any) -> SourceImage:
    if not isinstance(entry, dict):
        raise DataError(f"the entry of {name} is not an object with caption or tags")
    texts = {key: entry[key] for key in ("caption", "tags") if entry.get(key)}
    if wrong := [key for key, text in texts.items() if not isinstance(text, str)]:
        raise DataError(f"{wrong[0]} of {name} is not text")
    caption = ", ".join(text.strip() for text in texts.values()) or None
    return SourceImage(
        files.storage.path(name), caption, mask=files.masks.get(name), name=name, columns=dict(texts)
    )
