"""The source of EveryDream2's data folders: captions in YAML, text files or file names, and options per folder.

`global.yaml` has options for a folder and those below it, `local.yaml` and `multiply.txt` for one folder, `NAME.yaml` a
prompt and tags for one image.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import yaml

from dreamfleet.datasets.config import Concept, DataConfig
from dreamfleet.datasets.errors import DataError, StorageError
from dreamfleet.datasets.index.dataset_file import Found, mapping
from dreamfleet.datasets.index.exclusions import BadFile
from dreamfleet.datasets.index.folder_source import stamps_of
from dreamfleet.datasets.index.image_folder import ImageFolder
from dreamfleet.datasets.index.sources import Listing, ScanOptions, Source, SourceImage
from dreamfleet.datasets.storage.storage import Storage

SCHEME = "everydream"
GLOBAL, LOCAL = ("global.yaml", "global.yml"), ("local.yaml", "local.yml")
NUMBERS = {"multiply.txt": "multiply", "cond_dropout.txt": "cond_dropout"}
MARKERS = (*GLOBAL, *LOCAL, *NUMBERS)
_KNOWN = ("multiply", "cond_dropout", "shuffle_tags", "main_prompt", "tags", "rating", "max_caption_length")


class EveryDreamSource(Source):
    """Reads a folder with one of EveryDream2's option files at its top, or `everydream://FOLDER`."""

    def matches(self, url: str) -> bool:
        """Return whether a URL is a local folder with an option file of EveryDream2."""
        return "://" not in url and any(os.path.isfile(os.path.join(url, name)) for name in MARKERS)

    def concepts(self, url: str, data: DataConfig) -> list[Concept]:
        """Return a concept for each folder with images, with the repeats and dropout of its options."""
        root = Storage(url.removeprefix(f"{SCHEME}://"))
        found = Found(root.url, "EveryDream2", data)
        folders: dict[str, None] = {}
        for name in ImageFolder(root).images:
            folders.setdefault(name.rpartition("/")[0])
        concepts = [_concept(root, folder, found) for folder in folders]
        if not concepts:
            raise DataError(f"{root.url}: there are no images. Check the path")
        found.report()
        return concepts

    def scan(self, url: str, options: ScanOptions) -> Listing:
        """List the images of a folder (with ``options.recursive`` also of those below it) with their captions."""
        files = ImageFolder(
            url.removeprefix(f"{SCHEME}://"),
            recursive=options.recursive,
            mask_dir=options.mask_dir,
            excluded=options.excluded,
        )
        found = Listing([], files.bad, files.skipped, files.others)
        for name in sorted(files.images):
            try:
                caption = _caption(files, name)
            except (DataError, StorageError) as error:
                found.bad.append(BadFile(files.storage.path(name), str(error)))
            else:
                found.images.append(
                    SourceImage(files.storage.path(name), caption, mask=files.masks.get(name), name=name)
                )
        return found

    def stamps(self, url: str) -> dict[str, str]:
        """Return the stamps of all files in a folder and its subfolders."""
        return stamps_of(Storage(url.removeprefix(f"{SCHEME}://")))


def _concept(root: Storage, folder: str, found: Found) -> Concept:
    """Return the concept of one folder, with the options that it inherits."""
    options: dict[str, Any] = {}
    parts = folder.split("/") if folder else []
    for depth in range(len(parts) + 1):
        options |= _options(root, "/".join(parts[:depth]), GLOBAL)
    options |= _options(root, folder, LOCAL)
    for name, key in NUMBERS.items():
        if root.exists(place := f"{folder}/{name}" if folder else name):
            options[key] = root.read_text(place).strip()
    what = folder or "."
    found.unused(options, _KNOWN, f"{what}: ")
    multiply = _number(options.get("multiply", 1), f"{what}: multiply", found)
    dropout = options.get("cond_dropout")
    return found.concept(
        {
            "instance_data_dir": f"{SCHEME}://{root.path(folder) if folder else root.url}",
            "instance_prompt": options.get("main_prompt"),
            "repeats": found.whole_repeats(f"{what}: multiply", multiply),
            "recursive": False,
            "caption_dropout": None if dropout is None else _number(dropout, f"{what}: cond_dropout", found),
            "shuffle_tags": options.get("shuffle_tags"),
        },
        what,
    )


def _options(root: Storage, folder: str, names: tuple[str, ...]) -> Mapping[str, Any]:
    for name in names:
        place = f"{folder}/{name}" if folder else name
        if root.exists(place):
            return mapping(_yaml(root, place) or {}, "its content", root.path(place))
    return {}


def _yaml(root: Storage, name: str) -> Any:
    try:
        return yaml.safe_load(root.read_text(name))
    except (yaml.YAMLError, RecursionError) as error:
        raise DataError(
            f"{root.path(name)}: not YAML ({str(error).splitlines()[0]}). Correct the file"
        ) from error


def _caption(files: ImageFolder, name: str) -> str | None:
    """Return an image's caption: that of its YAML or text file, else the part of its name before the first `_`."""
    stem = os.path.splitext(name)[0]
    for file in (f"{stem}.yaml", f"{stem}.yml"):
        if files.storage.exists(file):
            values = mapping(_yaml(files.storage, file), "its content", files.storage.path(file))
            return _words(values, files.storage.path(file))
    if (text := files.caption_file(name)) is not None:
        return files.storage.read_text(text).strip() or None
    return stem.rpartition("/")[2].partition("_")[0].strip() or None


def _words(values: Mapping[str, Any], file: str) -> str | None:
    """Return prompt and tags, the heavier tags first, as one line for each alternative prompt."""
    prompts = values.get("main_prompt") or ""
    lines = prompts if isinstance(prompts, list) else [prompts]
    tags = [tag if isinstance(tag, dict) else {"tag": tag} for tag in values.get("tags") or ()]
    try:
        tags.sort(key=lambda tag: -float(tag.get("weight", 1.0)))
    except (TypeError, ValueError) as error:
        raise DataError(f"{file}: a weight of a tag is not a number. Correct it") from error
    words = [str(tag.get("tag", "")).strip() for tag in tags]
    return "\n".join(", ".join(filter(None, [str(line).strip(), *words])) for line in lines).strip() or None


def _number(value: Any, what: str, found: Found) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = -1.0
    if number < 0:
        raise DataError(f"{found.file}: {what} {value!r} is not a number from 0. Correct it")
    return number
