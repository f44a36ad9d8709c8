"""Builds the index of a run from the images at a URL."""

from __future__ import annotations

import logging
import os

from dreamfleet.datasets.config import MAX_PIXELS
from dreamfleet.datasets.index.exclusions import BadFile as BadFile
from dreamfleet.datasets.index.exclusions import summary
from dreamfleet.datasets.index.facts import FileInfo as FileInfo
from dreamfleet.datasets.index.facts import Known as Known
from dreamfleet.datasets.index.filters import Rules
from dreamfleet.datasets.index.image_index import SCHEMA as SCHEMA
from dreamfleet.datasets.index.image_index import Index as Index
from dreamfleet.datasets.index.image_index import Row as Row
from dreamfleet.datasets.index.set_table import build_set
from dreamfleet.datasets.index.sources import ScanOptions
from dreamfleet.datasets.storage.storage import Storage

log = logging.getLogger(__name__)

_DEFAULTS = ScanOptions()
_NO_RULES = Rules()
LOGGED = 20  # maximum number of bad files that are logged individually


def build_index(
    place: Storage | str | os.PathLike[str],
    options: ScanOptions = _DEFAULTS,
    *,
    concept: int = 0,
    role: str = "instance",
    repeats: int = 1,
    max_pixels: int = MAX_PIXELS,
    verify: bool | None = None,
    known: Known | None = None,
    rules: Rules = _NO_RULES,
) -> Index:
    """Index the images at a URL: a folder on disk or in a bucket, or a URL that another source reads.

    Each file is read once, by ``options.mapper``, unless the source lists its hash and size or ``known(uri)`` returns
    them. With ``verify`` (None: for at most 2000 images) every image is decoded completely, so
    that truncated files are found before training. An image is left out and listed in ``.bad`` if it or its mask cannot
    be used, and counted in ``.excluded`` if ``rules`` leave it out.

    Raises DataError with the URL, the problem and the remedy if there is no usable image or the source itself is
    unusable; see :meth:`Source.scan`.
    """
    built = build_set(
        place.url if isinstance(place, Storage) else os.fspath(place),
        options,
        max_pixels=max_pixels,
        verify=verify,
        known=known,
        rules=rules,
    )
    built.require_images()
    return built.index(concept=concept, role=role, repeats=repeats)


def log_left_out(index: Index) -> None:
    """Log the files that an index leaves out: bad files as warnings, skipped and excluded files in one line each."""
    for file in index.bad[:LOGGED]:
        log.warning("left out %s: %s", file.uri, file.reason)
    if len(index.bad) > LOGGED:
        log.warning("left out %d more files: `dreamfleet data inspect` lists them", len(index.bad) - LOGGED)
    if index.skipped:
        log.info("skipped %s", summary(index.skipped))
    if index.excluded:
        log.info("excluded by filters: %s", summary(index.excluded))
