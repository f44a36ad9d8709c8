"""Trains ten steps with another program's own code on recorded tensors, for ``benchmarks/imports.py``.

kohya: LoRANetwork, get_optimizer, get_scheduler_fix, conditional_loss and apply_snr_weight, around diffusers' U-Net,
because its own U-Net has fixed widths. OneTrainer: LoRAModuleWrapper, the loss of ModelSetupDiffusionLossMixin, and its
schedule. diffusers: the whole main() of train_dreambooth.py, in which noise, timesteps, latents and the order of the
images are replaced by the recorded ones.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import shlex
import sys
import types
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DDPMScheduler, UNet2DConditionModel
from transformers import CLIPTextModel

STEPS = 10
POCKET = Path(__file__).parent.parent / "trainers/models/pocket"


class _Anything:
    """Stands for torchvision's transforms: images are replaced by recorded latents."""

    def __init__(self, *args: Any, **options: Any):
        pass

    def __call__(self, value: Any) -> Any:
        return value


def _anything(attribute: str) -> type[_Anything]:
    if attribute.startswith("__"):
        raise AttributeError(attribute)
    return _Anything


def stand_in(*names: str) -> None:
    """Replace modules that are imported for other purposes than training."""
    for name in names:
        module = types.ModuleType(name)
        module.__getattr__ = _anything  # type: ignore[method-assign]
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent in sys.modules:
            setattr(sys.modules[parent], child, module)


def load_parts() -> tuple[Any, Any, Any]:
    """Return the U-Net, the text encoder and the noise schedule of the pocket model."""
    unet = UNet2DConditionModel.from_pretrained(POCKET, subfolder="unet")
    text = CLIPTextModel.from_pretrained(POCKET, subfolder="text_encoder")
    return unet, text, DDPMScheduler.from_pretrained(POCKET, subfolder="scheduler")


def target_of(schedule: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return what the U-Net should predict."""
    if schedule.config.prediction_type == "v_prediction":
        return schedule.get_velocity(batch["latents"], batch["noise"], batch["timesteps"])
    return batch["noise"]


def fill_adapters(modules: dict[str, Any], adapters: dict[str, torch.Tensor]) -> None:
    """Copy recorded initial matrices into LoRA modules; names are compared without dots. Each must be found once."""
    found = 0
    for key, value in adapters.items():
        part, _, rest = key.partition(".")
        name = rest.rpartition(".lora_")[0].replace(".", "_")
        prefix = "lora_unet" if part == "unet" else "lora_te"
        module = modules[f"{prefix}_{name}"]
        matrix = module.lora_down if ".lora_A." in key else module.lora_up
        with torch.no_grad():
            matrix.weight.copy_(value.reshape(matrix.weight.shape))
        found += 1
    assert found == 2 * len(modules), f"{found} matrices for {len(modules)} modules"


def run_kohya(record: dict[str, Any], folder: Path) -> list[float]:
    """Train with kohya's network, optimizer, schedule and loss."""
    stand_in("torchvision", "torchvision.transforms")
    stand_in("library.lpw_stable_diffusion", "library.sdxl_lpw_stable_diffusion")
    from library import custom_train_functions, train_util
    from networks import lora

    parser = argparse.ArgumentParser()
    train_util.add_optimizer_arguments(parser)
    options = (
        "--optimizer_type=AdamW --optimizer_args weight_decay=0.1 betas=0.9,0.99 --learning_rate=1e-3 "
        "--lr_scheduler=cosine --lr_warmup_steps=4 --max_grad_norm=1"
    )
    args = parser.parse_args(options.split())
    args.max_train_steps, args.gradient_accumulation_steps = 40, 1
    unet, text, schedule = load_parts()
    custom_train_functions.prepare_scheduler_for_custom_training(schedule, torch.device("cpu"))
    network = lora.create_network(1.0, 8, 4, None, text, unet)
    network.apply_to(text, unet, True, True)
    unet.requires_grad_(False)
    text.requires_grad_(False)
    groups = network.prepare_optimizer_params(5e-4, 1e-3, 1e-3)
    _, _, optimizer = train_util.get_optimizer(args, groups[0] if isinstance(groups, tuple) else groups)
    rates = train_util.get_scheduler_fix(args, optimizer, 1)
    fill_adapters(
        {each.lora_name: each for each in [*network.unet_loras, *network.text_encoder_loras]},
        record["adapters"],
    )
    losses = []
    is_v = schedule.config.prediction_type == "v_prediction"
    for batch in record["batches"]:
        context = text(batch["input_ids"])[0]
        noisy = schedule.add_noise(batch["latents"], batch["noise"], batch["timesteps"])
        predicted = unet(noisy, batch["timesteps"], context).sample
        loss = train_util.conditional_loss(predicted, target_of(schedule, batch), "l2", "none", None).mean(
            [1, 2, 3]
        )
        loss = custom_train_functions.apply_snr_weight(loss, batch["timesteps"], schedule, 5, is_v).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.get_trainable_params(), args.max_grad_norm)
        optimizer.step()
        rates.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss))
    return losses


def run_onetrainer(record: dict[str, Any], folder: Path) -> list[float]:
    """Train with OneTrainer's LoRA, loss and schedule, read from its own config."""
    from modules.modelSetup.mixin.ModelSetupDiffusionLossMixin import ModelSetupDiffusionLossMixin
    from modules.module.LoRAModule import LoRAModuleWrapper
    from modules.util.config.TrainConfig import TrainConfig
    from modules.util.lr_scheduler_util import lr_lambda_constant, lr_lambda_warmup

    config = TrainConfig.default_values().from_dict(json.loads((folder / "onetrainer.json").read_text()))
    unet, _, schedule = load_parts()
    unet.requires_grad_(False)
    wrapper = LoRAModuleWrapper(unet, "lora_unet", config, config.layer_filter.split(","))
    wrapper.hook_to_module()
    wrapper.requires_grad_(True)
    modules = {name.replace(".", "_"): each for name, each in wrapper.lora_modules.items()}
    modules = {
        name if name.startswith("lora_unet") else f"lora_unet_{name}": each for name, each in modules.items()
    }
    fill_adapters(
        modules, {key: value for key, value in record["adapters"].items() if key.startswith("unet")}
    )
    parameters = list(wrapper.parameters())
    optimizer = torch.optim.AdamW(
        parameters,
        lr=config.learning_rate,
        betas=(0.9, 0.999),
        weight_decay=config.optimizer.weight_decay,
        eps=1e-8,
    )
    warmup = lr_lambda_warmup(int(config.learning_rate_warmup_steps), lr_lambda_constant())
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup)
    mixin, losses = ModelSetupDiffusionLossMixin(), []
    for batch in record["batches"]:
        noisy = schedule.add_noise(batch["latents"], batch["noise"], batch["timesteps"])
        predicted = unet(noisy, batch["timesteps"], batch["context"]).sample
        data = {
            "loss_type": "target",
            "timestep": batch["timesteps"],
            "predicted": predicted,
            "target": target_of(schedule, batch),
            "prediction_type": schedule.config.prediction_type,
        }
        weights = {"loss_weight": torch.ones(len(noisy))}
        loss = mixin._diffusion_losses(weights, data, config, torch.device("cpu"), schedule.betas).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.clip_grad_norm)
        optimizer.step()
        rates.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss))
    return losses


class _Recorded:
    """Gives a script the recorded tensors in place of random ones, and collects its losses."""

    def __init__(self, batches: list[dict[str, torch.Tensor]], scaling: float):
        self.batches, self.scaling = batches, scaling
        self.step, self.collated = 0, 0
        self.losses: list[float] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def randn_like(self, latents: torch.Tensor) -> torch.Tensor:
        return self.batches[self.step]["noise"]

    def randint(self, *args: Any, **options: Any) -> torch.Tensor:
        return self.batches[self.step]["timesteps"]

    def collate(self, *args: Any) -> dict[str, torch.Tensor]:
        # The script's loader collates a batch ahead, so the number of the step travels in the pixels.
        number = min(self.collated, STEPS - 1)
        self.collated += 1
        ids = self.batches[number]["input_ids"]
        pixels = torch.full((len(ids), 3, 64, 64), float(number))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}

    def encode(self, pixels: torch.Tensor) -> Any:
        self.step = int(pixels[0, 0, 0, 0])
        latents = self.batches[self.step]["latents"] / self.scaling
        return types.SimpleNamespace(latent_dist=types.SimpleNamespace(sample=lambda: latents))


class _Enough(Exception):
    """Ends the script after ten steps."""


def run_diffusers(record: dict[str, Any], folder: Path) -> list[float]:
    """Run main() of train_dreambooth.py on the recorded tensors."""
    stand_in("torchvision", "torchvision.transforms")
    diffusers.utils.check_min_version = lambda version: None
    source = next(path for path in map(Path, sys.path) if (path / "examples/dreambooth").is_dir())
    spec = importlib.util.spec_from_file_location(
        "script", source / "examples/dreambooth/train_dreambooth.py"
    )
    assert spec is not None and spec.loader is not None
    script: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    text = (folder / "diffusers.sh").read_text().partition("train_dreambooth.py ")[2]
    options = [*shlex.split(text), f"--output_dir={folder}/out", "--logging_dir=logs"]
    recorded = _Recorded(
        record["batches"],
        diffusers.AutoencoderKL.from_pretrained(POCKET, subfolder="vae").config.scaling_factor,
    )

    class Bar:
        def __init__(self, *args: Any, **options: Any):
            pass

        def __getattr__(self, name: str) -> Any:
            return lambda *args, **options: None

        def set_postfix(self, **logs: float) -> None:
            recorded.losses.append(logs["loss"])
            if len(recorded.losses) == STEPS:
                raise _Enough

    class Images(torch.utils.data.Dataset):
        def __init__(self, **options: Any):
            pass

        def __len__(self) -> int:
            return 4 * 40

        def __getitem__(self, index: int) -> int:
            return index

    script.torch, script.tqdm, script.DreamBoothDataset = recorded, Bar, Images
    script.collate_fn = recorded.collate
    diffusers.AutoencoderKL.encode = lambda self, pixels: recorded.encode(pixels)
    try:
        script.main(script.parse_args(options))
    except _Enough:
        pass
    return recorded.losses


def main() -> None:
    """Run one program's code and write its losses."""
    name, folder = sys.argv[1], Path(sys.argv[2])
    record = torch.load(folder / "record.pt")
    transformers.logging.set_verbosity_error()
    losses = {"kohya": run_kohya, "onetrainer": run_onetrainer, "diffusers": run_diffusers}[name](
        record, folder
    )
    (folder / "theirs.json").write_text(json.dumps(losses))


if __name__ == "__main__":
    main()
