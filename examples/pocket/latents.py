"""Encodes the U-Net's training images once into a memory-mapped file of scaled latents."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from images import open_bank
from subjects import CACHE
from training import pick_device
from vae import to_input

BATCH = 64


def write_latents() -> None:
    """Run the stage `latents`: write float16 latents (n, 4, 16, 16) in the order of each bank.

    `table.json` is written last; a bank whose latents have a table is skipped.
    """
    for name in ("narrow", "steady"):
        _encode(name)


def _encode(name: str) -> None:
    folder = _place(name)
    if (folder / "table.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    device = pick_device()
    vae = AutoencoderKL.from_pretrained(CACHE / "folder" / "vae", torch_dtype=torch.float32).to(device).eval()
    images = open_bank(name).images
    shape = (len(images), 4, 16, 16)
    out = np.lib.format.open_memmap(folder / "latents.npy", "w+", np.float16, shape)
    with torch.no_grad():
        for at in range(0, len(images), BATCH):
            with torch.autocast(device.type, torch.bfloat16):
                mean = vae.encode(to_input(images[at : at + BATCH], device)).latent_dist.mean
            out[at : at + BATCH] = (mean.float() * vae.config.scaling_factor).half().cpu().numpy()
    out.flush()
    spread = float(out[::50].astype(np.float32).std())
    (folder / "table.json").write_text(json.dumps({"shape": shape, "std": spread}), encoding="utf-8")
    print("latents:", shape, "std", round(spread, 3))


def _place(name: str) -> Path:
    return CACHE / ("latents" if name == "narrow" else f"latents_{name}")


def open_latents(name: str = "narrow") -> np.ndarray:
    """Open the latents of a bank that `write_latents` wrote, memory-mapped: float16 (n, 4, 16, 16)."""
    return np.load(_place(name) / "latents.npy", mmap_mode="r")
