"""The cases of the GPU benchmark: recipes on full-size models with random weights, built by the code of a run."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

GIB = 2**30
STEPS = 6
Tree = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A recipe for a GPU: ``pixels`` per side, memory ``card`` in GiB, description ``words``, and its sections."""

    family: str
    pixels: int
    card: float
    words: str
    method: Tree
    engine: Tree = field(default_factory=dict)
    train: Tree = field(default_factory=dict)
    optimizer: Tree = field(default_factory=dict)


DREAMBOOTH = {"name": "dreambooth"}
LORA = {**DREAMBOOTH, "lora_rank": 8}
PLAIN = {"gradient_checkpointing": False, "train_batch_size": 4}
WITH_PRIOR = {**DREAMBOOTH, "with_prior_preservation": True}
WORD = {"placeholder_token": "<thing>", "initializer_token": "toy"}
HOST = {"zero_stage": 2, "offload_optimizer_device": "cpu"}
ALL_ON_HOST = {"zero_stage": 3, "offload_optimizer_device": "cpu", "offload_param_device": "cpu"}
FUSED = {"name": "adafactor", "fused_backward": True, "max_grad_norm": 0.0}

CASES = {
    "sd15-dreambooth-8g": Case(
        "sd1",
        512,
        8,
        "DreamBooth with prior, U-Net, fp32 master weights and Adam on the host (diffusers: 8 GB)",
        WITH_PRIOR,
        HOST,
    ),
    "sd15-dreambooth-text-12g": Case(
        "sd1",
        512,
        12,
        "DreamBooth, U-Net and text encoder (diffusers: 24 GB)",
        {**DREAMBOOTH, "train_text_encoder": True},
        HOST,
    ),
    "sd15-dreambooth-auto-12g": Case(
        "sd1", 512, 12, "DreamBooth with prior without a word on the engine: zero_stage auto", WITH_PRIOR
    ),
    "sdxl-dreambooth-offload-12g": Case(
        "sdxl", 1024, 12, "SDXL, whole U-Net, weights and Adam on the host", DREAMBOOTH, ALL_ON_HOST
    ),
    "sdxl-dreambooth-fused-10g": Case(
        "sdxl",
        1024,
        10,
        "SDXL, whole U-Net on the card: bf16 weights rounded stochastically, Adafactor inside backward",
        DREAMBOOTH,
        train={"full_bf16": True},
        optimizer=FUSED,
    ),
    "sd15-ti-6g": Case("sd1", 512, 6, "Textual Inversion", {"name": "textual_inversion", **WORD}),
    "sd15-hypernetwork-6g": Case("sd1", 512, 6, "hypernetwork", {"name": "hypernetwork"}),
    "sd15-apt-6g": Case("sd1", 512, 6, "prompt tuning", {"name": "prompt_tuning", **WORD}),
    "sd15-lora-6g": Case("sd1", 512, 6, "LoRA of rank 8", LORA),
    "sd15-lora-plain-24g": Case(
        "sd1", 512, 24, "LoRA of rank 8, four images, all activations kept", LORA, train=PLAIN
    ),
    "sd15-dreambooth-24g": Case("sd1", 512, 24, "DreamBooth, U-Net and Adam on the card", DREAMBOOTH),
    "sd15-dreambooth-plain-40g": Case(
        "sd1", 512, 40, "DreamBooth, four images, all activations kept", DREAMBOOTH, train=PLAIN
    ),
    "sdxl-lora-12g": Case("sdxl", 1024, 12, "LoRA of rank 8 on SDXL", LORA),
    "sdxl-ti-lent-4g": Case(
        "sdxl",
        1024,
        4,
        "Textual Inversion on SDXL, whose frozen U-Net does not fit: its weights on the host",
        {"name": "textual_inversion", **WORD},
        {"zero_stage": 3, "offload_param_device": "cpu"},
    ),
    "no-offload": Case(
        "sd1",
        512,
        76,
        "DreamBooth, U-Net, all on the card: what offload is compared with",
        DREAMBOOTH,
        {"zero_stage": 2},
    ),
    "offload-optimizer": Case(
        "sd1", 512, 76, "the same, Adam and fp32 weights on the host", DREAMBOOTH, HOST
    ),
    "offload-weights": Case("sd1", 512, 76, "the same, the weights as well", DREAMBOOTH, ALL_ON_HOST),
}
NARROW: dict[str, Tree] = {
    "unet": {
        "block_out_channels": [32, 64, 64],
        "attention_head_dim": 8,
        "sample_size": 8,
        "layers_per_block": 1,
    },
    "vae": {"block_out_channels": [32, 32], "sample_size": 32},
    "text_encoder": {"num_hidden_layers": 2},
    "text_encoder_2": {"num_hidden_layers": 2},
}


def write_configs(family: str, folder: Path, *, small: bool) -> Path:
    """Write a family's published configs as a model folder without weights; ``small`` reduces the widths."""
    from dreamfleet.trainers.models.formats.ldm_names import FAMILY_CONFIGS

    for part, config in FAMILY_CONFIGS[family].items():  # type: ignore[index]
        adapted = dict(config) | (NARROW.get(part, {}) if small else {})
        if small and part == "unet" and family == "sd1":
            adapted |= {
                "down_block_types": ["CrossAttnDownBlock2D"] * 2 + ["DownBlock2D"],
                "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 2,
            }
        if small and part == "unet" and family == "sdxl":
            adapted["transformer_layers_per_block"] = [1, 1, 1]
        if small and part == "vae":
            adapted |= {
                "down_block_types": ["DownEncoderBlock2D"] * 2,
                "up_block_types": ["UpDecoderBlock2D"] * 2,
            }
        name = "scheduler_config.json" if part == "scheduler" else "config.json"
        (folder / part).mkdir(parents=True, exist_ok=True)
        (folder / part / name).write_text(json.dumps(adapted))
    return folder


def make_recipe(name: str, folder: Path, *, small: bool) -> Any:
    """Return the recipe of a case for a model folder."""
    from dreamfleet.trainers.recipe import build_recipe

    case = CASES[name]
    model = write_configs(case.family, folder / case.family, small=small)
    data = {"instance_data_dir": str(folder), "instance_prompt": "a sks dog", "class_prompt": "a dog"}
    usual = {
        "max_train_steps": STEPS,
        "train_batch_size": 1,
        "mixed_precision": "bf16",
        "gradient_checkpointing": True,
    }
    return build_recipe(
        {
            "method": case.method,
            "model": {"pretrained_model_name_or_path": str(model)},
            "data": {**data, "resolution": 64 if small else case.pixels},
            "train": {**usual, **case.train},
            "optimizer": case.optimizer,
            "engine": {"gpu_memory": f"{case.card}GiB", **case.engine},
            "scaling": {"num_workers": 0},
            "output_dir": str(folder / "run"),
        }
    )


def predict(recipe: Any) -> dict[str, Any]:
    """Return the name, memory and transfers of a recipe's engine during training, as `dreamfleet plan` estimates."""
    from dreamfleet.trainers.memory.plan import plan_memory

    made = plan_memory(recipe, gpu_memory=recipe.engine.gpu_limit)
    engine = recipe.engine
    wanted = {
        "engine.zero_stage": engine.zero_stage,
        "engine.offload_optimizer_device": engine.offload_optimizer_device,
        "engine.offload_param_device": engine.offload_param_device,
    }
    mine = (
        (made.chosen or made.estimates[0])
        if engine.zero_stage == "auto"
        else next(
            (
                one
                for one in made.estimates
                if all(one.choice.settings.get(key, "none") == value for key, value in wanted.items())
            ),
            None,
        )
    )
    assert mine is not None, wanted
    return {
        "engine": mine.choice.name,
        "predicted_gib": round(mine.gpu_moments["training"] / GIB, 2),
        # Without CUDA's context, which torch does not count, and by phase, as they are measured.
        "predicted_moments_gib": {
            "starting": round((mine.gpu_moments["starting"] - mine.gpu["context"]) / GIB, 2),
            "training": round(
                (
                    max(mine.gpu_moments[phase] for phase in ("training", "optimizer step"))
                    - mine.gpu["context"]
                )
                / GIB,
                2,
            ),
        },
        "predicted_host_gib": round(mine.host_total / GIB, 2),
        "crosses_pcie_bytes": mine.traffic,
    }


def random_model(recipe: Any, method: str) -> Any:
    """Return a model with the folder's architecture and random weights, in host memory."""
    from dreamfleet.trainers.methods.base import method_class
    from dreamfleet.trainers.models.family import load_shape

    model = load_shape(recipe.model, method_class(method).needs)
    # One block of noise is repeated, because drawing billions of numbers takes minutes.
    noise = torch.randn(2**22, generator=torch.Generator().manual_seed(0)) * 0.02
    for part in model.modules().values():
        part.to_empty(device="cpu")
        with torch.no_grad():
            for name, param in part.named_parameters():
                if param.dim() > 1:
                    blocks = -(-param.numel() // len(noise))
                    param.copy_(noise.repeat(blocks)[: param.numel()].view(param.shape))
                else:
                    param.fill_(1.0 if name.endswith("weight") else 0.0)
            for module in part.modules():
                if "position_ids" in module._buffers:
                    module.position_ids = torch.arange(module.position_ids.shape[-1])[None]
    return model


def build_parts(recipe: Any, device: torch.device, *, settle: bool = True) -> tuple[Any, Any, Any, str]:
    """Return a recipe's method on random weights, its engine, one batch, and the reason for the choice of engine.

    Without ``settle`` the recipe's engine is used, and ``auto`` means torch without offload.
    """
    from dreamfleet.trainers.distributed.context import DistributedContext
    from dreamfleet.trainers.engines.base import DTYPES, engine_class
    from dreamfleet.trainers.memory.engine_selection import settle_engine
    from dreamfleet.trainers.methods.build import build_method

    why = ""
    if settle:
        recipe, why = settle_engine(recipe, DistributedContext(device=device))
    half = DTYPES[recipe.train.mixed_precision] if device.type == "cuda" else None
    method = build_method(recipe, random_model(recipe, recipe.method.name), concepts=())
    kind = engine_class(recipe.engine)
    kind.place_model(method, recipe.engine, device=device, dtype=half)
    engine = kind(
        method,
        config=recipe.engine,
        optimizer=recipe.optimizer,
        mixed_precision=recipe.train.mixed_precision,
        device=device,
        seed=0,
    )
    return method, engine, synthetic_batch(recipe, method), why


def synthetic_batch(recipe: Any, method: Any) -> Any:
    """Return a batch of noise in host memory, with the shapes of the memory plan."""
    from dreamfleet.trainers.memory.profile import make_batch

    batch = make_batch(recipe, method)
    generator = torch.Generator().manual_seed(0)
    for name, value in batch.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point() and name != "weights":
            batch[name] = torch.randn(value.shape, generator=generator).to(value.dtype)
    num = len(batch["latents"])
    batch["timesteps"] = torch.arange(num) * 37 % 1000
    if "input_ids" in batch:
        batch["input_ids"] = method.tokenize([getattr(recipe.method, "placeholder_token", "")] * num)
    batch["num_instances"] = recipe.train.train_batch_size
    return batch
