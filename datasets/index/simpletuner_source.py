"""The source of SimpleTuner's data backends: a JSON list of image backends on disk and in buckets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from dreamfleet.datasets.config import Concept
from dreamfleet.datasets.errors import DataError
from dreamfleet.datasets.index.dataset_file import DatasetFile, Found, is_list_of, mappings

_KNOWN = (
    "id", "type", "dataset_type", "instance_data_dir", "aws_bucket_name", "aws_data_prefix", "csv_file",
    "instance_prompt", "only_instance_prompt", "prepend_instance_prompt", "caption_strategy", "repeats", "disabled",
    "disable", "resolution", "resolution_type", "minimum_image_size", "minimum_aspect_ratio", "maximum_aspect_ratio",
    "probability", "crop", "crop_style", "crop_aspect", "is_regularisation_data", "is_regularization_data",
)  # fmt: skip
# Where backends keep caches and find keys; a run uses the keys of its environment.
_SILENT = (
    "aws_region_name", "aws_endpoint_url", "aws_access_key_id", "aws_secret_access_key", "aws_max_pool_connections",
    "cache_dir_vae", "vae_cache_clear_each_epoch", "vae_cache_ondemand", "cache_dir", "text_embeds", "image_embeds",
    "preserve_data_backend_cache", "skip_file_discovery", "metadata_backend", "hash_filenames",
    "target_downsample_size", "maximum_image_size", "csv_cache_dir",
)  # fmt: skip


class SimpleTunerSource(DatasetFile):
    """Reads the file of SimpleTuner's `--data_backend_config`."""

    program, endings = "SimpleTuner", (".json",)

    def recognises(self, content: Any) -> bool:
        """Return whether a JSON file is a list of backends."""
        return is_list_of(content, "id", ("type", "dataset_type"))

    def read_concepts(self, content: Any, found: Found) -> list[Concept]:
        """Return a concept for each backend of training images."""
        concepts = []
        for values in mappings(content, "backends", found.file):
            what = str(values["id"])
            kind = values.get("dataset_type", "image")
            if values.get("disabled") or values.get("disable") or kind in ("text_embeds", "image_embeds"):
                continue
            if kind != "image":
                found.differs(f"{what}.dataset_type", kind, "is not used")
            elif values.get("is_regularisation_data") or values.get("is_regularization_data"):
                found.differs(
                    f"{what}.is_regularisation_data", True, "is left out: use class images for the prior"
                )
            else:
                concepts.append(_concept(values, what, found))
        return concepts


def _concept(values: Mapping[str, Any], what: str, found: Found) -> Concept:
    kind = str(values.get("type", "local"))
    place = _PLACES.get(kind)
    if place is None:
        raise DataError(
            f"{found.file}, {what}: type {kind!r} is not read. Download the images, and name their folder "
            f"(types: {', '.join(_PLACES)})"
        )
    found.unused(values, _KNOWN, f"{what}.", silent=_SILENT)
    if values.get("probability", 1) not in (1, 1.0):
        found.differs(f"{what}.probability", values["probability"], "is not used: use data.sets with weights")
    if values.get("crop") and values.get("crop_style", "center") not in ("center", "centre"):
        found.expect(f"{what}.crop_style {values['crop_style']}, that is center_crop", False, "center_crop")
    _check_resolution(values, what, found)
    repeats = values.get("repeats", 0)
    if not isinstance(repeats, int) or repeats < 0:
        raise DataError(f"{found.file}, {what}: repeats {repeats!r} is not a whole number from 0. Correct it")
    return found.concept(
        {
            "instance_data_dir": place(values, what, found),
            "repeats": repeats + 1,  # there, the number of further uses
            "where": _condition(values),
            **_captions(values, what, found),
        },
        what,
    )


def _local(values: Mapping[str, Any], what: str, found: Found) -> str:
    return found.path(values.get("instance_data_dir"), f"{what}.instance_data_dir")


def _bucket(values: Mapping[str, Any], what: str, found: Found) -> str:
    bucket = values.get("aws_bucket_name")
    if not isinstance(bucket, str) or not bucket:
        raise DataError(f"{found.file}, {what}: no aws_bucket_name. Set it")
    prefix = str(values.get("aws_data_prefix") or values.get("instance_data_dir") or "").strip("/")
    return f"s3://{bucket}/{prefix}".rstrip("/")


def _table(values: Mapping[str, Any], what: str, found: Found) -> str:
    return found.path(values.get("csv_file"), f"{what}.csv_file")


# How the images of each type of backend are found.
_PLACES: dict[str, Callable[[Mapping[str, Any], str, Found], str]] = {
    "local": _local,
    "aws": _bucket,
    "csv": _table,
}


def _captions(values: Mapping[str, Any], what: str, found: Found) -> dict[str, Any]:
    strategy = str(values.get("caption_strategy", "filename"))
    prompt = values.get("instance_prompt")
    if values.get("only_instance_prompt") or strategy == "instanceprompt":
        return {"instance_prompt": prompt, "use_captions": False}
    prefix = prompt if values.get("prepend_instance_prompt") else None
    if strategy == "filename":
        if prefix:
            found.differs(f"{what}.prepend_instance_prompt", True, "has no effect on captions in file names")
        return {"use_captions": False, "caption_from_filename": True}
    if strategy not in ("textfile", "csv"):
        found.differs(
            f"{what}.caption_strategy",
            strategy,
            "is not used: captions come from text files or metadata tables",
        )
    return {"caption_prefix": prefix, "instance_prompt": prompt}


def _condition(values: Mapping[str, Any]) -> str | None:
    """Return the filters of a backend as a condition; a size in megapixels is an area."""
    parts = []
    least = values.get("minimum_image_size")
    if isinstance(least, int | float) and least > 0:
        area = values.get("resolution_type", "area") == "area"
        parts.append(f"pixels >= {float(least) * 1e6:.0f}" if area else f"shorter_side >= {int(least)}")
    for key, sign in (("minimum_aspect_ratio", ">="), ("maximum_aspect_ratio", "<=")):
        if isinstance(values.get(key), int | float):
            parts.append(f"aspect {sign} {float(values[key])}")
    return " and ".join(parts) or None


def _check_resolution(values: Mapping[str, Any], what: str, found: Found) -> None:
    size = values.get("resolution")
    if not isinstance(size, int | float):
        return
    side = (
        round((size * 1e6) ** 0.5 / 64) * 64 if values.get("resolution_type", "area") == "area" else int(size)
    )
    found.expect(f"{what}.resolution {size}, that is a side of", side, "resolution")
    square = values.get("crop") and values.get("crop_aspect", "square") == "square"
    found.expect(f"{what}.crop_aspect, that is enable_bucket", not square, "enable_bucket")
