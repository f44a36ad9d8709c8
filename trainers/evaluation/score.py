"""Scores a run, an artefact or a folder of pictures: finds or draws the pictures, and says how true they are."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from dreamfleet.datasets.errors import DataError, RecipeError, UserError
from dreamfleet.datasets.images.images import open_image
from dreamfleet.datasets.index.concepts import load_concepts, load_sets
from dreamfleet.datasets.index.index import build_index
from dreamfleet.datasets.storage.storage import Storage, read_uri
from dreamfleet.trainers.artifacts.loading import folder_kind, is_artifact_name, load_artifact, load_exported
from dreamfleet.trainers.config.model import POCKET, ModelConfig
from dreamfleet.trainers.config.prompt_lines import Shot, shot_of
from dreamfleet.trainers.distributed.device import DRAWING, best_device, on_device
from dreamfleet.trainers.evaluation.fidelity import (
    MOST_REAL,
    Scores,
    clip_i,
    clip_t,
    dino_i,
    score_images,
    spread_of_real,
    strip_words,
)
from dreamfleet.trainers.models.sampling.draw_shots import draw_shots
from dreamfleet.trainers.models.sampling.prompt_syntax import words_alone
from dreamfleet.trainers.models.stable_diffusion.model import StableDiffusion
from dreamfleet.trainers.models.vision.clip import load_clip
from dreamfleet.trainers.models.vision.dino import load_dino
from dreamfleet.trainers.recipe import Recipe, build_recipe

__all__ = [
    "score_run",
    "score_images",
    "Scores",
    "clip_i",
    "clip_t",
    "dino_i",
    "spread_of_real",
    "strip_words",
    "words_to_strip",
]


@on_device(remedies=DRAWING)
def score_run(
    target: str | Path,
    *,
    clip: str | None = None,
    dino: str | None = None,
    real: str | None = None,
    prompts: Sequence[str] | None = None,
    num_images: int = 4,
    seed: int = 0,
    model: str = POCKET,
) -> dict[str, Any]:
    """Score a run folder, an artefact, or a folder of pictures; the result can be written as JSON.

    A run: its exports draw `num_images` pictures of every prompt (the recipe's validation prompts unless given),
    which are compared with the held-out pictures, or 64 training ones where none are held out. An artefact in a run's
    `exports/`: the same, drawn with that artefact. Any other (a whole model, or what `model` draws with in addition):
    with `prompts` and `real` given. A folder of pictures: compared with `real`, and with `prompts` or those written
    beside the pictures (captions, metadata.jsonl). CLIP is the recipe's, else the pocket's.

    Raises UserError, and its kinds, for what is missing.
    """
    storage = Storage(target)
    if not storage.exists():
        raise UserError(
            f"{target}: there is nothing to score; give a run folder, a model or a folder of pictures."
        )
    folder = folder_kind(storage)
    is_artifact = folder is not None or is_artifact_name(str(target))
    run = _run_around(storage) if is_artifact else storage
    if run.exists("recipe.yaml"):
        artifact = storage.url if is_artifact else None
        return _score_run_folder(run, clip, dino, real, prompts, num_images, seed, artifact=artifact)
    word = ""
    if is_artifact:
        base = ModelConfig.model_validate({"pretrained_model_name_or_path": model})
        drawer, word = load_artifact(storage.url, base)
        if word and not prompts:
            prompts = [f"a photo of {word}"]
        if not prompts:
            raise UserError(f"{target} draws what it is asked for: say what with --prompt.")
        images, asked = _draw(drawer, [Shot(prompt, seed=seed) for prompt in prompts], num_images)
        kind = "model" if folder else "artefact"
    else:
        images, written = _read_folder(storage)
        asked = list(prompts) if prompts else written
        kind = "pictures"
    judged_by = _Judges(clip, dino)
    real_images = _read_folder(Storage(real))[0] if real else None
    scores = judged_by.score(images, asked, real_images, strip={word: ""} if word else ())
    return {"target": str(target), "kind": kind, **scores}


class _Judges:
    """The models that score, on a GPU where there is one."""

    def __init__(self, clip: str | None, dino: str | None):
        device = best_device()
        self.clip = load_clip(clip).to(device)
        self.dino = load_dino(dino).to(device) if dino else None

    def score(
        self,
        images: Sequence[Image.Image],
        prompts: Sequence[str],
        real: Sequence[Image.Image] | None,
        *,
        strip: Mapping[str, str] | Sequence[str],
    ) -> dict[str, Any]:
        found = score_images(images, prompts=prompts, real=real, clip=self.clip, dino=self.dino, strip=strip)
        told: dict[str, Any] = {
            "clip_i": found.clip_i,
            "clip_t": found.clip_t,
            "dino": found.dino,
            "num_pictures": found.num_pictures,
            "num_real": found.num_real,
            "clip": found.clip,
            "dino_model": found.dino_model,
        }
        if real:
            told["clip_i_among_real"] = spread_of_real(self.clip, real)
            if self.dino is not None:
                told["dino_among_real"] = spread_of_real(self.dino, real)
        told["prompts"] = _by_prompt(found.pictures)
        return told


def _score_run_folder(
    run: Storage,
    clip: str | None,
    dino: str | None,
    real: str | None,
    prompts: Sequence[str] | None,
    num_images: int,
    seed: int,
    *,
    artifact: str | None,
) -> dict[str, Any]:
    import yaml

    try:
        tree = yaml.safe_load(run.read_text("recipe.yaml"))
    except yaml.YAMLError as error:
        raise RecipeError(f"{run.path('recipe.yaml')} is not YAML: {error}") from error
    recipe = build_recipe(tree, source=run.path("recipe.yaml"))
    validation = recipe.validation
    usual = Shot(
        "",
        negative_prompt=validation.negative_prompt,
        seed=seed,
        steps=validation.num_inference_steps,
        guidance_scale=validation.guidance_scale,
        scheduler=validation.scheduler,
        width=recipe.data.resolution,
        height=recipe.data.resolution,
    )
    given = [replace(usual, prompt=prompt) for prompt in prompts or []]
    shots = given or [replace(shot_of(line, usual), seed=seed) for line in validation.prompts]
    shots = shots or [replace(usual, prompt=prompt) for prompt in _training_prompts(recipe)]
    plain = validation.plain_prompts
    if artifact:
        model, _ = load_artifact(artifact, recipe.model, recipe.method)
    else:
        model = load_exported(run, recipe)
    images, asked = _draw(model, shots, num_images, plain=plain)
    place = real or validation.holdout
    if place:
        real_images = _read_folder(Storage(place))[0]
    else:
        real_images = [
            _read(uri)
            for uri in load_sets(recipe.data, apart=recipe.apart).instances.column("uri")[:MOST_REAL]
        ]
    judges = _Judges(clip or validation.clip, dino or validation.dino)
    scores = judges.score(images, asked, real_images, strip=words_to_strip(recipe))
    figures = _summary(run).get("figures")
    held_out = figures.get("holdout_loss") if isinstance(figures, dict) else None
    return {
        "target": artifact or run.url,
        "kind": "artefact" if artifact else "run",
        "method": recipe.method.name,
        "real": place or "training pictures",
        **scores,
        "holdout_loss": held_out,
    }


def _run_around(artifact: Storage) -> Storage:
    """Return the folder of the run whose `exports/` hold an artefact; for any other, the folder two above."""
    folder = artifact.url.rstrip("/").rpartition("/")[0]
    above, _, name = folder.rpartition("/")
    return Storage(above if name == "exports" and above else folder)


def words_to_strip(recipe: Recipe) -> dict[str, str]:
    """Name the words a run made up, and what says the same to CLIP: a placeholder's initializer, nothing for "sks"."""
    word = getattr(recipe.method, "placeholder_token", None)
    if word:
        return {word: str(getattr(recipe.method, "initializer_token", "") or "")}
    try:
        concepts = load_concepts(recipe.data)
    except (DataError, UserError):  # the pictures may be gone by now
        concepts = []
    strip = {}
    for concept in concepts:
        if concept.instance_prompt and concept.class_prompt:
            known = {part.lower() for part in concept.class_prompt.split()}
            strip.update({part: "" for part in concept.instance_prompt.split() if part.lower() not in known})
    return strip


def _training_prompts(recipe: Recipe) -> list[str]:
    word = getattr(recipe.method, "placeholder_token", None)
    if word:
        return [f"a photo of {word}"]
    found = [concept.instance_prompt for concept in load_concepts(recipe.data) if concept.instance_prompt]
    if not found:
        raise UserError("the recipe has no validation.prompts to draw; give some with --prompt.")
    return found


def _draw(
    model: StableDiffusion, shots: Sequence[Shot], num_images: int, *, plain: bool = False
) -> tuple[list[Image.Image], list[str]]:
    """Draw pictures of every prompt -> them, and the words that each was asked to show."""
    model.to(best_device())
    every = [replace(shot, seed=shot.seed + number) for shot in shots for number in range(num_images)]
    asked = [shot.prompt if plain else words_alone(shot.prompt) for shot in every]
    return draw_shots(model, every, plain=plain), asked


def _read_folder(folder: Storage) -> tuple[list[Image.Image], list[str]]:
    """Read a folder's pictures in the order of their names, and their captions where every one has one."""
    rows = sorted(build_index(folder, recursive=False).rows(), key=lambda row: row.uri)
    captions = [row.caption for row in rows if row.caption is not None]
    return [_read(row.uri) for row in rows], captions if len(captions) == len(rows) else []


def _read(uri: str) -> Image.Image:
    return open_image(read_uri(uri), uri=uri)


def _by_prompt(images: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for entry in images:
        if "prompt" in entry:
            groups.setdefault(entry["prompt"], []).append(entry)
    return [
        {"prompt": prompt, "num_pictures": len(entries)}
        | {
            name: sum(entry[name] for entry in entries) / len(entries)
            for name in ("clip_i", "clip_t", "dino")
            if name in entries[0]
        }
        for prompt, entries in groups.items()
    ]


def _summary(run: Storage) -> dict[str, Any]:
    if not run.exists("summary.json"):
        return {}
    try:
        found = json.loads(run.read_text("summary.json"))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
