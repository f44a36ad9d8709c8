"""Checks that the images of many subjects exist, with few requests to buckets."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import yaml

from dreamfleet.datasets.errors import UserError
from dreamfleet.datasets.images.image_formats import IMAGE_SUFFIXES
from dreamfleet.datasets.index.list_source import SCHEME, list_url, read_list
from dreamfleet.datasets.index.sources import FOLDER, find_source
from dreamfleet.datasets.path_field import absolute_path
from dreamfleet.datasets.storage.disk import walk
from dreamfleet.datasets.storage.storage import Storage

CONCURRENT_LISTINGS = 16
_MISSING = "does not exist"
_IS_FOLDER = "is a folder; a list names images, and a folder of images is a cell of its own"
_NO_IMAGE = f"holds no image ({', '.join(IMAGE_SUFFIXES[:5])}, ...)"


def read_place(cell: Any, folder: str) -> str:
    """Return ``data.instance_data_dir`` for a cell: a folder, an image, or a list of images; a list may be text.

    Relative paths start at ``folder``. Raises ValueError for anything else.
    """
    if isinstance(cell, str) and cell.lstrip().startswith("["):
        try:
            cell = yaml.safe_load(cell)
        except yaml.YAMLError as error:
            raise ValueError(f"{cell!r} is not a list of images: write [a.png, b.png]") from error
    if isinstance(cell, str):
        if cell.lower().endswith(IMAGE_SUFFIXES):
            cell = [cell]
        else:
            return absolute_path(cell, folder)
    if not isinstance(cell, list) or not cell or not all(isinstance(path, str) and path for path in cell):
        raise ValueError(f"{cell!r} is neither a folder nor a list of images: write [a.png, b.png]")
    return list_url([absolute_path(path, folder) for path in cell])


def paths_in(place: str) -> list[str]:
    """Return the folder, or the listed images, of a place."""
    return read_list(place) if place.startswith(f"{SCHEME}://") else [place]


def find_faults(places: Iterable[str]) -> dict[str, str]:
    """Return the reason for each place (see :func:`read_place`) whose images do not exist.

    A bucket is asked once for each folder that contains places, so it is not known whether a folder in a bucket holds
    images or only other files. Places of other sources are not checked.
    """
    faults: dict[str, str] = {}
    in_buckets: dict[str, list[str]] = {}  # folder or file -> the places that need it
    for place in places:
        try:
            source = find_source(place).name
            needed = read_list(place) if source == SCHEME else [place] if source == FOLDER else []
        except UserError as error:
            faults[place] = str(error)
            continue
        for address in needed:
            if "://" in address:
                in_buckets.setdefault(address, []).append(place)
            elif fault := _fault_here(address, is_file=source == SCHEME):
                faults[place] = f"{address} {fault}"
    for address, fault in _faults_in_buckets(in_buckets).items():
        faults |= dict.fromkeys(in_buckets[address], f"{address} {fault}")
    return faults


def _fault_here(path: str, *, is_file: bool) -> str | None:
    if is_file:
        return _IS_FOLDER if os.path.isdir(path) else None if os.path.isfile(path) else _MISSING
    if not os.path.isdir(path):
        return "is a file, not a folder of images" if os.path.exists(path) else _MISSING
    try:
        has_image = any(name.lower().endswith(IMAGE_SUFFIXES) for name in walk(path, True, None))
    except UserError as error:
        return f"cannot be read: {error}"
    return None if has_image else _NO_IMAGE


def _faults_in_buckets(addresses: Mapping[str, Any]) -> dict[str, str]:
    inside: dict[str, list[str]] = {}
    for address in addresses:
        inside.setdefault(address.rstrip("/").rpartition("/")[0], []).append(address)

    def check(parent: str) -> dict[str, str]:
        folder = Storage(parent)
        try:
            names = {*folder.list_dirs(), *folder.list()}
        except UserError as error:
            return dict.fromkeys(inside[parent], f"cannot be read: {error}")
        return {
            address: _MISSING
            for address in inside[parent]
            if address.rstrip("/").rpartition("/")[2] not in names
        }

    # A folder directly in a bucket has the bucket as parent; a whole bucket as a place is not checked.
    parents = [parent for parent in inside if not parent.endswith(":/")]
    with ThreadPoolExecutor(CONCURRENT_LISTINGS, thread_name_prefix="subjects") as pool:
        found = pool.map(check, parents)
        return {address: fault for faults in found for address, fault in faults.items()}
