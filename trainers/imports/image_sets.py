"""Writes the image folders of other trainers as sections of `data:`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from dreamfleet.trainers.imports.draft import Draft
from dreamfleet.trainers.imports.rules import Effect

PLACEHOLDER = "SET-THE-FOLDER-OF-THE-IMAGES"


@dataclass
class ImageSet:
    """A folder of images: its place in the settings, prompt, repeats, and whether it holds class images.

    ``options``: values of other keys of `data:` that hold for this folder only.
    """

    where: str
    path: str
    prompt: str | None = None
    repeats: int = 1
    is_class: bool = False
    masks: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


def write_sets(draft: Draft, sets: Sequence[ImageSet]) -> None:
    """Write image folders as `data.instance_data_dir` or `data.concepts_list`, with their class images.

    A recipe has one folder of class images for each subject; class images without a prompt cannot be used.
    """
    subjects = [each for each in sets if not each.is_class]
    classes = [each for each in sets if each.is_class]
    _write_options(draft, sets)
    if not subjects:
        return
    for extra in classes[1:] if len(subjects) == 1 else classes[len(subjects) :]:
        draft.leave(extra.where, extra.path, Effect.CHANGES, "a subject has one folder of class images here")
    if len(subjects) == 1:
        _write_one(draft, subjects[0], classes[0] if classes else None)
        return
    concepts = []
    for number, subject in enumerate(subjects):
        of_class = classes[min(number, len(classes) - 1)] if classes else None
        entry: dict[str, Any] = {"instance_data_dir": draft.paths.image_folder(subject.where, subject.path)}
        entry |= {"instance_prompt": subject.prompt} if subject.prompt else {}
        entry |= {"repeats": subject.repeats} if subject.repeats != 1 else {}
        entry |= {"mask_dir": draft.paths.image_folder(subject.where, subject.masks)} if subject.masks else {}
        if of_class is not None:
            entry["class_data_dir"] = draft.paths.image_folder(of_class.where, of_class.path)
            entry["class_prompt"] = of_class.prompt or "SET-THE-PROMPT-OF-THE-CLASS-IMAGES"
        concepts.append(entry)
    draft.put("data.concepts_list", concepts, source=subjects[0].where.rpartition(".")[0])
    if classes:
        use_class_images(draft, classes[0].where)


def _write_one(draft: Draft, subject: ImageSet, of_class: ImageSet | None) -> None:
    draft.put("data.instance_data_dir", subject.path, source=subject.where)
    if subject.prompt:
        draft.put(
            "data.instance_prompt",
            subject.prompt,
            source=subject.where,
            note="the prompt of images without a caption",
        )
    if subject.repeats != 1:
        draft.put("data.repeats", subject.repeats, source=subject.where)
    if subject.masks:
        draft.put("data.mask_dir", subject.masks, source=subject.where)
        draft.put("data.alpha_mask", True, source=subject.where)
    if of_class is not None:
        draft.put("data.class_data_dir", of_class.path, source=of_class.where)
        if of_class.prompt:
            draft.put("data.class_prompt", of_class.prompt, source=of_class.where)
        _need_prompt(draft, of_class)
        use_class_images(draft, of_class.where)


def use_class_images(draft: Draft, source: str) -> None:
    """Switch prior preservation with the existing class images on; it excludes buckets."""
    note = "a batch has as many class images as images of the subject; there, both kinds share a batch"
    draft.put("method.with_prior_preservation", True, source=source, note=note)
    draft.put("method.num_class_images", 1, source=source, note="none are generated, as there")
    if draft.get("data.enable_bucket"):
        draft.drop("data.enable_bucket")
        reason = "buckets cannot be combined with class images; remove the class images to keep the buckets"
        draft.leave("enable_bucket", True, Effect.CHANGES, reason)


def _need_prompt(draft: Draft, of_class: ImageSet) -> None:
    if not of_class.prompt:
        prompt = "SET-THE-PROMPT-OF-THE-CLASS-IMAGES"
        draft.put("data.class_prompt", prompt, source=of_class.where, note="class images need a prompt")
        reason = "the class images have no prompt: set data.class_prompt"
        draft.leave(of_class.where, of_class.path, Effect.BLOCKS, reason)


def _write_options(draft: Draft, sets: Sequence[ImageSet]) -> None:
    """Write the options of image folders, which must agree in one recipe; the first one's are used."""
    subjects = [each for each in sets if not each.is_class] or list(sets)
    for key in dict.fromkeys(key for each in subjects for key in each.options):
        values = [(each.where, each.options.get(key, draft.ours.get(key))) for each in subjects]
        where, first = values[0]
        draft.put(key, first, source=where)
        for other, value in values[1:]:
            if value != first:
                reason = f"{key} is the same for all folders of a recipe; that of {where} is used: {first!r}"
                draft.leave(other, value, Effect.CHANGES, reason)
