"""Decides how the images of a concept are listed: its captions and masks, and the folders that are skipped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dreamfleet.datasets.config import Concept, DataConfig
from dreamfleet.datasets.index.exclusions import CLASS, MASKS
from dreamfleet.datasets.index.sources import ScanOptions
from dreamfleet.datasets.processing.mapping import Mapper, in_parallel


def scan_options(
    concept: Concept, data: DataConfig, excluded: Mapping[str, str], mapper: Mapper = in_parallel
) -> ScanOptions:
    """Return the options of the scan of one concept's images; ``excluded``: folders to skip, address -> purpose."""
    own = data.for_set(concept)
    return ScanOptions(
        own.caption_extension,
        own.caption_column,
        concept.mask_dir,
        recursive=concept.recursive,
        excluded=excluded,
        edits_for=data if data.use_edits else None,
        mapper=mapper,
        allow_private=data.allow_private_urls,
    )


def excluded_folders(concepts: Sequence[Concept], excluded: Mapping[str, str]) -> dict[str, str]:
    """Return the folders that a recipe names for other purposes than training images: address -> purpose."""
    return {**places(concepts, "mask_dir", MASKS), **places(concepts, "class_data_dir", CLASS), **excluded}


def places(concepts: Sequence[Concept], key: str, what: str) -> dict[str, str]:
    """Return the addresses that concepts have under a key: address -> purpose."""
    return {place: what for concept in concepts if (place := getattr(concept, key)) is not None}
