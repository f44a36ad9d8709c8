"""Loads the model that a run's exports, or an artefact, make to draw with: tuned, or a base with what was learned."""

from __future__ import annotations

from pathlib import Path

from dreamfleet.datasets.errors import FormatError, UserError
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.config.method import MethodConfig
from dreamfleet.trainers.config.methods.aesthetic_gradients import AestheticGradientsConfig
from dreamfleet.trainers.config.methods.hypernetwork import HypernetworkConfig
from dreamfleet.trainers.config.model import ModelConfig
from dreamfleet.trainers.methods.aesthetic_gradients import settings_of
from dreamfleet.trainers.models.embeddings import NEGATIVE
from dreamfleet.trainers.models.formats.aesthetic import holds_aesthetic
from dreamfleet.trainers.models.formats.embedding import SUFFIXES, read_embedding
from dreamfleet.trainers.models.formats.hypernetwork import holds_hypernetwork
from dreamfleet.trainers.models.formats.lora import DIFFUSERS_FILE, holds_lora
from dreamfleet.trainers.models.lora import apply_lora
from dreamfleet.trainers.models.stable_diffusion.aesthetic import apply_aesthetic
from dreamfleet.trainers.models.stable_diffusion.hypernetwork import load_hypernetwork
from dreamfleet.trainers.models.stable_diffusion.loading import SINGLE_FILES
from dreamfleet.trainers.models.stable_diffusion.model import StableDiffusion, load_model
from dreamfleet.trainers.recipe import Recipe

ARTIFACTS = (*SUFFIXES, ".ckpt")
LARGEST_EMBEDDING = 16 * 2**20  # bytes; the smallest Stable Diffusion is larger


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
                _apply(recipe.method, model, path)
            return model
    elif word := getattr(recipe.method, "placeholder_token", None):
        for suffix in SUFFIXES:
            if (name := f"{recipe.run_name}{suffix}") in files:
                model = load_model(recipe.model)
                teach_word(model, run.path("exports", name), word)
                return model
    elif getattr(recipe.method, "lora_rank", None):
        for name in (f"{recipe.run_name}.safetensors", DIFFUSERS_FILE):
            if name in files:
                model = load_model(recipe.model)
                with run.local_copy(f"exports/{name}") as path:
                    apply_lora(model, path)
                return model
    else:
        for name in (f"{recipe.run_name}{suffix}" for suffix in SINGLE_FILES):
            if name in files:
                changes["pretrained_model_name_or_path"] = run.path("exports", name)
                return load_model(recipe.model.model_copy(update=changes))
    there = ", ".join([*files, *folders]) or "nothing"
    raise UserError(
        f"{run.url}: no export that pictures can be drawn with (exports/ has {there}). Finish the run, or write one "
        "with `dreamfleet export`."
    )


def load_artifact(
    address: str, base: ModelConfig, method: MethodConfig | None = None
) -> tuple[StableDiffusion, str]:
    """Load what an artefact draws with: a whole model, or ``base`` with what its file adds; and its word, else "".

    ``method``: its run's, which says word, strength and the like. Raises UserError for what is no artefact.
    """
    place = Storage(address)
    if place.exists("model_index.json"):
        return load_model(base.model_copy(update={"pretrained_model_name_or_path": address})), ""
    with place.local_copy() as path:
        hypernetwork, aesthetic = holds_hypernetwork(path), holds_aesthetic(path)
        lora = path.suffix in (".pt", ".safetensors") and holds_lora(path)
        if not (hypernetwork or aesthetic or lora):
            if _is_whole(path):
                return load_model(base.model_copy(update={"pretrained_model_name_or_path": address})), ""
            model = load_model(base)
            return model, teach_word(model, address, getattr(method, "placeholder_token", ""))
        model = load_model(base)
        if isinstance(method, HypernetworkConfig | AestheticGradientsConfig):
            _apply(method, model, path)
        elif hypernetwork:
            load_hypernetwork(model, path)
        elif aesthetic:
            apply_aesthetic(model, path)
        else:
            apply_lora(model, path)
        return model, ""


def _apply(method: MethodConfig, model: StableDiffusion, path: Path) -> None:
    """Make a model draw with an exported file, as the previews of its run do."""
    if isinstance(method, HypernetworkConfig):
        load_hypernetwork(model, path, method.multiplier)
    elif isinstance(method, AestheticGradientsConfig):
        apply_aesthetic(model, path, settings_of(method), method.clip)


def _is_whole(path: Path) -> bool:
    if path.suffix.lower() not in SINGLE_FILES:
        return False
    try:
        return path.stat().st_size > LARGEST_EMBEDDING or not read_embedding(path)
    except FormatError:
        return True


def teach_word(model: StableDiffusion, address: str, word: str = "") -> str:
    """Teach a model an embedding file's word, the file's own name when left out; return it.

    A ``NAME-neg`` beside the file is the word's negative, which pictures that use the word are drawn with.
    """
    from dreamfleet.trainers.models.embeddings import install_embedding, install_negative

    with Storage(address).local_copy() as path:
        found = read_embedding(path)
    word = word or found.name
    install_embedding(model, word, found.vectors, found.vectors_2)
    beside = negative_beside(address)
    if beside.exists():
        with beside.local_copy() as path:
            negative = read_embedding(path)
        install_negative(model, word, negative.vectors, negative.vectors_2)
    return word


def negative_beside(address: str) -> Storage:
    """Return where the negative of an embedding file's word is, if there is one: ``NAME-neg`` beside ``NAME``."""
    stem, dot, suffix = address.rpartition(".")
    return Storage(f"{stem}{NEGATIVE}{dot}{suffix}")
