"""The source of kohya's dataset TOML: datasets of subsets, each with a folder, repeats and caption options.

Options are inherited from `[general]` by `[[datasets]]`, and from these by `[[datasets.subsets]]`.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from typing import Any

from dreamfleet.datasets.config import Concept
from dreamfleet.datasets.errors import DataError
from dreamfleet.datasets.index.dataset_file import DatasetFile, Found, mapping, mappings
from dreamfleet.datasets.index.metadata_source import metadata_url
from dreamfleet.datasets.index.set_concepts import with_class_images
from dreamfleet.datasets.set_config import ImageSet

# kohya's key of a subset -> key of a concept.
_SAME = {
    "num_repeats": "repeats",
    "caption_extension": "caption_extension",
    "shuffle_caption": "shuffle_tags",
    "keep_tokens": "keep_tokens",
    "keep_tokens_separator": "keep_tokens_separator",
    "caption_prefix": "caption_prefix",
    "caption_suffix": "caption_suffix",
    "caption_dropout_rate": "caption_dropout",
    "caption_tag_dropout_rate": "tag_dropout",
}
# Keys that a recipe has for all images -> key of its `data:` section.
_EXPECTED = {
    "enable_bucket": "enable_bucket",
    "min_bucket_reso": "min_bucket_reso",
    "max_bucket_reso": "max_bucket_reso",
    "bucket_reso_steps": "bucket_reso_steps",
    "bucket_no_upscale": "bucket_no_upscale",
    "flip_aug": "random_flip",
    "alpha_mask": "alpha_mask",
}
_OWN = (
    "image_dir",
    "class_tokens",
    "is_reg",
    "conditioning_data_dir",
    "metadata_file",
    "resolution",
    "batch_size",
)
_OWN_TOO = ("random_crop", "caption_separator", "subsets", "recursive")
_SILENT = ("cache_info", "network_multiplier")
_KNOWN = (*_SAME, *_EXPECTED, *_OWN, *_OWN_TOO)


class KohyaTomlSource(DatasetFile):
    """Reads the file of sd-scripts' `--dataset_config`."""

    program, endings = "kohya's sd-scripts", (".toml",)

    def parse(self, text: str) -> Any:
        """Return the content of a TOML file. Raises ValueError."""
        return tomllib.loads(text)

    def recognises(self, content: Any) -> bool:
        """Return whether a TOML file has datasets."""
        return isinstance(content, dict) and isinstance(content.get("datasets"), list)

    def read_concepts(self, content: Any, found: Found) -> list[Concept]:
        """Return a concept for each subset; those with `is_reg` become the class images of their dataset."""
        general = mapping(content.get("general", {}), "general", found.file)
        concepts = []
        for number, dataset in enumerate(mappings(content["datasets"], "datasets", found.file)):
            subsets = mappings(dataset.get("subsets", []), f"datasets[{number}].subsets", found.file)
            inherited = {**general, **{key: value for key, value in dataset.items() if key != "subsets"}}
            _check_dataset(inherited, found)
            mine: list[Concept] = []
            regs: list[ImageSet] = []
            for place, subset in enumerate(subsets):
                values, what = {**inherited, **subset}, f"datasets[{number}].subsets[{place}]"
                if values.get("is_reg"):
                    regs.append(_class_images(values, what, found))
                else:
                    mine.append(_subset(values, what, found))
            concepts += with_class_images(mine, regs)
        return concepts


def _subset(values: Mapping[str, Any], what: str, found: Found) -> Concept:
    found.unused(values, _KNOWN, f"{what}.", silent=_SILENT)
    for key, own in _EXPECTED.items():
        found.expect(f"{what}.{key}", values.get(key), own)
    if "random_crop" in values:
        found.expect(
            f"{what}.random_crop {values['random_crop']}, that is center_crop",
            not values["random_crop"],
            "center_crop",
        )
    if values.get("caption_separator", ",") != ",":
        found.differs(
            f"{what}.caption_separator",
            repr(values["caption_separator"]),
            "is not used: tags are separated by ','",
        )
    mask = values.get("conditioning_data_dir")
    return found.concept(
        {
            "instance_data_dir": _place(values, what, found),
            "instance_prompt": values.get("class_tokens"),
            "mask_dir": found.path(mask, f"{what}.conditioning_data_dir") if mask else None,
            "recursive": bool(values.get("recursive", False)),
            **{own: values.get(key) for key, own in _SAME.items()},
        },
        what,
    )


def _place(values: Mapping[str, Any], what: str, found: Found) -> str:
    """Return the folder of a subset, or its metadata file with that folder."""
    named = values.get("metadata_file")
    if not named:
        return found.path(values.get("image_dir"), f"{what}.image_dir")
    file = found.path(named, f"{what}.metadata_file")
    folder = values.get("image_dir")
    return metadata_url(file, found.path(folder, f"{what}.image_dir") if folder else "")


def _class_images(values: Mapping[str, Any], what: str, found: Found) -> ImageSet:
    prompt = values.get("class_tokens")
    if not isinstance(prompt, str) or not prompt:
        raise DataError(
            f"{found.file}, {what}: is_reg without class_tokens. Set it to the class of these images"
        )
    return ImageSet(
        source=found.path(values.get("image_dir"), f"{what}.image_dir"), prompt=prompt, is_reg=True
    )


def _check_dataset(values: Mapping[str, Any], found: Found) -> None:
    """Report a resolution and a batch size that the recipe must have for the same training."""
    size = values.get("resolution")
    sides = [int(side) for side in str(size).strip("[]").split(",")] if size is not None else []
    if len(set(sides)) > 1:
        found.differs(
            "resolution", size, "is not used: set data.resolution to a side, and data.enable_bucket"
        )
    elif sides:
        found.expect("resolution", sides[0], "resolution")
    if "batch_size" in values:
        found.differs("batch_size", values["batch_size"], "is not used: set train.train_batch_size")
