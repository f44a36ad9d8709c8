"""The settings that cached latents depend on, and the folder of a cache that they name."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from dreamfleet.datasets.config import DataConfig

VERSION = 2  # version of the file format and of cropping; a change invalidates existing caches


@dataclasses.dataclass(frozen=True)
class Encoding:
    """The settings that latents depend on: the VAE's encoder, crop sizes, masks, and the stored precision."""

    vae: str
    resolution: int
    buckets: tuple[tuple[str, Any], ...]  # the recipe's bucket options as (key, value); () without
    alpha_mask: bool
    precision: str
    resampling: str = "lanczos"
    version: int = VERSION

    @property
    def folder(self) -> str:
        """Name of the folder of the latents with this encoding."""
        text = json.dumps(self.to_json(), sort_keys=True)
        return f"{self.resolution}px-{hashlib.sha256(text.encode()).hexdigest()[:10]}"

    def to_json(self) -> dict[str, Any]:
        """Return the settings as they are stored in the manifest; caches of older versions have no `resampling`."""
        stored = {**dataclasses.asdict(self), "buckets": dict(self.buckets)}
        if self.resampling == "lanczos":  # the only filter of older versions, whose caches remain valid
            del stored["resampling"]
        return stored

    def differences(self, other: Mapping[str, Any]) -> list[str]:
        """Return the settings that are different in a manifest, such as `resolution 512 (here 768)`."""
        mine = {**self.to_json(), "resampling": self.resampling}
        theirs = {"resampling": "lanczos", **other}
        return [
            f"{name} {_as_text(theirs.get(name))} (here {_as_text(value)})"
            for name, value in mine.items()
            if theirs.get(name) != value
        ]


def encoding_of(data: DataConfig, vae: str) -> Encoding:
    """Return the encoding for a `data:` section and a VAE, given the hash of its encoder."""
    names = ("min_bucket_reso", "max_bucket_reso", "bucket_reso_steps", "bucket_no_upscale")
    buckets = tuple((name, getattr(data, name)) for name in names) if data.enable_bucket else ()
    return Encoding(
        vae,
        data.resolution,
        buckets,
        data.alpha_mask,
        data.cache_precision,
        resampling=data.image_interpolation_mode,
    )


def _as_text(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{name}={inner}" for name, inner in value.items()) or "none"
    return str(value)
