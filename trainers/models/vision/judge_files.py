"""Checks, without loading torch, that the models which judge images (CLIP, DINO) are complete on this machine."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

from dreamfleet.datasets.errors import ModelError
from dreamfleet.trainers.config.model import POCKET
from dreamfleet.trainers.config.validation import ValidationConfig

WEIGHTS = ("*.safetensors", "*.bin")
TOWERS = (
    "image_encoder/config.json",
    "text_encoder/config.json",
    "tokenizer",
)  # of the pocket model's layout
_HUB_NAME = r"[\w.-]+/[\w.-]+"


def check_judges(validation: ValidationConfig) -> None:
    """Raise ModelError that lists each judge model which a metric needs and which is missing or incomplete.

    Weights are not read. A CLIP that is named by its hub name is looked up on the hub unless it is cached.
    """
    checks: dict[str, Callable[[str], str | None]] = {"clip": _find_clip_problem, "dino": _find_dino_problem}
    errors = []
    for key, find_problem in checks.items():
        name = getattr(validation, key)
        if name and validation.uses(key) and (problem := find_problem(str(name))):
            users = ", ".join(
                metric for metric in validation.preview_metrics if validation.uses(key, by=metric)
            )
            errors.append(
                f"validation.{key}: {name} {problem}. {users} in validation.metrics cannot be computed"
            )
    if errors:
        raise ModelError("\n  ".join(errors))


def _find_clip_problem(name: str) -> str | None:
    """Return what a CLIP lacks, None if it is complete."""
    folder = Path(name).expanduser()
    if name == POCKET:
        return None
    if (folder / "text_projection.safetensors").is_file():
        missing = [part for part in TOWERS if not (folder / part).exists()]
        return f"lacks {', '.join(missing)}" if missing else None
    if folder.is_dir():
        return _find_folder_problem(folder, kind="CLIP", needs="text_config")
    if re.fullmatch(_HUB_NAME, name):
        return _find_hub_problem(name)
    return "does not exist; give 'pocket', a folder, or a hub name"


def _find_dino_problem(name: str) -> str | None:
    """Return what a DINO ViT lacks, None if it is complete."""
    return _find_folder_problem(Path(name).expanduser(), kind="DINO ViT", needs="image_size")


def _find_folder_problem(folder: Path, *, kind: str, needs: str) -> str | None:
    """Return what a Hugging Face folder lacks: its config with the key ``needs``, or its weights."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return f"contains no {kind} (config.json not found)"
    except (OSError, ValueError) as error:
        return f"contains no {kind} (config.json cannot be read: {error})"
    if not isinstance(config, dict) or needs not in config:
        found = config.get("model_type", "another model") if isinstance(config, dict) else "another model"
        return f"contains no {kind} but {found}"
    if not any(True for pattern in WEIGHTS for _ in folder.glob(pattern)):
        return f"contains no weights ({' or '.join(WEIGHTS)})"
    return None


def _find_hub_problem(name: str) -> str | None:
    """Return the reason why a model cannot be downloaded, None if it is cached or on the hub."""
    from huggingface_hub import hf_hub_download

    try:
        hf_hub_download(name, "config.json", etag_timeout=10)
    except Exception as error:  # noqa: BLE001 - the hub's and the network's errors have no common base
        first = str(error).strip().splitlines() or [type(error).__name__]
        return f"is neither a folder nor available from the hub ({first[0]})"
    return None
