"""Configurations of published models, without weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dreamfleet.trainers.models.formats.ldm_names import FAMILY_CONFIGS, Family

# Published numbers of parameters of Stable Diffusion 1.5's components.
SD15 = {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480}


def write_configs(folder: Path, family: Family = "sd1", **changes: dict[str, Any]) -> Path:
    """Write the configs of a Stable Diffusion (1.5 by default) as a diffusers folder without weights."""
    for part, config in FAMILY_CONFIGS[family].items():
        if part != "scheduler":
            (folder / part).mkdir(parents=True)
            (folder / part / "config.json").write_text(json.dumps({**config, **changes.get(part, {})}))
    return folder
