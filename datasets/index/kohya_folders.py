"""Reads kohya's folder layout: images in the subfolder `10_sks dog` get 10 repeats and the prompt `sks dog`."""

from __future__ import annotations

import logging
import re

from dreamfleet.datasets.config import Concept, DataConfig
from dreamfleet.datasets.errors import DataError, StorageError
from dreamfleet.datasets.images.image_formats import IMAGE_SUFFIXES
from dreamfleet.datasets.index.exclusions import is_system_folder
from dreamfleet.datasets.storage.storage import Storage

log = logging.getLogger(__name__)

_REPEATS_AND_NAME = re.compile(r"^(\d+)_(.*)$", re.DOTALL)


def subsets_of(folder: str) -> list[tuple[str, int, str]]:
    """Return the numbered subfolders, such as `10_sks dog`, as (address, repeats, name), sorted by folder name.

    Raises DataError for a folder with 0 repeats; logs a warning for images outside of numbered subfolders.
    """
    storage = Storage(folder)
    try:
        names = storage.list_dirs()
    except StorageError as error:
        raise DataError(f"images: {error}") from error
    matched = [(name, match) for name in names if (match := _REPEATS_AND_NAME.match(name))]
    others = [name for name in names if not _REPEATS_AND_NAME.match(name) and not is_system_folder(name)]
    if matched and others:
        log.warning(
            "%s: subfolders whose names do not begin with a number are left out: %s",
            folder,
            ", ".join(others),
        )
    if matched and (loose := [name for name in storage.list() if name.lower().endswith(IMAGE_SUFFIXES)]):
        log.warning(
            "%s: %d images beside the numbered folders are left out: %s ...", folder, len(loose), loose[0]
        )
    for name, match in matched:
        if int(match[1]) < 1:
            raise DataError(
                f"{storage.path(name)}: 0 repeats. Let the folder's name begin with at least 1, or move it away"
            )
    return [(storage.path(name), int(match[1]), match[2].strip()) for name, match in matched]


def refuse_subset(folder: str) -> None:
    """Raise DataError if ``folder`` is itself a numbered subfolder: its repeats and prompt would be ignored.

    Logs a warning if the numbered subfolders are one level too deep.
    """
    parent, _, name = Storage(folder).url.rpartition("/")
    if _REPEATS_AND_NAME.match(name):
        raise DataError(
            f"train_data_dir {folder}: {name!r} is a subfolder whose name begins with repeats. Use its parent, "
            f"{parent}; for a plain folder of that name, set data.instance_data_dir instead"
        )
    below = [
        (inner, name)
        for inner in Storage(folder).list_dirs()
        for name in Storage(folder).list_dirs(inner)
        if _REPEATS_AND_NAME.match(name) and not is_system_folder(inner)
    ]
    if below:
        inner, name = below[0]
        log.warning(
            "train_data_dir %s: the repeats and prompt in the name of %s/%s are not used. To use them, give %s/%s",
            folder,
            inner,
            name,
            folder,
            inner,
        )


def kohya_concepts(data: DataConfig, subsets: list[tuple[str, int, str]]) -> list[Concept]:
    """Return a concept for each numbered subfolder, with its repeats, prompt and matching class folder.

    Raises DataError if the class prompt is unknown or a class folder matches no subfolder.
    """
    regs = subsets_of(data.class_data_dir) if data.class_data_dir else []
    if data.class_data_dir and not regs:
        if data.class_prompt is None:
            raise DataError(
                f"class_data_dir {data.class_data_dir} has no subfolder such as '1_dog', and "
                "data.class_prompt is not set, so the class prompt is unknown. Add the folder or the prompt"
            )
        regs = [(data.class_data_dir, 1, data.class_prompt)]
    concepts = []
    for folder, repeats, name in subsets:
        prompt = name or data.instance_prompt
        class_folder, class_prompt = class_of(name, regs, alone=len(subsets) == 1)
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
            f"class folders that match no instance folder: {', '.join(unused)}. Name them after the last "
            f"words of an instance folder ('1_dog' for '10_sks dog'); instance folders: {names}"
        )
    return concepts


def class_of(name: str, regs: list[tuple[str, int, str]], *, alone: bool) -> tuple[str | None, str | None]:
    """Return folder and prompt of the class whose name is the longest suffix of ``name``: "dog" for "sks dog".

    Without a match, a single class folder is used, or for a single instance folder (``alone``) the first one.
    """
    matching = [reg for reg in regs if f" {name}".endswith(f" {reg[2]}") and reg[2]]
    if not matching and len(regs) == 1:
        matching = regs
    if not matching and alone and regs:
        matching = regs[:1]
    if not matching:
        return None, None
    folder, _, prompt = max(matching, key=lambda reg: len(reg[2]))
    return folder, prompt or None
