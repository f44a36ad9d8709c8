"""The source of OneTrainer's concepts JSON: a list of concepts, each with a folder, a prompt source and a balance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dreamfleet.datasets.config import Concept
from dreamfleet.datasets.errors import DataError, StorageError
from dreamfleet.datasets.index.dataset_file import DatasetFile, Found, is_list_of, mapping, mappings
from dreamfleet.datasets.storage.storage import read_text

_KNOWN = (
    "name",
    "path",
    "enabled",
    "type",
    "include_subdirectories",
    "balancing",
    "balancing_strategy",
    "image",
    "text",
)
_KNOWN_TOO = ("repeats", "validation_concept", "loss_weight")
_SILENT = ("seed", "__version", "image_variations", "text_variations", "concept_stats")
_TEXT = ("prompt_source", "prompt_path", "enable_tag_shuffling", "tag_delimiter", "keep_tags_count")
_TEXT_TOO = ("tag_dropout_enable", "tag_dropout_mode", "tag_dropout_probability")


class OneTrainerSource(DatasetFile):
    """Reads `concepts.json` of OneTrainer."""

    program, endings = "OneTrainer", (".json",)

    def recognises(self, content: Any) -> bool:
        """Return whether a JSON file is a list of objects with a path and a text or image section."""
        return is_list_of(content, "path", ("text", "image"))

    def read_concepts(self, content: Any, found: Found) -> list[Concept]:
        """Return the enabled training concepts."""
        concepts = []
        for number, values in enumerate(mappings(content, "concepts", found.file)):
            what = str(values.get("name") or f"concept {number}")
            kind = "VALIDATION" if values.get("validation_concept") else str(values.get("type", "STANDARD"))
            if not values.get("enabled", True):
                continue
            if kind != "STANDARD":
                found.differs(
                    f"{what}.type",
                    kind,
                    "is not used: set validation.holdout, or class images, in the recipe",
                )
                continue
            concepts.append(_concept(values, what, found))
        return concepts


def _concept(values: Mapping[str, Any], what: str, found: Found) -> Concept:
    found.unused(values, (*_KNOWN, *_KNOWN_TOO), f"{what}.", silent=_SILENT)
    if values.get("loss_weight", 1.0) != 1.0:
        found.differs(
            f"{what}.loss_weight", values["loss_weight"], "is not used: all images have the same weight"
        )
    image = mapping(values.get("image", {}), f"{what}.image", found.file)
    found.expect(f"{what}.image.enable_random_flip", image.get("enable_random_flip"), "random_flip")
    on = [key for key, value in image.items() if key.startswith("enable_") and value is True]
    for key in sorted(set(on) - {"enable_random_flip", "enable_crop_jitter"}):
        found.differs(f"{what}.image.{key}", True, "is not used")
    return found.concept(
        {
            "instance_data_dir": found.path(values["path"], f"{what}.path"),
            "repeats": _repeats(values, what, found),
            "recursive": bool(values.get("include_subdirectories", False)),
            **_captions(mapping(values.get("text", {}), f"{what}.text", found.file), what, found),
        },
        what,
    )


def _repeats(values: Mapping[str, Any], what: str, found: Found) -> int:
    balance = values.get("balancing", values.get("repeats", 1))
    if not isinstance(balance, int | float) or balance <= 0:
        raise DataError(f"{found.file}, {what}: balancing {balance!r} is not a number above 0. Correct it")
    if values.get("balancing_strategy", "REPEATS") != "REPEATS":
        found.differs(
            f"{what}.balancing", balance, "samples per epoch is not used: each image is used once per epoch"
        )
        return 1
    return found.whole_repeats(f"{what}.balancing", balance)


def _captions(text: Mapping[str, Any], what: str, found: Found) -> dict[str, Any]:
    """Return the caption options of a concept."""
    found.unused(
        text,
        (*_TEXT, *_TEXT_TOO),
        f"{what}.text.",
        silent=[key for key in text if _is_of_disabled(key, text)],
    )
    options: dict[str, Any] = {"shuffle_tags": text.get("enable_tag_shuffling")}
    if text.get("enable_tag_shuffling") or text.get("tag_dropout_enable"):
        options["keep_tokens"] = text.get("keep_tags_count")
        if str(text.get("tag_delimiter", ",")).strip() != ",":
            found.differs(
                f"{what}.text.tag_delimiter",
                repr(text["tag_delimiter"]),
                "is not used: tags are separated by ','",
            )
    if text.get("tag_dropout_enable"):
        options["tag_dropout"] = text.get("tag_dropout_probability")
        if text.get("tag_dropout_mode", "RANDOM") != "RANDOM":
            found.differs(
                f"{what}.text.tag_dropout_mode",
                text["tag_dropout_mode"],
                "is not used: tags are dropped one by one",
            )
    source = text.get("prompt_source", "sample")
    if source == "filename":
        return {**options, "use_captions": False, "caption_from_filename": True}
    if source == "concept":
        return {**options, "use_captions": False, "instance_prompt": _first_prompt(text, what, found)}
    return options


def _first_prompt(text: Mapping[str, Any], what: str, found: Found) -> str:
    file = found.path(text.get("prompt_path"), f"{what}.text.prompt_path")
    try:
        lines = [line.strip() for line in read_text(file).splitlines() if line.strip()]
    except StorageError as error:
        raise DataError(f"{found.file}, {what}: {error}") from error
    if not lines:
        raise DataError(f"{file} is empty: write a prompt for {what}")
    if len(lines) > 1:
        found.differs(
            f"{what}.text.prompt_path", file, f"has {len(lines)} prompts, of which only the first is used"
        )
    return lines[0]


def _is_of_disabled(key: str, text: Mapping[str, Any]) -> bool:
    """Return whether a key is an option of a step of captions that is switched off, or a switch."""
    if key.startswith("caps_randomize"):
        return not text.get("caps_randomize_enable")
    return key.startswith("tag_dropout") and not text.get("tag_dropout_enable")
