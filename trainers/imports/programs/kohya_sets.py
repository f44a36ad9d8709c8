"""Reads the folders of images in a dataset config of kohya-ss/sd-scripts."""

from __future__ import annotations

from typing import Any

from dreamfleet.trainers.imports.draft import Draft
from dreamfleet.trainers.imports.image_sets import ImageSet, with_metadata
from dreamfleet.trainers.imports.programs import kohya_image_keys as keys
from dreamfleet.trainers.imports.programs.common import put_resolution
from dreamfleet.trainers.imports.rules import Effect, To, number, plain
from dreamfleet.trainers.imports.settings import Setting, Settings

_LEVELS = ("datasets.*.subsets.*.", "datasets.*.", "general.")


def read_subsets(settings: Settings, draft: Draft) -> list[ImageSet]:
    """Return the folders of a dataset config, whose options are inherited from its dataset and [general]."""
    sets = []
    resolutions: dict[str, Any] = {}
    for item in settings.found.get("datasets.*.subsets.*.image_dir", []):
        place = item.where.rpartition(".")[0]
        dataset = place.partition(".subsets")[0]
        masks = settings.at(f"{place}.conditioning_data_dir")
        sets.append(
            ImageSet(
                item.where,
                with_metadata(draft, item.where, settings.at(f"{place}.metadata_file"), item.value),
                prompt=settings.at(f"{place}.class_tokens"),
                repeats=int(number(_inherited(settings, place, "num_repeats", 1))),
                is_class=plain(settings.at(f"{place}.is_reg")) is True,
                masks=str(masks) if masks else None,
                options=_own_options(settings, place, draft),
            )
        )
        resolutions[dataset] = _inherited(settings, place, "resolution", 512)
        size = _inherited(settings, place, "batch_size", None)
        if size is not None and len(resolutions) == 1:
            draft.put("train.train_batch_size", size, source=f"{dataset}.batch_size")
    for number_, (dataset, value) in enumerate(resolutions.items()):
        if number_ == 0:
            put_resolution(draft, f"{dataset}.resolution", value)
        elif value != next(iter(resolutions.values())):
            reason = "all images of a recipe have one resolution; that of the first dataset is used"
            draft.leave(f"{dataset}.resolution", value, Effect.CHANGES, reason)
    return sets


def with_inherited(settings: Settings) -> Settings:
    """Return settings in which an option that folders inherit is one of all folders: the first folder's.

    Options are those of the folder, its dataset, or [general], in this order. What another folder has instead is kept
    under ``keys.OWN`` and the option if a set of a recipe can have it, else under ``keys.DIFFERENT``, to be reported.
    """
    images = settings.found.get("datasets.*.subsets.*.image_dir", [])
    every = [item.where.rpartition(".")[0] for item in images]
    folders = [place for place in every if plain(settings.at(f"{place}.is_reg")) is not True]
    if not folders:
        return settings
    apart = ("resolution", "batch_size", "conditioning_data_dir")
    names = [name for name in keys.IMAGES if name not in apart]
    places = {f"{prefix}{name}" for prefix in _LEVELS for name in names}
    result = Settings({key: items for key, items in settings.found.items() if key not in places})
    for name in names:
        values = {place: _found_at(settings, place, name) for place in folders}
        first = values[folders[0]]
        if first is not None:
            result.found.setdefault(name, []).append(first)
        for place, value in values.items():
            if (value and value.value) != (first and first.value):
                own = Setting(f"{place}.{name}", value.value if value else None)
                prefix = keys.OWN if name in keys.OF_ONE_SET else keys.DIFFERENT
                result.found.setdefault(f"{prefix}{name}", []).append(own)
    return result


def _own_options(settings: Settings, place: str, draft: Draft) -> dict[str, Any]:
    """Return the options that a folder has in place of those of the first one, under the names of a set."""
    found = {}
    for name in keys.OF_ONE_SET:
        rule = keys.IMAGES[name]
        for item in settings.found.get(f"{keys.OWN}{name}", []):
            if item.where == f"{place}.{name}" and isinstance(rule, To):
                default = [".caption"] if name == "caption_extension" else draft.ours.get(rule.key)
                value = default if item.value is None else rule.convert(item.value)
                found[rule.key.removeprefix("data.")] = value
    return found


def _found_at(settings: Settings, place: str, name: str) -> Setting | None:
    """Return an option of a folder, of its dataset, or of [general]."""
    dataset = place.partition(".subsets")[0]
    for where, prefix in zip((place, dataset, "general"), _LEVELS, strict=True):
        for item in settings.found.get(prefix + name, []):
            if item.where == f"{where}.{name}":
                return item
    return None


def _inherited(settings: Settings, place: str, name: str, default: Any) -> Any:
    found = _found_at(settings, place, name)
    return settings.get(name, default) if found is None else found.value
