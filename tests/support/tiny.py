"""A random Stable Diffusion of a few thousand parameters, images and recipes, for fast tests without a network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

RESOLUTION = 32


#: The ``method:`` section of a discriminator that trains in seconds, for the images of `make_two_classes`.
DISCRIMINATOR: dict[str, Any] = {
    "name": "discriminator",
    "classes": ["warm", "cold"],
    "depths": [1, 1],
    "hidden_sizes": [8, 16],
    "input_size": 32,
    "drop_path": 0.0,
}


def make_tiny_model(folder: Path, *, prediction_type: str = "epsilon", seed: int = 0) -> Path:
    """Write a diffusers folder with tiny versions of all components of SD 1.x (VAE factor 4, 8 x 8 latents)."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(seed)
    tokenizer = make_tiny_tokenizer(folder / "tokenizer")
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            projection_dim=8,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=RESOLUTION // 4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=RESOLUTION,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    make_tiny_clip(folder, text.config)
    return folder


def make_tiny_clip(folder: Path, text_config: Any) -> None:
    """Write a vision tower and projections that form a CLIP with a model's text encoder, in the pocket layout."""
    from safetensors.torch import save_file
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    width, space = text_config.hidden_size, text_config.projection_dim
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        projection_dim=space,
    )
    CLIPVisionModelWithProjection(vision).save_pretrained(folder / "image_encoder")
    save_file({"text_projection.weight": torch.randn(space, width)}, folder / "text_projection.safetensors")


def make_tiny_tokenizer(folder: Path) -> Any:
    """Write a CLIPTokenizer whose vocabulary is the single bytes and a few merges; return it."""
    from transformers import CLIPTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    symbols = [*map(chr, range(33, 127)), *map(chr, range(161, 173)), *map(chr, range(174, 256))]
    symbols += [chr(256 + k) for k in range(256 - len(symbols))]
    merges = ["c a", "ca t</w>", "d o", "do g</w>", "p h", "s k", "sk s</w>"]
    words = [*symbols, *[s + "</w>" for s in symbols], *[m.replace(" ", "") for m in merges]]
    words += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=77)
    return tokenizer


def make_images(folder: Path, count: int, *, seed: int = 0, captions: bool = False, size: int = 48) -> Path:
    """Write ``count`` different PNGs of smooth colours, ``size`` pixels a side; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for number in range(count):
        small = Image.fromarray(rng.integers(0, 255, (4, 4, 3), dtype=np.uint8))
        small.resize((size, size), Image.Resampling.BICUBIC).save(folder / f"{number:03d}.png")
        if captions:
            (folder / f"{number:03d}.txt").write_text(f"cat, tag{number}, round, soft")
    return folder


def make_shapes(folder: Path) -> Path:
    """Write nine images of three shapes, each with tags as its caption and a transparent right half."""
    make_images(folder, 9, captions=True)
    for number, (width, height) in enumerate([(48, 48), (72, 40), (40, 72)] * 3):
        with Image.open(folder / f"{number:03d}.png") as image:
            shaped = image.resize((width, height))
        alpha = Image.new("L", shaped.size, 255)
        alpha.paste(0, (width // 2, 0, width, height))
        shaped.putalpha(alpha)
        shaped.save(folder / f"{number:03d}.png")
    return folder


def make_two_classes(folder: Path, count: int, *, size: int = 40) -> Path:
    """Write smooth images, alternately reddish (class 0) and bluish (class 1), and their labels, `dataset.json`."""
    make_images(folder, count, seed=1, size=size)
    labels = {f"{number:03d}.png": number % 2 for number in range(count)}
    for name, label in labels.items():
        with Image.open(folder / name) as image:
            tint = Image.new("RGB", image.size, (60, 60, 220) if label else (220, 60, 60))
            Image.blend(image, tint, 0.4).save(folder / name)
    (folder / "dataset.json").write_text(json.dumps(labels))
    return folder


# Keys with which the images of `make_shapes` are used uncropped and masked: buckets 24 x 40, 32 x 32 and 40 x
# 24.
SHAPES: dict[str, Any] = {
    "data__enable_bucket": True,
    "data__min_bucket_reso": 16,
    "data__max_bucket_reso": 64,
    "data__bucket_reso_steps": 8,
    "data__alpha_mask": True,
}


def make_recipe(folder: Path, **changes: Any) -> dict[str, Any]:
    """Return a simple DreamBooth recipe on a tiny model and six images under ``folder``.

    ``changes`` replace keys of it; two underscores stand for a dot.
    """
    model = folder / "model"
    if not model.exists():
        make_tiny_model(model)
    images = folder / "pictures"
    if not images.exists():
        make_images(images, 6)
    tree: dict[str, Any] = {
        "method": {"name": "dreambooth"},
        "model": {"pretrained_model_name_or_path": str(model)},
        "data": {
            "instance_data_dir": str(images),
            "instance_prompt": "a photo of sks cat",
            "class_prompt": "a photo of a cat",
            "resolution": RESOLUTION,
        },
        "train": {
            "max_train_steps": 4,
            "train_batch_size": 2,
            "seed": 7,
            "log_steps": 1,
            "checkpointing_steps": 1000,
        },
        "optimizer": {"learning_rate": 1e-3},
        "scaling": {"num_workers": 0},
        "output_dir": str(folder / "run"),
        "report_to": [],
    }
    for path, value in changes.items():
        *parents, last = path.replace("__", ".").split(".")
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = value
    return tree


def write_recipe(path: Path, tree: dict[str, Any]) -> Path:
    """Write a recipe as YAML; return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(tree))
    return path


class Stop:
    """`should_stop` of a run: requests a stop after ``polls`` polls, one per step."""

    def __init__(self, polls: int):
        self.left = polls

    def __call__(self) -> bool:
        self.left -= 1
        return self.left < 0
