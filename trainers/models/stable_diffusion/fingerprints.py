"""Hashes that identify a model: of its files, including the webui's, and of its VAE encoder."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def fingerprint(path: Path, parts: Sequence[str]) -> str:
    """Return 10 hex digits that identify a model: a hash of excerpts of the file, or of the folder's ``parts``."""
    # Only 16 excerpts per file, since hashing all 4 GB of SD 1.5 would take longer than loading it.
    digest = hashlib.sha256()
    files = (
        [path] if path.is_file() else [f for n in parts for f in sorted((path / n).glob("*")) if f.is_file()]
    )
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.parent.name if path.is_dir() else ''}/{file.name}:{size}".encode())
        with file.open("rb") as handle:
            for part in range(16):
                handle.seek(size * part // 16)
                digest.update(handle.read(65536))
    return digest.hexdigest()[:10]


def short_hash(path: Path) -> str | None:
    """Return the first 10 hex digits of a model file's SHA-256, by which the webui identifies models.

    For a diffusers folder, hash the weight files of its U-Net in order. None if there are no readable files.
    """
    if path.is_file():
        files = [path]
    else:
        weights = path / "unet"
        files = sorted(weights.glob("*.safetensors")) or sorted(weights.glob("*.bin"))
    try:
        stamps = tuple((str(file), (s := file.stat()).st_size, s.st_mtime_ns) for file in files)
        return _sha256(stamps)[:10] if stamps else None
    except OSError:
        return None


@functools.lru_cache(maxsize=8)
def _sha256(stamps: tuple[tuple[str, int, int], ...]) -> str:
    # Cached, since hashing gigabytes takes seconds. A modified file has another size or time, hence another key.
    digest = hashlib.sha256()
    for file, _, _ in stamps:
        with open(file, "rb") as handle:
            while block := handle.read(2**22):
                digest.update(block)
    return digest.hexdigest()


def vae_fingerprint(vae: Any) -> str:
    """Return 16 hex digits of a hash of all that latents depend on: the VAE encoder's weights and two settings.

    The decoder is excluded: VAEs that were fine-tuned for better faces share their encoder. "" without a VAE.
    """
    if vae is None:
        return ""
    digest = hashlib.sha256(f"{vae.config.act_fn} {vae.config.norm_num_groups}".encode())
    for name, tensor in sorted(vae.state_dict().items()):
        if name.startswith(("encoder.", "quant_conv.")):
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.float().cpu().contiguous().numpy())
    return digest.hexdigest()[:16]
