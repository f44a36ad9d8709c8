"""What methods that tune the model itself share: which of its parts learn, and the checkpoints that come out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from dreamfleet.trainers.methods.base import ParamGroup
from dreamfleet.trainers.sd.formats.single_file import save_single_file
from dreamfleet.trainers.sd.model import StableDiffusion, save_pipeline


def learning_parts(model: StableDiffusion, *, train_text_encoder: bool) -> nn.ModuleDict:
    """Switch on learning in the U-Net and, on request, the text encoders -> one module that holds all that learns.

    One, so that one engine (DDP, DeepSpeed) wraps it all.
    """
    learning = nn.ModuleDict({"unet": model.unet})
    if train_text_encoder:
        learning["text_encoder"] = model.text_encoder
        if model.text_encoder_2 is not None:
            learning["text_encoder_2"] = model.text_encoder_2
    for part in learning.values():
        part.requires_grad_(True).train()
    if train_text_encoder:
        for module in unread_layers(model):
            module.requires_grad_(False)
    return learning


def unread_layers(model: StableDiffusion) -> list[nn.Module]:
    """List what of the first text encoder no loss depends on: a parameter without gradient stalls DDP.

    SDXL's second encoder has no such layers: its summary of the prompt comes from the last one.
    """
    body = getattr(model.text_encoder, "text_model", model.text_encoder)
    skipped = model.clip_skip - 1 + model.is_sdxl
    layers = list(body.encoder.layers)
    unread = layers[len(layers) - skipped :]
    return [*unread, body.final_layer_norm] if model.is_sdxl else unread


def part_groups(learning: nn.ModuleDict) -> list[ParamGroup]:
    """Return the learning parameters of each part as a group under the part's name."""
    return [
        ParamGroup(part, {f"{part}.{n}": p for n, p in module.named_parameters() if p.requires_grad})
        for part, module in learning.items()
    ]


def export_checkpoints(
    model: StableDiffusion,
    folder: Path,
    name: str,
    *,
    forms: Sequence[str],
    metadata: dict[str, str],
    precision: str,
) -> list[Path]:
    """Write ``diffusers/``, and a single file with webui's keys as ``NAME.safetensors`` or ``NAME.ckpt``.

    A model that does not predict noise has a ``NAME.yaml`` beside its single file, which tells the webui.
    """
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    paths = []
    for form in forms:
        if form == "diffusers":
            save_pipeline(model, folder / "diffusers", dtype=dtype)
            paths.append(folder / "diffusers")
        else:
            path = save_single_file(model, folder / f"{name}.{form}", dtype=dtype, metadata=metadata)
            beside = path.with_suffix(".yaml")
            paths += [path, *([beside] if beside.exists() and beside not in paths else [])]
    return paths
