"""Loads the model that a run's exports make, to draw with: a tuned one, or the base model with what was learned."""

from __future__ import annotations

from dreamfleet.datasets.errors import UserError
from dreamfleet.datasets.storage import Storage
from dreamfleet.trainers.methods.aesthetic_gradients import AestheticGradientsConfig
from dreamfleet.trainers.methods.hypernetwork import HypernetworkConfig
from dreamfleet.trainers.recipe import Recipe
from dreamfleet.trainers.sd.formats.lora import DIFFUSERS_FILE
from dreamfleet.trainers.sd.lora import apply_lora
from dreamfleet.trainers.sd.model import StableDiffusion, load_model


def load_exported(run: Storage, recipe: Recipe) -> StableDiffusion:
    """Load the model that a run's exports make: the tuned one, or its base model with what was learned.

    Raises UserError when the run has no exports that draw pictures.
    """
    files, folders = run.list("exports"), run.list_dirs("exports")
    changes = {"pretrained_model_name_or_path": ""}
    per_prompt = isinstance(recipe.method, AestheticGradientsConfig)  # truer than what is baked in a folder
    if "diffusers" in folders and not (per_prompt and f"{recipe.run_name}.pt" in files):
        changes["pretrained_model_name_or_path"] = run.path("exports", "diffusers")
        return load_model(recipe.model.model_copy(update=changes))
    if isinstance(recipe.method, HypernetworkConfig | AestheticGradientsConfig):
        if (name := f"{recipe.run_name}.pt") in files:
            model = load_model(recipe.model)
            with run.local_copy(f"exports/{name}") as path:
                recipe.method.apply(model, path)
            return model
    elif word := getattr(recipe.method, "placeholder_token", None):
        from dreamfleet.trainers.sd.embeddings import NEGATIVE, install_embedding, install_negative
        from dreamfleet.trainers.sd.formats.embedding import SUFFIXES, read_embedding

        for suffix in SUFFIXES:
            if f"{recipe.run_name}{suffix}" in files:
                model = load_model(recipe.model)
                for install, ending in ((install_embedding, ""), (install_negative, NEGATIVE)):
                    if (name := f"{recipe.run_name}{ending}{suffix}") in files:
                        with run.local_copy(f"exports/{name}") as path:
                            found = read_embedding(path)
                        install(model, word, found.vectors, found.vectors_2)
                return model
    elif getattr(recipe.method, "lora_rank", None):
        for name in (f"{recipe.run_name}.safetensors", DIFFUSERS_FILE):
            if name in files:
                model = load_model(recipe.model)
                with run.local_copy(f"exports/{name}") as path:
                    apply_lora(model, path)
                return model
    else:
        for name in (f"{recipe.run_name}{suffix}" for suffix in (".safetensors", ".ckpt")):
            if name in files:
                changes["pretrained_model_name_or_path"] = run.path("exports", name)
                return load_model(recipe.model.model_copy(update=changes))
    there = ", ".join([*files, *folders]) or "nothing"
    raise UserError(
        f"{run.url}: no export that pictures can be drawn with (exports/ has {there}). Finish the run, or write one "
        "with `dreamfleet export`."
    )
