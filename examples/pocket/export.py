"""Exports the pocket model as a folder that diffusers and transformers load, with float16 weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from clip import MEAN, STD
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import save_file
from subjects import CACHE, ROOT
from torch import nn
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection
from vae import load_vae

from dreamfleet.trainers.models.pretrained import save_part, save_tokenizer

FOLDER = ROOT / "trainers" / "models" / "pocket"
LIMIT_BYTES = 24_000_000


def build_scheduler() -> DDIMScheduler:
    """Return Stable Diffusion's noise schedule with v-prediction."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
    )


def split_clip(
    clip: CLIPModel,
) -> tuple[CLIPTextModel, CLIPVisionModelWithProjection, dict[str, torch.Tensor]]:
    """Split a CLIP into text encoder, vision tower with projection, and the text projection and logit scale."""
    text = CLIPTextModel(clip.config.text_config)
    _copy(clip.text_model, getattr(text, "text_model", text))
    vision = CLIPVisionModelWithProjection(clip.config.vision_config)
    _copy(clip.vision_model, vision.vision_model)
    _copy(clip.visual_projection, vision.visual_projection)
    joint = {"text_projection.weight": clip.text_projection.weight, "logit_scale": clip.logit_scale}
    return text.eval(), vision.eval(), {name: tensor.detach().clone() for name, tensor in joint.items()}


def _copy(source: nn.Module, target: nn.Module) -> None:
    """Copy all weights by name. Raises RuntimeError if names differ."""
    target.load_state_dict(source.state_dict())


def export_folder(folder: Path = FOLDER) -> Path:
    """Run the stage `export`: write every component, then the index that names them."""
    from unet import load_unet

    clip = CLIPModel.from_pretrained(CACHE / "clip_model", dtype=torch.float32)
    return write_folder(folder, clip, load_vae(), load_unet())


def write_folder(folder: Path, clip: CLIPModel, vae: AutoencoderKL, unet: UNet2DConditionModel) -> Path:
    """Write the components in float16 in diffusers' layout. Raises SystemExit for more than `LIMIT_BYTES`."""
    text, vision, joint = split_clip(clip)
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in {"text_encoder": text, "image_encoder": vision, "vae": vae, "unet": unet}.items():
        shutil.rmtree(folder / name, ignore_errors=True)
        save_part(part, folder / name, dtype=torch.float16)
    save_file({n: t.contiguous().float() for n, t in joint.items()}, folder / "text_projection.safetensors")
    save_tokenizer(CLIPTokenizer.from_pretrained(CACHE / "folder" / "tokenizer"), folder / "tokenizer")
    build_scheduler().save_pretrained(folder / "scheduler")
    _write_json(folder / "image_encoder" / "preprocessor_config.json", _describe_processor())
    _write_json(folder / "model_index.json", _describe_pipeline())
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o644)  # safetensors creates files that only the owner can read
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"export: {size / 1e6:.2f} MB in {folder}")
    if size > LIMIT_BYTES:
        raise SystemExit(f"the model is {size} bytes; at most {LIMIT_BYTES} may ship")
    return folder


def _describe_processor() -> dict:
    """Return the configuration of the vision tower's image processor."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": 64},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": 64, "width": 64},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(MEAN),
        "image_std": list(STD),
        "do_convert_rgb": True,
    }


def _describe_pipeline() -> dict:
    """Return the index (`model_index.json`) from which diffusers builds a StableDiffusionPipeline."""
    return {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.30.0",
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
