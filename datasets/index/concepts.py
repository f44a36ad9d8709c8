"""A recipe's `data:` section to what a run trains on: concepts, one index of images, class sets, held-out images."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from pydantic import ValidationError

from dreamfleet.datasets.buckets import MOST_ENLARGED
from dreamfleet.datasets.config import Concept, DataConfig
from dreamfleet.datasets.errors import DataError, StorageError
from dreamfleet.datasets.index.exclusions import CLASS, MASKS, TRAINED_ON, BadFile
from dreamfleet.datasets.index.image_folder import ImageFolder
from dreamfleet.datasets.index.index import Index, Known, build_index
from dreamfleet.datasets.index.kohya_folders import kohya_concepts, refuse_subset, subsets_of
from dreamfleet.datasets.path_field import resolve_paths
from dreamfleet.datasets.storage.storage import Storage, read_text


@dataclass(frozen=True)
class ClassSet:
    """The class pictures of one concept: where they are, or None while they are still to be generated."""

    concept: int
    folder: str | None
    prompt: str


@dataclass(frozen=True)
class Sets:
    """What a run trains on. `concepts[i]` describes the rows of `instances` whose concept is i."""

    instances: Index
    class_sets: list[ClassSet]
    concepts: list[Concept]


def load_sets(
    data: DataConfig,
    *,
    verify: bool | None = None,
    known: Known | None = None,
    apart: Mapping[str, str] = MappingProxyType({}),
) -> Sets:
    """Index all images a recipe names; its paths are absolute already.

    A row's repeats are its concept's (kohya: the folder name's) times `data.repeats`. Class images are named, not
    indexed: they may not exist yet. Files that `known` tells of are not read. Folders inside the image folders that
    hold something else are passed over: class images, masks, and those of `apart` (address -> what they hold). Raises
    DataError, as build_index does.
    """
    concepts = load_concepts(data)
    others = places_apart(concepts, apart)
    if data.caption_column and not any(
        ImageFolder(one.instance_data_dir, apart=others).tables for one in concepts
    ):
        raise DataError(
            f"data.caption_column {data.caption_column!r} is a column of no table: there is no metadata.jsonl, .csv or "
            f".parquet in {concepts[0].instance_data_dir}. Leave it out, or put the table there"
        )
    indexes = [
        build_index(
            concept.instance_data_dir,
            concept=number,
            caption_extension=data.caption_extension,
            caption_column=data.caption_column,
            max_pixels=data.max_pixels,
            repeats=concept.repeats * data.repeats,
            verify=verify,
            apart=others,
            mask_dir=concept.mask_dir,
            known=known,
        )
        for number, concept in enumerate(concepts)
    ]
    class_sets = [
        ClassSet(number, concept.class_data_dir, concept.class_prompt)
        for number, concept in enumerate(concepts)
        if concept.class_prompt is not None
    ]
    return Sets(_large_enough(Index.concat(indexes), data), class_sets, concepts)


def places_apart(concepts: Sequence[Concept], apart: Mapping[str, str]) -> dict[str, str]:
    """Return the folders that hold something else than a recipe's training images, and what."""
    return {**_places(concepts, "mask_dir", MASKS), **_places(concepts, "class_data_dir", CLASS), **apart}


def load_class_images(
    folder: Storage | str,
    data: DataConfig,
    *,
    concept: int = 0,
    verify: bool | None = None,
    known: Known | None = None,
) -> Index | None:
    """Index the class images of a folder by the rule of all images, subfolders too; None where there are none yet."""
    storage = folder if isinstance(folder, Storage) else Storage(folder)
    concepts = load_concepts(data)
    others = {**_places(concepts, "mask_dir", MASKS), **_places(concepts, "instance_data_dir", TRAINED_ON)}
    if not storage.exists() or not ImageFolder(storage, apart=others).images:
        return None
    return build_index(
        storage,
        concept=concept,
        role="class",
        caption_extension=data.caption_extension,
        max_pixels=data.max_pixels,
        verify=verify,
        apart=others,
        known=known,
    )


def load_held_out(folder: str, data: DataConfig) -> Index:
    """Index the held-out images of a recipe; folders of training images inside are passed over."""
    others = _places(load_concepts(data), "instance_data_dir", TRAINED_ON)
    return build_index(
        folder, caption_extension=data.caption_extension, max_pixels=data.max_pixels, apart=others
    )


def _large_enough(index: Index, data: DataConfig) -> Index:
    """Leave out images that buckets without enlarging cannot show: a side is less than a quarter of a step."""
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
            f"{size[0]} x {size[1]} pixels: data.bucket_no_upscale enlarges nothing, and a side is below a quarter of "
            f"data.bucket_reso_steps {data.bucket_reso_steps}. Lower those, or remove the image",
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


def _places(concepts: Sequence[Concept], key: str, what: str) -> dict[str, str]:
    return {place: what for concept in concepts if (place := getattr(concept, key)) is not None}


def load_concepts(data: DataConfig) -> list[Concept]:
    """The concepts a `data:` section describes, in order: their numbers are positions in this list."""
    if isinstance(data.concepts_list, str):
        return _read_concepts_file(data.concepts_list)
    if data.concepts_list is not None:
        return list(data.concepts_list)
    if data.train_data_dir is not None:
        subsets = subsets_of(data.train_data_dir)
        if subsets:
            return kohya_concepts(data, subsets)
        refuse_subset(data.train_data_dir)
    folder = data.instance_data_dir or data.train_data_dir
    assert folder is not None  # DataConfig checked it
    if data.class_data_dir is not None and data.class_prompt is None:
        raise DataError(
            f"class_data_dir {data.class_data_dir} without class_prompt: {folder} has no subfolders such as "
            "'10_sks dog', so the class prompt is not known. Set data.class_prompt"
        )
    return [
        Concept(
            instance_data_dir=folder,
            instance_prompt=data.instance_prompt,
            class_data_dir=data.class_data_dir,
            class_prompt=data.class_prompt,
            mask_dir=data.mask_dir,
        )
    ]


def _read_concepts_file(path: str) -> list[Concept]:
    """ShivamShrirao's concepts_list.json; its relative folders start at the file's own."""
    try:
        entries = json.loads(read_text(path))
    except StorageError as error:
        raise DataError(f"concepts_list: {error}") from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"concepts_list {path}, line {error.lineno}, column {error.colno}: not JSON "
            f"({error.msg}). Mend the file"
        ) from error
    if not isinstance(entries, list) or not entries:
        raise DataError(
            f"concepts_list {path}: write a list of objects with instance_data_dir and instance_prompt"
        )
    folder = path.rpartition("/")[0] or "/"
    concepts = []
    for number, entry in enumerate(entries):
        try:
            concepts.append(resolve_paths(Concept.model_validate(entry), folder))
        except ValidationError as error:
            told = "; ".join(
                f"{'.'.join(str(part) for part in item['loc']) or 'entry'}: {item['msg']}"
                for item in error.errors()
            )
            raise DataError(f"concepts_list {path}, concept {number}: {told}") from error
    return concepts
