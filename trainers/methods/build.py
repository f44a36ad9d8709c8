"""Builds the method of a recipe on a loaded model, and checks that they fit together."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dreamfleet.datasets.config import Concept
from dreamfleet.datasets.errors import RecipeError, UserError
from dreamfleet.trainers.methods.base import Method, Setting, method_class
from dreamfleet.trainers.methods.diffusion_method import require_diffusion
from dreamfleet.trainers.models.family import DiffusionModel
from dreamfleet.trainers.recipe import Recipe


def build_method(recipe: Recipe, model: DiffusionModel, *, concepts: Sequence[Concept]) -> Method:
    """Build the method on a model, with the recipe's weight type and activation checkpointing.

    No parameter is moved to another device. Raises UserError if the formats of the method's class are
    missing, or do not belong to its artifact kinds; RecipeError for activation checkpointing of a method that
    trains no diffusion model; ModelError if the model does not support the method.
    """
    setting = Setting(concepts=tuple(concepts), loss=recipe.train)
    method = method_class(recipe.method)(recipe.method, model, setting)
    if not method.formats:
        raise UserError(f"method {method.name!r}: {type(method).__name__} sets no formats")
    if wrong := set(method.formats) - set(method.all_formats):
        raise UserError(
            f"method {method.name!r}: formats {', '.join(sorted(wrong))} are not of its artifacts "
            f"({', '.join(recipe.method.artifacts)}), which have: {', '.join(method.all_formats)}"
        )
    if recipe.train.full_bf16:
        for group in method.groups():
            for param in group.params.values():
                param.data = param.data.to(torch.bfloat16)
    if recipe.train.gradient_checkpointing:
        trained = require_diffusion(method, "train.gradient_checkpointing")
        model.checkpoint_activations(text=trained.trains_text)
    return method


def check_resolution(recipe: Recipe, model: DiffusionModel) -> None:
    """Raise RecipeError if ``data.resolution`` or the bucket step is no multiple of the model's step."""
    if model.denoiser is None:  # no images are generated
        return
    step = model.size_multiple
    for key in ("resolution", "bucket_reso_steps") if recipe.data.enable_bucket else ("resolution",):
        size = getattr(recipe.data, key)
        if size % step:
            raise RecipeError(
                f"data.{key} {size} does not suit {model.folder}: it must be a multiple of {step}; "
                f"the model was made for {model.resolution}"
            )
