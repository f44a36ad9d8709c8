"""A recipe's `data:` section to what a run trains on: concepts, one index of pictures, class sets."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass

from pydantic import ValidationError

from dreamfleet.datasets.captions import decode_text
from dreamfleet.datasets.config import Concept, DataConfig, concept_with_absolute_paths
from dreamfleet.datasets.errors import DataError, StorageError
from dreamfleet.datasets.index import Index, Known, build_index
from dreamfleet.datasets.storage import Storage, read_uri

log = logging.getLogger(__name__)

_REPEATS_AND_NAME = re.compile(r"^(\d+)_(.*)$", re.DOTALL)


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


def load_sets(data: DataConfig, *, verify: bool | None = None, known: Known | None = None) -> Sets:
    """Index all pictures a recipe names; its paths are absolute already (`data.with_absolute_paths`).

    A row's repeats are its concept's (kohya: the folder name's) times `data.repeats`. Class pictures are
    named, not indexed: they may not exist yet. Files that `known` tells of are not read. Raises DataError, as
    build_index does.
    """
    concepts = load_concepts(data)
    indexes = [
        build_index(
            concept.instance_data_dir,
            concept=number,
            caption_extension=data.caption_extension,
            max_pixels=data.max_pixels,
            repeats=concept.repeats * data.repeats,
            verify=verify,
            exclude=_inside(concept.instance_data_dir, [other.class_data_dir for other in concepts]),
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
    return Sets(Index.concat(indexes), class_sets, concepts)


def load_concepts(data: DataConfig) -> list[Concept]:
    """The concepts a `data:` section describes, in order: their numbers are positions in this list."""
    if isinstance(data.concepts_list, str):
        return _read_concepts_file(data.concepts_list)
    if data.concepts_list is not None:
        return list(data.concepts_list)
    if data.train_data_dir is not None:
        subsets = _subsets(data.train_data_dir)
        if subsets:
            return _kohya_concepts(data, subsets)
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


def _inside(folder: str, class_folders: list[str | None]) -> Callable[[str], bool]:
    """Says of a file name in `folder` whether it belongs to a class folder kept inside it."""
    root = Storage(folder).url + "/"
    places = [Storage(place).url + "/" for place in class_folders if place is not None]
    prefixes = tuple(place.removeprefix(root) for place in places if place.startswith(root) and place != root)
    return lambda name: name.startswith(prefixes)


def _read_concepts_file(path: str) -> list[Concept]:
    """ShivamShrirao's concepts_list.json; its relative folders start at the file's own."""
    try:
        entries = json.loads(decode_text(read_uri(path), uri=path))
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
            concepts.append(concept_with_absolute_paths(Concept.model_validate(entry), folder))
        except ValidationError as error:
            told = "; ".join(
                f"{'.'.join(str(part) for part in item['loc']) or 'entry'}: {item['msg']}"
                for item in error.errors()
            )
            raise DataError(f"concepts_list {path}, concept {number}: {told}") from error
    return concepts


def _subsets(folder: str) -> list[tuple[str, int, str]]:
    """kohya's subfolders `10_sks dog`: (address, repeats, name), by name; [] when there are none."""
    storage = Storage(folder)
    try:
        names = storage.list_dirs()
    except StorageError as error:
        raise DataError(f"pictures: {error}") from error
    matched = [(name, match) for name in names if (match := _REPEATS_AND_NAME.match(name))]
    others = [name for name in names if not _REPEATS_AND_NAME.match(name) and not name.startswith(".")]
    if matched and others:
        log.warning("%s: subfolders without a number in front are left out: %s", folder, ", ".join(others))
    for name, match in matched:
        if int(match[1]) < 1:
            raise DataError(
                f"{storage.path(name)}: 0 repeats. Begin the folder's name with 1 or more, or move it away"
            )
    return [(storage.path(name), int(match[1]), match[2].strip()) for name, match in matched]


def _kohya_concepts(data: DataConfig, subsets: list[tuple[str, int, str]]) -> list[Concept]:
    regs = _subsets(data.class_data_dir) if data.class_data_dir else []
    if data.class_data_dir and not regs:
        if data.class_prompt is None:
            raise DataError(
                f"class_data_dir {data.class_data_dir} has no subfolder such as '1_dog', and "
                "data.class_prompt is not set: the class prompt is not known. Do one of both"
            )
        regs = [(data.class_data_dir, 1, data.class_prompt)]
    concepts = []
    for folder, repeats, name in subsets:
        prompt = name or data.instance_prompt
        class_folder, class_prompt = _class_of(name, regs, alone=len(subsets) == 1)
        concepts.append(
            Concept(
                instance_data_dir=folder,
                instance_prompt=prompt,
                class_data_dir=class_folder,
                class_prompt=class_prompt or data.class_prompt,
                repeats=repeats,
                mask_dir=f"{data.mask_dir}/{folder.rpartition('/')[2]}" if data.mask_dir else None,
            )
        )
    unused = [
        folder for folder, _, _ in regs if folder not in {concept.class_data_dir for concept in concepts}
    ]
    if unused:
        names = ", ".join(name for _, _, name in subsets)
        raise DataError(
            f"class folders that belong to no instance folder: {', '.join(unused)}. Name them by the last "
            f"words of an instance folder ('1_dog' for '10_sks dog'); there are: {names}"
        )
    return concepts


def _class_of(name: str, regs: list[tuple[str, int, str]], *, alone: bool) -> tuple[str | None, str | None]:
    """The class folder whose name ends the instance's ("dog" for "sks dog"), the longest; or the only one."""
    fitting = [reg for reg in regs if f" {name}".endswith(f" {reg[2]}") and reg[2]]
    if not fitting and len(regs) == 1:
        fitting = regs
    if not fitting and alone and regs:
        fitting = regs[:1]
    if not fitting:
        return None, None
    folder, _, prompt = max(fitting, key=lambda reg: len(reg[2]))
    return folder, prompt or None
