"""Writes edited captions and masks as files beside the images, on request."""

from __future__ import annotations

from typing import NamedTuple

from dreamfleet.cluster.browse.image_table import ImageTable
from dreamfleet.datasets.index.edits import Edit, EditTable
from dreamfleet.datasets.index.file_pairing import composed
from dreamfleet.datasets.index.image_folder import ImageFolder
from dreamfleet.datasets.index.sources import FOLDER, find_source, read_image_file
from dreamfleet.datasets.tools.tags import Captioned, write_captions


class Written(NamedTuple):
    """Numbers of captions and masks written, of edits that remain in the table, and addresses of backups."""

    captions: int
    masks: int
    kept: int
    backups: list[str]


def write_back(table: ImageTable) -> Written:
    """Write the captions and masks of a table's edits to sidecar files, and remove them from the tables of edits.

    A changed caption file is copied to a hidden folder first. Crops, focus points, exclusions and removed masks have no
    sidecar form and stay in the tables, as do all edits of sets that are not image folders. Raises DataError,
    StorageError.
    """
    captions = masks = kept = 0
    backups = []
    for url, edits in zip(table.urls, table.edit_tables, strict=True):
        if edits.edits and find_source(url).name == FOLDER:
            found = _write_set(url, edits, table)
            captions, masks = captions + found.captions, masks + found.masks
            backups += found.backups
        kept += len(edits.edits)
    return Written(captions, masks, kept, backups)


def _write_set(url: str, edits: EditTable, table: ImageTable) -> Written:
    data = table.data
    files = ImageFolder(url, caption_extension=data.caption_extension)
    names = {composed(name): name for name in files.images}
    texts: dict[str, str] = {}
    masks: dict[str, str] = {}
    remaining: dict[str, Edit] = {}
    for name, edit in edits.edits.items():
        if (file := names.get(name)) is None:
            continue
        if edit.caption is not None:
            texts[file] = edit.caption
        if mask := edits.mask_uri(edit):
            masks[file] = mask
        remaining[name] = edit._replace(caption=None, mask=None if edit.mask else edit.mask)
    backup = write_captions(Captioned(files, {}, data.caption_column), texts, None) if texts else None
    for file, place in masks.items():
        files.storage.write_bytes(f"{file}.mask.png", read_image_file(place))
    edits.save(remaining)
    return Written(len(texts), len(masks), 0, [backup] if backup else [])
