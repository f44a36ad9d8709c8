"""Indexes the image sets that a recipe's `data:` section names: training images, class images, held-out images."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import MappingProxyType

from dreamfleet.datasets.buckets import MOST_ENLARGED
from dreamfleet.datasets.config import Concept, DataConfig
from dreamfleet.datasets.errors import DataError, StorageError
from dreamfleet.datasets.index.concepts import load_concepts
from dreamfleet.datasets.index.exclusions import MASKS, TRAINED_ON, BadFile
from dreamfleet.datasets.index.filters import rules_of
from dreamfleet.datasets.index.image_folder import ImageFolder
from dreamfleet.datasets.index.index import Index, Known, build_index
from dreamfleet.datasets.index.scan_options import excluded_folders, places, scan_options
from dreamfleet.datasets.index.set_store import set_folder, store, stored_columns, stored_phashes
from dreamfleet.datasets.index.set_table import build_set
from dreamfleet.datasets.index.sources import FOLDER, ScanOptions, find_source
from dreamfleet.datasets.processing.mapping import Mapper, in_parallel
from dreamfleet.datasets.storage.storage import Storage

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ClassSet:
    """The class images of one concept. ``folder`` is None if they are generated beside the run."""

    concept: int
    folder: str | None
    prompt: str


@dataclass(frozen=True)
class Sets:
    """The image sets of a run. `concepts[i]` describes the rows of `instances` whose concept is i."""

    instances: Index
    class_sets: list[ClassSet]
    concepts: list[Concept]


def load_sets(
    data: DataConfig,
    *,
    verify: bool | None = None,
    known: Known | None = None,
    excluded: Mapping[str, str] = MappingProxyType({}),
    keep: bool = False,
    mapper: Mapper = in_parallel,
) -> Sets:
    """Index all training images that a recipe names; its paths must be absolute.

    The repeats of a row are those of its concept (for example from kohya's folder name) times `data.repeats`. Class
    images are returned as folders without an index, since they may not exist yet. Files that `known` recognises are not
    read. Images that filters exclude (``data.where``, ``min_size``, ``duplicates``) are counted in ``excluded``.
    ``keep``: store the tables of the sets in ``data.cache_dir``. ``mapper`` calls a function for many images.
    Subfolders that the recipe names for another purpose are skipped: class images, masks, and `excluded`
    (address -> purpose). Raises DataError as build_index does.
    """
    concepts = load_concepts(data)
    others = excluded_folders(concepts, excluded)
    if data.caption_column:
        _require_table(data.caption_column, concepts, others)
    indexes = [
        _index(
            concept, data, number=number, others=others, verify=verify, known=known, keep=keep, mapper=mapper
        )
        for number, concept in enumerate(concepts)
    ]
    class_sets = [
        ClassSet(number, concept.class_data_dir, concept.class_prompt)
        for number, concept in enumerate(concepts)
        if concept.class_prompt is not None
    ]
    weights = [concept.weight for concept in concepts]
    if any(weights) and data.repeats > 1:
        log.warning(
            "data.repeats %d has no effect: the sets have weights, which decide how often an image is used. Remove it, "
            "or give the sets repeats in place of weights",
            data.repeats,
        )
    weighted = weigh(indexes, weights)
    return Sets(_large_enough(Index.concat(weighted), data), class_sets, concepts)


def _index(
    concept: Concept,
    data: DataConfig,
    *,
    number: int,
    others: Mapping[str, str],
    verify: bool | None,
    known: Known | None,
    keep: bool,
    mapper: Mapper,
) -> Index:
    """Return the index of one concept's images. Raises DataError if none is usable or too many are bad."""
    folder = set_folder(concept.instance_data_dir, data)
    rules = rules_of(data, concept.where)
    built = build_set(
        concept.instance_data_dir,
        scan_options(concept, data, others, mapper),
        max_pixels=data.max_pixels,
        verify=verify,
        known=known,
        rules=rules,
        columns=stored_columns(concept.instance_data_dir, data) if rules.conditions else (),
        phashes=stored_phashes(folder) if rules.needs_phash else {},
    )
    if keep:
        store(built, folder)
    elif rules.needs_phash and data.cache_dir is None:
        with suppress(StorageError):  # a cache that cannot be written costs time only
            store(built, folder)
    built.require_images(max_bad_fraction=data.max_bad_fraction)
    return built.index(concept=number, repeats=concept.repeats * data.repeats)


def weigh(indexes: Sequence[Index], weights: Sequence[float | None]) -> list[Index]:
    """Return indexes with the repeats that give each its weight in the images of an epoch.

    Every image is used at least once per epoch. Without weights the indexes are returned as they are.
    """
    if not any(weights):
        return list(indexes)
    shares = [(weight or 0) / len(index) for index, weight in zip(indexes, weights, strict=True)]
    least = min(shares)
    return [index.with_uses(share / least) for index, share in zip(indexes, shares, strict=True)]


def _require_table(column: str, concepts: Sequence[Concept], others: Mapping[str, str]) -> None:
    """Raise DataError if all concepts are plain folders and none of them has a metadata table."""
    urls = [concept.instance_data_dir for concept in concepts]
    if all(find_source(url).name == FOLDER for url in urls) and not any(
        ImageFolder(url, excluded=others).tables for url in urls
    ):
        raise DataError(
            f"data.caption_column {column!r} is set, but there is no metadata.jsonl, .csv or .parquet in {urls[0]}. "
            "Remove it, or add the table"
        )


def load_class_images(
    folder: Storage | str,
    data: DataConfig,
    *,
    concept: int = 0,
    verify: bool | None = None,
    known: Known | None = None,
) -> Index | None:
    """Index the class images in a folder and its subfolders; None if there are none yet."""
    url = folder.url if isinstance(folder, Storage) else folder
    concepts = load_concepts(data)
    others = {**places(concepts, "mask_dir", MASKS), **places(concepts, "instance_data_dir", TRAINED_ON)}
    options = ScanOptions(data.caption_extension, excluded=others)
    if not find_source(url).count(url, options):
        return None
    return build_index(
        url, options, concept=concept, role="class", max_pixels=data.max_pixels, verify=verify, known=known
    )


def load_held_out(folder: str, data: DataConfig) -> Index:
    """Index the held-out images of a recipe; subfolders with training images are skipped."""
    others = places(load_concepts(data), "instance_data_dir", TRAINED_ON)
    return build_index(
        folder, ScanOptions(data.caption_extension, excluded=others), max_pixels=data.max_pixels
    )


def _large_enough(index: Index, data: DataConfig) -> Index:
    """Leave out images that are too small for buckets if images are not enlarged (``data.bucket_no_upscale``).

    Those are images with a side below a quarter of ``data.bucket_reso_steps``. Raises DataError if none remains.
    """
    if not (data.enable_bucket and data.bucket_no_upscale):
        return index
    least = data.bucket_reso_steps / MOST_ENLARGED
    sides = index.sizes()
    kept = [row for row, size in enumerate(sides) if min(size) >= least]
    if len(kept) == len(index):
        return index
    bad = [
        BadFile(
            index.row(row).uri,
            f"{size[0]} x {size[1]} pixels: with data.bucket_no_upscale no image is enlarged, and a side is below a "
            f"quarter of data.bucket_reso_steps {data.bucket_reso_steps}. Lower it, or remove the image",
        )
        for row, size in enumerate(sides)
        if min(size) < least
    ]
    if not kept:
        raise DataError(f"no usable image: {bad[0].uri}: {bad[0].reason}")
    captions = index.column("caption")
    large = index.take(kept, [captions[row] for row in kept])
    large.bad = sorted([*index.bad, *bad])
    return large
