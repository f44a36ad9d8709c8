"""Writes the image folders of other trainers as sections of `data:`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from dreamfleet.datasets.index.metadata_source import metadata_url
from dreamfleet.trainers.imports.draft import Draft
from dreamfleet.trainers.imports.rules import Effect

PLACEHOLDER = "SET-THE-FOLDER-OF-THE-IMAGES"
CLASS_PROMPT = "SET-THE-PROMPT-OF-THE-CLASS-IMAGES"


@dataclass
class ImageSet:
    """A folder of images: its place in the settings, prompt, repeats, and whether it holds class images.

    ``options``: caption options of `data:` that this folder alone has.
    """

    where: str
    path: str
    prompt: str | None = None
    repeats: int = 1
    is_class: bool = False
    masks: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


def with_metadata(draft: Draft, where: str, file: Any, folder: Any) -> str:
    """Return the address of kohya's metadata file and the folder of its images, both mapped; or only the folder."""
    folder = str(folder or "")
    if not file:
        return folder
    found = draft.paths.image_folder(where, str(file))
    return metadata_url(found, draft.paths.image_folder(where, folder) if folder else "")


def write_sets(draft: Draft, sets: Sequence[ImageSet]) -> None:
    """Write image folders as `data.instance_data_dir`, or several as `data.sets`, with their class images."""
    subjects = [each for each in sets if not each.is_class]
    classes = [each for each in sets if each.is_class]
    if not subjects:
        return
    if len(subjects) == 1 and len(classes) < 2:
        _write_one(draft, subjects[0], classes[0] if classes else None)
        return
    entries = [_entry(draft, each) for each in sets]
    draft.put("data.sets", entries, source=subjects[0].where.rpartition(".")[0])
    if any(each.masks for each in subjects):
        draft.put("data.alpha_mask", True, source=subjects[0].where)
    if classes:
        use_class_images(draft, classes[0].where)


def _entry(draft: Draft, each: ImageSet) -> dict[str, Any]:
    """Return an entry of `data.sets`."""
    entry: dict[str, Any] = {"source": draft.paths.image_folder(each.where, each.path)}
    entry |= {"prompt": each.prompt} if each.prompt else {}
    entry |= {"repeats": each.repeats} if each.repeats != 1 else {}
    entry |= {"mask_dir": draft.paths.image_folder(each.where, each.masks)} if each.masks else {}
    if each.is_class:
        entry |= {"is_reg": True}
        if not each.prompt:
            entry["prompt"] = CLASS_PROMPT
            draft.leave(each.where, each.path, Effect.BLOCKS, "the class images have no prompt: set it")
    return entry | each.options


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
        draft.put("data.class_prompt", CLASS_PROMPT, source=of_class.where, note="class images need a prompt")
        reason = "the class images have no prompt: set data.class_prompt"
        draft.leave(of_class.where, of_class.path, Effect.BLOCKS, reason)
