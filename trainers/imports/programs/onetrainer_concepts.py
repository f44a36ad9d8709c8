"""Reads the concepts (folders of images) and samples (prompts of previews) of OneTrainer."""

from __future__ import annotations

import os
from typing import Any

from dreamfleet.trainers.imports.draft import Draft
from dreamfleet.trainers.imports.image_sets import ImageSet, write_sets
from dreamfleet.trainers.imports.rules import Effect, number
from dreamfleet.trainers.imports.settings import Settings


def write_concepts(settings: Settings, draft: Draft) -> None:
    sets, sources = [], set()
    for item in settings.found.get("concepts.*.path", []):
        place = item.where.rpartition(".")[0]
        at = settings.below(place)
        if at("enabled", True) is False:
            draft.leave(item.where, item.value, Effect.IGNORED, "the concept is switched off")
            continue
        if at("type", "STANDARD") == "VALIDATION" or at("validation_concept") is True:
            draft.put("validation.holdout", item.value, source=item.where, note="held-out images")
            continue
        if at("type") == "PRIOR_PREDICTION":
            draft.leave(
                item.where, item.value, Effect.CHANGES, "there is no loss on the untuned model's predictions"
            )
            continue
        repeats = number(at("balancing", at("repeats", 1.0)))
        if at("balancing_strategy", "REPEATS") != "REPEATS" or repeats != int(repeats):
            reason = "images are repeated whole times in an epoch; nearest whole number used"
            draft.leave(f"{place}.balancing", repeats, Effect.CHANGES, reason)
        source = at("text.prompt_source", "sample")
        sources.add(source)
        prompt = _read_prompt(draft, place, at("text.prompt_path")) if source == "concept" else None
        sets.append(ImageSet(item.where, str(item.value), prompt=prompt, repeats=max(1, round(repeats))))
    if sources == {"filename"}:
        draft.put("data.caption_from_filename", True, source="concepts.*.text.prompt_source")
        draft.put("data.use_captions", False, source="concepts.*.text.prompt_source")
    elif sources == {"concept"}:
        draft.put(
            "data.use_captions",
            False,
            source="concepts.*.text.prompt_source",
            note="one prompt for all images",
        )
    write_sets(draft, sets)


def _read_prompt(draft: Draft, place: str, path: Any) -> str:
    """Return the prompt in a file; several lines are drawn from there, and the first one is used."""
    found = draft.paths.image_folder(f"{place}.text.prompt_path", str(path or ""))
    if not os.path.isfile(found):
        draft.leave(
            f"{place}.text.prompt_path",
            path,
            Effect.CHANGES,
            "the file of prompts is missing: set the prompt",
        )
        return "SET-THE-PROMPT"
    with open(found, encoding="utf-8") as file:
        lines = [line.strip() for line in file if line.strip()]
    if len(lines) > 1:
        reason = f"one prompt is used, the first of {len(lines)}"
        draft.leave(f"{place}.text.prompt_path", path, Effect.CHANGES, reason)
    return lines[0] if lines else ""


def write_previews(settings: Settings, draft: Draft) -> None:
    prompts = [str(item.value) for item in settings.found.get("samples.*.prompt", []) if item.value]
    if prompts:
        draft.put("validation.prompts", prompts, source="samples", note="")
    for key, target in (("sample_after", "validation.steps"), ("backup_after", "train.checkpointing_steps")):
        value, unit = settings.get(key), settings.get(f"{key}_unit", "MINUTE")
        if value is not None and unit == "STEP":
            draft.put(target, int(number(value)), source=key)
        elif value is not None and unit != "NEVER":
            draft.leave(key, f"{value} {unit}", Effect.IGNORED, f"counted in steps: {target}")
