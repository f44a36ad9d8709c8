"""Converts the entries of ``data.sets`` to concepts: one for each subject of each entry."""

from __future__ import annotations

from collections.abc import Sequence

from dreamfleet.datasets.config import Concept, DataConfig
from dreamfleet.datasets.errors import DataError
from dreamfleet.datasets.index.kohya_folders import class_of, subsets_of
from dreamfleet.datasets.index.sources import FOLDER, find_source, one_concept
from dreamfleet.datasets.set_config import OVERRIDES, ImageSet


def concepts_of_sets(data: DataConfig) -> list[Concept]:
    """Return the concepts of ``data.sets``; entries with ``is_reg`` become the class images of the others.

    Raises DataError for class images that belong to no set, and for a source that cannot be read.
    """
    entries = data.sets or []
    sets = [one for one in entries if not one.is_reg]
    concepts = [concept for one in sets for concept in _concepts_of(one, data)]
    return with_class_images(concepts, [one for one in entries if one.is_reg])


def with_class_images(concepts: Sequence[Concept], regs: Sequence[ImageSet]) -> list[Concept]:
    """Return concepts with the class images whose prompt is the end of theirs; a single class suits all of them.

    Raises DataError if class images belong to no concept.
    """
    classes = [(reg.source, reg.repeats, reg.prompt or "") for reg in regs]
    found = []
    for concept in concepts:
        folder, prompt = class_of(concept.instance_prompt or "", classes, alone=len(concepts) == 1)
        if folder is not None and concept.class_data_dir is None:
            concept = concept.model_copy(update={"class_data_dir": folder, "class_prompt": prompt})
        found.append(concept)
    used = {concept.class_data_dir for concept in found}
    if unused := [source for source, _, _ in classes if source not in used]:
        prompts = ", ".join(repr(concept.instance_prompt) for concept in concepts)
        raise DataError(
            f"class images that match no set: {', '.join(unused)}. Let the prompt of a set end in their prompt "
            f"('dog' for 'sks dog'); prompts of the sets: {prompts}"
        )
    return found


def _concepts_of(one: ImageSet, data: DataConfig) -> list[Concept]:
    """Return the concepts of one entry. Raises DataError for a weight of several subjects."""
    alone = data.model_copy(
        update={
            "sets": None,
            "train_data_dir": one.source,
            "instance_prompt": one.prompt,
            "class_data_dir": one.class_source,
            "class_prompt": one.class_prompt,
            "mask_dir": one.mask_dir,
        }
    )
    source = find_source(one.source)
    if source.name == FOLDER and not subsets_of(one.source):
        found = [one_concept(one.source, alone)]
    else:
        found = source.concepts(one.source, alone)
    if one.weight is not None and len(found) > 1:
        raise DataError(
            f"data.sets: {one.source} contains {len(found)} subjects, which have repeats of their own, and a weight. "
            "Use repeats in place of all weights, or list the subjects as sets"
        )
    options = {name: getattr(one, name) for name in OVERRIDES}
    return [
        concept.model_copy(
            update={
                **{name: value for name, value in options.items() if getattr(concept, name) is None},
                "repeats": concept.repeats * one.repeats,
                "weight": one.weight,
                "recursive": concept.recursive and one.recursive,
                "where": both_conditions(one.where, concept.where),
            }
        )
        for concept in found
    ]


def both_conditions(one: str | None, other: str | None) -> str | None:
    """Return the condition that two conditions hold; None if there is neither."""
    return f"({one}) and ({other})" if one and other else one or other
