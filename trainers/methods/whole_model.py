"""What methods that tune the model itself share: which of its parts learn, whole or by LoRA, and what comes out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import nn

from dreamfleet.trainers.config.methods.whole_model import WholeModelConfig
from dreamfleet.trainers.methods.export_request import Export
from dreamfleet.trainers.models.formats.file_names import DIFFUSERS_LORA
from dreamfleet.trainers.models.formats.lora import LoraFile, write_diffusers_lora, write_kohya_lora
from dreamfleet.trainers.models.formats.lora_header import PREDICTION
from dreamfleet.trainers.models.lora import add_adapters, learned_layers, merged
from dreamfleet.trainers.models.stable_diffusion.lora_targets import choose_layers
from dreamfleet.trainers.models.stable_diffusion.model import StableDiffusion
from dreamfleet.trainers.models.stable_diffusion.pipeline_folder import save_pipeline
from dreamfleet.trainers.models.stable_diffusion.single_file import save_single_file
from dreamfleet.trainers.optim.param_group import ParamGroup

WHOLE_FORMATS = ("diffusers", "safetensors", "ckpt")
LORA_FORMATS = ("diffusers_lora", "kohya_lora")


def usual_formats(config: WholeModelConfig) -> tuple[str, ...]:
    """Return what an export writes when the recipe does not say."""
    return WHOLE_FORMATS[:2] if config.lora_rank is None else LORA_FORMATS


def possible_formats(config: WholeModelConfig) -> tuple[str, ...]:
    """Return all that an export can write; of a LoRA run also the model with the LoRA in its weights."""
    return WHOLE_FORMATS if config.lora_rank is None else (*LORA_FORMATS, *WHOLE_FORMATS)


def learning_parts(model: StableDiffusion, config: WholeModelConfig) -> nn.ModuleDict:
    """Switch on learning in the U-Net and, on request, the text encoders -> one module that holds all that learns.

    One, so that one engine (DDP, DeepSpeed) wraps it all. With ``lora_rank`` it holds the matrices alone.
    """
    parts = {name: part for name, part in model.modules().items() if name != "vae"}
    if not config.train_text_encoder:
        parts = {"unet": model.unet}
    unread = unread_layers(model) if config.train_text_encoder else []
    if config.lora_rank is not None:
        chosen = choose_layers(model, config.lora_target_modules, parts=list(parts), unread=unread)
        alpha = config.lora_alpha or config.lora_rank
        return add_adapters(model, chosen, rank=config.lora_rank, alpha=alpha, dropout=config.lora_dropout)
    learning = nn.ModuleDict(parts)
    for part in learning.values():
        part.requires_grad_(True).train()
    for module in unread:
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


def export_tuned(config: WholeModelConfig, model: StableDiffusion, order: Export) -> list[Path]:
    """Write the tuned model; of a LoRA run the LoRA in two layouts, and on request ``NAME-merged`` models.

    ``pytorch_lora_weights.safetensors`` is diffusers', ``NAME.safetensors`` kohya's, which the webui and ComfyUI read.
    """
    if config.lora_rank is None:
        return export_checkpoints(model, order)
    prediction = "v" if model.prediction_type == "v_prediction" else model.prediction_type
    forms, metadata = order.formats, {**order.metadata, PREDICTION: prediction}
    file = LoraFile(order.name, learned_layers(model), metadata)
    paths = []
    if "diffusers_lora" in forms:
        paths.append(write_diffusers_lora(file, order.folder / DIFFUSERS_LORA, dtype=order.dtype))
    if "kohya_lora" in forms:
        path = order.folder / f"{order.name}.safetensors"
        blocks = dict(model.unet.config)
        paths.append(write_kohya_lora(file, path, dtype=order.dtype, family=model.family, unet_config=blocks))
    if whole := [form for form in forms if form in WHOLE_FORMATS]:
        with merged(model):
            paths += export_checkpoints(model, replace(order, name=f"{order.name}-merged", formats=whole))
    return paths


def export_checkpoints(model: StableDiffusion, order: Export) -> list[Path]:
    """Write ``diffusers/``, and a single file with webui's keys as ``NAME.safetensors`` or ``NAME.ckpt``.

    A model that does not predict noise has a ``NAME.yaml`` beside its single file, which tells the webui.
    """
    paths = []
    for form in order.formats:
        if form == "diffusers":
            save_pipeline(model, order.folder / "diffusers", dtype=order.dtype)
            paths.append(order.folder / "diffusers")
        else:
            path = order.folder / f"{order.name}.{form}"
            save_single_file(model, path, dtype=order.dtype, metadata=order.metadata)
            beside = path.with_suffix(".yaml")
            paths += [path, *([beside] if beside.exists() and beside not in paths else [])]
    return paths
