"""Builds a recipe's method on a loaded model, wherever its parameters lie."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dreamfleet.datasets.config import Concept
from dreamfleet.datasets.errors import RecipeError
from dreamfleet.trainers.methods.base import Method, Setting, method_class
from dreamfleet.trainers.methods.diffusion_method import DiffusionMethod
from dreamfleet.trainers.models.stable_diffusion.model import StableDiffusion
from dreamfleet.trainers.recipe import Recipe


def build_method(recipe: Recipe, model: StableDiffusion, *, concepts: Sequence[Concept]) -> Method:
    """Build the method on a model, with the recipe's weight type and activation checkpointing; moves nothing."""
    setting = Setting(concepts=tuple(concepts), snr_gamma=recipe.train.snr_gamma)
    method = method_class(recipe.method)(recipe.method, model, setting)
    if recipe.train.full_bf16:
        for group in method.groups():
            for param in group.params.values():
                param.data = param.data.to(torch.bfloat16)
    if recipe.train.gradient_checkpointing:
        checkpoint_activations(method)
    return method


def checkpoint_activations(method: Method) -> None:
    """Let the parts that gradients pass through recompute their layers' activations in the backward pass."""
    unet, encoders = method.model.unet, method.model.text_encoders
    trains_text = isinstance(method, DiffusionMethod) and method.trains_text
    unet.enable_gradient_checkpointing()
    unet.train()  # diffusers checkpoints in training mode only, also a frozen U-Net that gradients pass through
    for encoder in encoders if trains_text else ():
        # transformers 5.23 renamed the method, and version 6 drops the old name.
        enable = getattr(encoder, "activation_checkpointing_enable", None)
        (enable or encoder.gradient_checkpointing_enable)()
        for module in encoder.modules():
            # transformers checkpoints in training mode only. The modules inside stay in eval mode: no dropout.
            module.training = module.training or getattr(module, "gradient_checkpointing", False)


def check_resolution(recipe: Recipe, model: StableDiffusion) -> None:
    """Raise RecipeError when ``data.resolution`` or the bucket step is no size that the model can compute."""
    if model.unet is None:  # no images are generated
        return
    # The U-Net halves the latents at every level but the last.
    step = model.vae_factor * 2 ** (len(model.unet.config.block_out_channels) - 1)
    for key in ("resolution", "bucket_reso_steps") if recipe.data.enable_bucket else ("resolution",):
        size = getattr(recipe.data, key)
        if size % step:
            raise RecipeError(
                f"data.{key} {size} does not suit {model.folder}: it must be a multiple of {step}; "
                f"the model was made for {model.resolution}"
            )
