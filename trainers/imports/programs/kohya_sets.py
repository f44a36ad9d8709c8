"""Reads the folders of images in a dataset config of kohya-ss/sd-scripts."""

from __future__ import annotations

from typing import Any

from dreamfleet.trainers.imports.draft import Draft
from dreamfleet.trainers.imports.image_sets import ImageSet
from dreamfleet.trainers.imports.programs import kohya_image_keys as keys
from dreamfleet.trainers.imports.programs.common import put_resolution
from dreamfleet.trainers.imports.rules import Effect, number, plain
from dreamfleet.trainers.imports.settings import Setting, Settings

_LEVELS = ("datasets.*.subsets.*.", "datasets.*.", "general.")


def read_subsets(settings: Settings, draft: Draft) -> list[ImageSet]:
    """Return the folders of a dataset config, whose options are inherited from its dataset and [general]."""
    sets = []
    resolutions: dict[str, Any] = {}
    for item in settings.found.get("datasets.*.subsets.*.image_dir", []):
        place = item.where.rpartition(".")[0]
        dataset = place.partition(".subsets")[0]
        masks = _at(settings, place, "conditioning_data_dir")
        sets.append(
            ImageSet(
                item.where,
                str(item.value),
                prompt=_at(settings, place, "class_tokens"),
                repeats=int(number(_inherited(settings, place, "num_repeats", 1))),
                is_class=plain(_at(settings, place, "is_reg")) is True,
                masks=str(masks) if masks else None,
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
    """Return settings in which an option that a folder inherits is one of the folder.

    Options are those of the folder, its dataset, or [general], in this order. One value is kept of those that agree;
    the others are reported.
    """
    folders = [
        item
        for item in settings.found.get("datasets.*.subsets.*.image_dir", [])
        if plain(_at(settings, item.where.rpartition(".")[0], "is_reg")) is not True
    ]
    apart = ("resolution", "batch_size", "conditioning_data_dir")
    names = [name for name in keys.IMAGES if name not in apart]
    places = [f"{prefix}{name}" for prefix in _LEVELS for name in names]
    found = {key: items for key, items in settings.found.items() if key not in places or not folders}
    result = Settings(found)
    for name in names if folders else ():
        values = [_found_at(settings, item.where.rpartition(".")[0], name) for item in folders]
        given = [(item, value) for item, value in zip(folders, values, strict=True) if value is not None]
        if given:
            first = values[0].value if values[0] is not None else None
            kept = next(value for _, value in given)
            found.setdefault(name, []).append(kept)
            different = [value for value in values if (value.value if value is not None else None) != first]
            found.setdefault(f"{keys.DIFFERENT}{name}", []).extend(
                each for each in different if each is not None
            )
    return result


def _found_at(settings: Settings, place: str, name: str) -> Setting | None:
    """Return an option of a folder, of its dataset, or of [general]."""
    dataset = place.partition(".subsets")[0]
    for where, prefix in zip((place, dataset, "general"), _LEVELS, strict=True):
        for item in settings.found.get(prefix + name, []):
            if item.where == f"{where}.{name}":
                return item
    return None


def _at(settings: Settings, place: str, name: str) -> Any:
    key = "datasets.*.subsets.*." + name
    return next((item.value for item in settings.found.get(key, ()) if item.where == f"{place}.{name}"), None)


def _inherited(settings: Settings, place: str, name: str, default: Any) -> Any:
    found = _found_at(settings, place, name)
    return settings.get(name, default) if found is None else found.value
