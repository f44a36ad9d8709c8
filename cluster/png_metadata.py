"""Writes the images of `dreamfleet sample`: the grid, single images, and the generation settings in each PNG."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from dreamfleet.datasets.errors import UserError
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.artifacts.embedding import negative_of
from dreamfleet.trainers.config.image_request import ImageRequest
from dreamfleet.trainers.models.formats.embedding import read_embedding
from dreamfleet.trainers.models.learned_words import learned_words
from dreamfleet.trainers.models.sampling.infotext import infotext, png_info, sampler_entries
from dreamfleet.trainers.models.sampling.prompt_encoding import negative_for
from dreamfleet.trainers.models.sampling.prompt_syntax import escape, escape_words, strip_comments
from dreamfleet.trainers.models.sampling.prompt_tags import AppliedFiles, HypernetworkFiles, LoraFiles
from dreamfleet.trainers.models.sampling.sample import image_grid

if TYPE_CHECKING:
    from dreamfleet.trainers.models.family import DiffusionModel

Row = tuple[
    ImageRequest, AppliedFiles
]  # an image request, and the files and strengths of its hypernetworks and LoRAs
IMAGES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class Settings:
    """Settings that all images of a call share. `more`: additional entries of the text in each PNG."""

    embeddings: Sequence[str] = ()
    more: Mapping[str, Any] = field(default_factory=dict)


def require_writable(out: Path, out_dir: Path | None) -> None:
    """Check before any image is generated that the images can be written. Raises UserError otherwise."""
    if out.suffix.lower() not in IMAGES:
        raise UserError(f"--out {out}: name an image file ({', '.join(IMAGES)})")
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.parent}")
    if out_dir is not None and out_dir.exists() and not out_dir.is_dir():
        raise UserError(f"--out-dir {out_dir}: a file has this name; give a folder")


def image_text(model: DiffusionModel, settings: Settings, row: Row, image: Image.Image) -> str:
    """Return the text stored in a PNG; hypernetworks and LoRAs are tags of the prompt, as in the webui."""
    request, extras = row
    prompts = (
        request.prompt,
        negative_for(
            model, request.prompt, request.negative_prompt, steps=request.steps, plain=request.plain
        ),
    )
    if request.plain:
        prompt, negative = map(escape, prompts)
    else:
        prompt, negative = (escape_words(strip_comments(text), learned_words(model)) for text in prompts)
    tags = "".join(
        f"<{kind}:{Path(address).stem}:{strength}>"
        for kind, named in zip((HypernetworkFiles.tags[0], LoraFiles.tags[0]), extras, strict=True)
        for address, strength in named
    )
    entries = {
        "Steps": request.steps,
        **sampler_entries(request.scheduler, zero_snr=model.ends_in_noise),
        "CFG scale": request.guidance_scale,
        "Seed": request.seed,
        "Size": f"{image.width}x{image.height}",
        "Model hash": model.short_hash(),
        "Model": model.short_name,
        "Clip skip": model.clip_skip if model.clip_skip > 1 else None,
        "TI hashes": _hashes(settings.embeddings, f"{prompt} {negative}".lower()),
        **settings.more,
        "Version": f"dreamfleet {_version()}",
    }
    return infotext(f"{prompt.strip()} {tags}".strip(), negative.strip(), entries)


def write_images(
    images: Sequence[Image.Image],
    texts: Sequence[str],
    seeds: Sequence[int],
    out: Path,
    out_dir: Path | None,
    *,
    columns: int,
) -> None:
    """Write the grid with the text of its first image, as the webui does, and with `out_dir` also each image.

    Single images are `00000-SEED.png` and so on in `out_dir`, as in the webui, numbered after the existing ones.
    """
    info: dict[str, Any] = {"pnginfo": png_info(texts[0])} if out.suffix.lower() == ".png" else {}
    image_grid(images, columns).save(out, **info)
    if out_dir is None:
        return
    out_dir.mkdir(parents=True, exist_ok=True)
    taken = [int(path.name[:5]) for path in out_dir.glob("[0-9][0-9][0-9][0-9][0-9]-*.png")]
    start = max(taken, default=-1) + 1
    for number, (image, text, seed) in enumerate(zip(images, texts, seeds, strict=True), start):
        image.save(out_dir / f"{number:05d}-{seed}.png", pnginfo=png_info(text))


def _hashes(embeddings: Sequence[str], used_in: str) -> str | None:
    """Return the names and file hashes of the used embeddings, also negative ones, as the webui writes them."""
    found = []
    for address in embeddings:
        for place in (Storage(address), negative_of(address)):
            if not place.exists():
                continue
            with place.local_copy("") as path:
                name, digest = read_embedding(path).name, hashlib.sha256(path.read_bytes()).hexdigest()
            if name.lower() in used_in:
                found.append(f"{name}: {digest[:12]}")
    return ", ".join(dict.fromkeys(found)) or None


def _version() -> str:
    try:
        return version("dreamfleet")
    except PackageNotFoundError:  # runs from a checkout without installation
        return "0"
