"""The base class of methods that fine-tune the model, in full or by LoRA, with its trainable parts and exports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import nn

from dreamfleet.trainers.config.methods.whole_model import WholeModelConfig
from dreamfleet.trainers.methods.base import Setting
from dreamfleet.trainers.methods.diffusion_method import DiffusionMethod
from dreamfleet.trainers.methods.export_request import Export
from dreamfleet.trainers.methods.layer_rates import RateByLayer, freeze
from dreamfleet.trainers.methods.lora_regularization import drop_hidden, limit_norms
from dreamfleet.trainers.models.factor_layers import FactorShape
from dreamfleet.trainers.models.family import DiffusionModel
from dreamfleet.trainers.models.formats.file_names import DIFFUSERS_LORA
from dreamfleet.trainers.models.formats.lora import LoraFile, write_diffusers_lora
from dreamfleet.trainers.models.formats.lora_header import PREDICTION
from dreamfleet.trainers.models.lora import add_adapters, add_factors, merged, trained_factors, trained_layers
from dreamfleet.trainers.optim.param_group import ParamGroup

WHOLE_FORMATS = ("diffusers", "safetensors", "ckpt")
LORA_FORMATS = ("diffusers_lora", "kohya_lora")


def usual_formats(config: WholeModelConfig) -> tuple[str, ...]:
    """Return the formats that an export writes by default.

    For a DoRA only diffusers' layout: ComfyUI and the webui read the other one, but divide by other lengths. For a
    LoKr or LoHa only kohya's.
    """
    if config.lora_rank is None:
        return WHOLE_FORMATS[:2]
    if config.lora_type != "lora":
        return LORA_FORMATS[1:]
    return LORA_FORMATS[:1] if config.use_dora else LORA_FORMATS


def possible_formats(config: WholeModelConfig) -> tuple[str, ...]:
    """Return all formats that an export can write; for a LoRA run also models with the LoRA merged in."""
    if config.lora_rank is None:
        return WHOLE_FORMATS
    return (*(LORA_FORMATS if config.lora_type == "lora" else LORA_FORMATS[1:]), *WHOLE_FORMATS)


def learning_parts(model: DiffusionModel, config: WholeModelConfig) -> nn.ModuleDict:
    """Make the U-Net and, on request, the text encoders trainable; return one module that holds them.

    It is one module so that one engine (DDP, DeepSpeed) wraps all parts. With ``lora_rank`` it holds only the
    LoRA matrices, or factors of a LoKr or LoHa. Frozen layers are not trained and get no LoRA.
    """
    parts, rate_of = model.trainable_parts(text=config.train_text_encoder), RateByLayer(config, model)
    unread = model.unread_layers() if config.train_text_encoder else []
    if config.lora_rank is not None:
        chosen = model.lora_layers(config.lora_target_modules, parts=list(parts), unread=unread)
        rate_of.check(f"{part}.{layer}" for part, layers in chosen.items() for layer in layers)
        chosen = {
            part: [layer for layer in layers if not rate_of(f"{part}.{layer}").is_frozen]
            for part, layers in chosen.items()
        }
        return add_lora(model, chosen, config)
    learning = nn.ModuleDict(parts)
    for part in learning.values():
        part.requires_grad_(True).train()
    for module in unread:
        module.requires_grad_(False)
    trained = (
        f"{part}.{name}"
        for part, module in learning.items()
        for name, p in module.named_parameters()
        if p.requires_grad
    )
    rate_of.check(trained)
    freeze(learning, rate_of)
    return learning


def add_lora(
    model: DiffusionModel, layers: Mapping[str, Sequence[str]], config: WholeModelConfig
) -> nn.ModuleDict:
    """Add the recipe's LoRA, LoKr or LoHa to the named layers of each part; return its parameters by part."""
    rank = config.lora_rank
    assert rank is not None
    alpha = config.lora_alpha or rank
    if config.lora_type != "lora":
        shape = FactorShape(
            config.lora_type,
            rank,
            alpha,
            factor=config.lokr_factor or -1,
            both=config.lokr_decompose_both,
            whole=config.lokr_full_matrix,
            module_dropout=config.module_dropout,
        )
        return add_factors(model, layers, shape)
    learning = add_adapters(
        model, layers, rank=rank, alpha=alpha, dropout=config.lora_dropout, use_dora=config.use_dora
    )
    drop_hidden(model, config)
    return learning


class WholeModelMethod(DiffusionMethod):
    """Base class of the methods that train the weights of the model, directly or with a LoRA."""

    def __init__(self, config: WholeModelConfig, model: DiffusionModel, setting: Setting):
        super().__init__(config, model, setting)
        self.learning = learning_parts(model, config)
        self.formats = usual_formats(config)

    @property
    def all_formats(self) -> tuple[str, ...]:
        return possible_formats(self.config)

    @property
    def trains_text(self) -> bool:
        return self.config.train_text_encoder

    def groups(self) -> list[ParamGroup]:
        """Return the trainable parameters of each part under the part's name, by learning rate: see `layer_rates`."""
        return RateByLayer(self.config, self.model).groups(self.learning)

    def after_step(self) -> None:
        if self.config.scale_weight_norms is not None:
            limit_norms(self.model, self.config.scale_weight_norms)

    def write(self, order: Export) -> list[Path]:
        """Write the tuned model as a folder and a single file, or a LoRA in two layouts: see `export_tuned`."""
        return export_tuned(self.config, self.model, order)


def export_tuned(config: WholeModelConfig, model: DiffusionModel, order: Export) -> list[Path]:
    """Write the tuned model, or for a LoRA run the LoRA in two layouts and on request ``NAME-merged`` models.

    ``pytorch_lora_weights.safetensors`` has diffusers' layout, ``NAME.safetensors`` kohya's, which the webui
    and ComfyUI read. Returns the paths.
    """
    if config.lora_rank is None:
        return export_checkpoints(model, order)
    prediction = "v" if model.prediction_type == "v_prediction" else model.prediction_type
    forms, metadata = order.formats, {**order.metadata, PREDICTION: prediction}
    factors = trained_factors(model, alpha=config.lora_alpha or config.lora_rank)
    file = LoraFile(order.name, trained_layers(model), metadata, factors=factors)
    paths = []
    if "diffusers_lora" in forms:
        paths.append(write_diffusers_lora(file, order.folder / DIFFUSERS_LORA, dtype=order.dtype))
    if "kohya_lora" in forms:
        path = order.folder / f"{order.name}.safetensors"
        paths.append(model.write_kohya_lora(file, path, dtype=order.dtype))
    if whole := [form for form in forms if form in WHOLE_FORMATS]:
        with merged(model):
            paths += export_checkpoints(model, replace(order, name=f"{order.name}-merged", formats=whole))
    return paths


def export_checkpoints(model: DiffusionModel, order: Export) -> list[Path]:
    """Write ``diffusers/``, and a single file with the webui's keys as ``NAME.safetensors`` or ``NAME.ckpt``.

    If the model does not predict noise, a ``NAME.yaml`` beside the single file gives the webui its prediction
    type. Returns the paths.
    """
    paths = []
    for form in order.formats:
        if form == "diffusers":
            model.save_folder(order.folder / "diffusers", dtype=order.dtype)
            paths.append(order.folder / "diffusers")
        else:
            path = order.folder / f"{order.name}.{form}"
            model.save_file(path, dtype=order.dtype, metadata=order.metadata)
            beside = path.with_suffix(".yaml")
            paths += [path, *([beside] if beside.exists() and beside not in paths else [])]
    return paths
