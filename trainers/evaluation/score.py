"""Scores a run, an artifact or a folder of images: finds or generates the images and computes every metric."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from dreamfleet.datasets.errors import DataError, RecipeError, UserError
from dreamfleet.datasets.images.images import open_image
from dreamfleet.datasets.index.concepts import load_concepts
from dreamfleet.datasets.index.index import build_index
from dreamfleet.datasets.index.sets import load_sets
from dreamfleet.datasets.index.sources import ScanOptions, read_image_file
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.artifacts.loading import folder_kind, is_artifact_name, load_artifact, load_exported
from dreamfleet.trainers.config.image_request import ImageRequest
from dreamfleet.trainers.config.metrics import image_metrics
from dreamfleet.trainers.config.model import POCKET, ModelConfig
from dreamfleet.trainers.config.prompt_lines import parse_prompt_line
from dreamfleet.trainers.distributed.device import DRAWING, best_device, on_device
from dreamfleet.trainers.evaluation.fidelity import spread_of_real
from dreamfleet.trainers.evaluation.judge import score_images
from dreamfleet.trainers.evaluation.previews import default_request
from dreamfleet.trainers.models.family import DiffusionModel
from dreamfleet.trainers.models.sampling.prompt_syntax import plain_text
from dreamfleet.trainers.models.sampling.sample import generate
from dreamfleet.trainers.models.vision.clip import load_clip
from dreamfleet.trainers.models.vision.dino import load_dino
from dreamfleet.trainers.recipe import Recipe, build_recipe

MOST_REAL = 64  # maximum number of training images that generated images are compared with


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
    """Score a run folder, an artifact, or a folder of images; the result can be written as JSON.

    A run: its exports generate ``num_images`` images of every prompt (the recipe's validation prompts by default),
    which are compared with the held-out images, or with 64 training images if none are held out. An artifact in a run's
    ``exports/``: the same, generated with that artifact. Any other artifact (a whole model, or one that ``model``
    loads): ``prompts`` and ``real`` have to be given. A folder of images: compared with ``real``, and with ``prompts``
    or the captions beside the images (text files, metadata.jsonl). ``clip`` defaults to the recipe's CLIP, then the
    pocket's.

    Every registered metric is computed if what it needs is given, else its value is None. Raises UserError, or a
    subclass, for what is missing.
    """
    storage = Storage(target)
    if not storage.exists():
        raise UserError(f"{target}: nothing to score; give a run folder, a model or a folder of images")
    folder = folder_kind(storage)
    is_artifact = folder is not None or is_artifact_name(str(target))
    run = _run_around(storage) if is_artifact else storage
    if run.exists("recipe.yaml"):
        artifact = storage.url if is_artifact else None
        return _score_run_folder(
            run,
            artifact=artifact,
            clip=clip,
            dino=dino,
            real=real,
            prompts=prompts,
            num_images=num_images,
            seed=seed,
        )
    placeholder = ""
    if is_artifact:
        base = ModelConfig.model_validate({"pretrained_model_name_or_path": model})
        tuned, placeholder = load_artifact(storage.url, base)
        if placeholder and not prompts:
            prompts = [f"a photo of {placeholder}"]
        if not prompts:
            raise UserError(f"{target} is a model: name the prompts to generate images of with --prompt")
        requests = [ImageRequest(prompt, seed=seed) for prompt in prompts]
        images, shown = _generate(tuned, requests, num_images)
        kind = "model" if folder else "artefact"
    else:
        images, captions = _read_folder(storage)
        shown = list(prompts) if prompts else captions
        kind = "pictures"
    real_images = _read_folder(Storage(real))[0] if real else []
    scores = _score(
        images, shown, real_images, clip=clip, dino=dino, strip={placeholder: ""} if placeholder else ()
    )
    return {"target": str(target), "kind": kind, **scores}


def _score(
    images: Sequence[Image.Image],
    prompts: Sequence[str],
    real: Sequence[Image.Image],
    *,
    clip: str | None,
    dino: str | None,
    strip: Mapping[str, str] | Sequence[str],
) -> dict[str, Any]:
    """Return the scores of images in the order in which they are reported."""
    device = best_device()
    by_clip = load_clip(clip).to(device)
    by_dino = load_dino(dino).to(device) if dino else None
    scores = score_images(images, prompts=prompts, real=real, clip=by_clip, dino=by_dino, strip=strip)
    figures: dict[str, Any] = {
        **{name: scores.means.get(name) for name in image_metrics()},
        "num_pictures": len(images),
        "num_real": len(real),
        "clip": by_clip.name,
        "dino_model": by_dino.name if by_dino else None,
    }
    if real:
        figures["clip_i_among_real"] = spread_of_real(by_clip, real)
        if by_dino is not None:
            figures["dino_among_real"] = spread_of_real(by_dino, real)
    figures["prompts"] = _by_prompt(scores.images)
    return figures


def _score_run_folder(
    run: Storage,
    *,
    artifact: str | None,
    clip: str | None,
    dino: str | None,
    real: str | None,
    prompts: Sequence[str] | None,
    num_images: int,
    seed: int,
) -> dict[str, Any]:
    import yaml

    try:
        tree = yaml.safe_load(run.read_text("recipe.yaml"))
    except yaml.YAMLError as error:
        raise RecipeError(f"{run.path('recipe.yaml')} is not YAML: {error}") from error
    recipe = build_recipe(tree, source=run.path("recipe.yaml"))
    validation = recipe.validation
    default = replace(default_request(validation, recipe.data.resolution), seed=seed)
    requests = [replace(parse_prompt_line(line, default), seed=seed) for line in validation.prompts]
    if prompts or not requests:
        requests = [replace(default, prompt=prompt) for prompt in prompts or _training_prompts(recipe)]
    if artifact:
        model, _ = load_artifact(artifact, recipe.model, recipe.method)
    else:
        model = load_exported(run, recipe)
    images, shown = _generate(model, requests, num_images)
    if folder := real or validation.holdout:
        real_images = _read_folder(Storage(folder))[0]
    else:
        trained_on = load_sets(recipe.data, excluded=recipe.excluded_folders).instances
        real_images = [_read(uri) for uri in trained_on.column("uri")[:MOST_REAL]]
    scores = _score(
        images,
        shown,
        real_images,
        clip=clip or validation.clip,
        dino=dino or validation.dino,
        strip=words_to_strip(recipe),
    )
    figures = _summary(run).get("figures")
    held_out = figures.get("holdout_loss") if isinstance(figures, dict) else None
    return {
        "target": artifact or run.url,
        "kind": "artefact" if artifact else "run",
        "method": recipe.method.name,
        "real": folder or "training pictures",
        **scores,
        "holdout_loss": held_out,
    }


def _run_around(artifact: Storage) -> Storage:
    """Return the run folder whose ``exports/`` contains an artifact; for any other artifact, its folder."""
    folder = artifact.url.rstrip("/").rpartition("/")[0]
    parent, _, name = folder.rpartition("/")
    return Storage(parent if name == "exports" and parent else folder)


def words_to_strip(recipe: Recipe) -> dict[str, str]:
    """Return the words that only a run knows -> replacement for CLIP: a placeholder's initializer, "" for "sks"."""
    placeholder = getattr(recipe.method, "placeholder_token", None)
    if placeholder:
        return {placeholder: str(getattr(recipe.method, "initializer_token", "") or "")}
    try:
        concepts = load_concepts(recipe.data)
    except (DataError, UserError):  # the training images may have been removed since
        concepts = []
    strip = {}
    for concept in concepts:
        if concept.instance_prompt and concept.class_prompt:
            known = {part.lower() for part in concept.class_prompt.split()}
            strip.update({part: "" for part in concept.instance_prompt.split() if part.lower() not in known})
    return strip


def _training_prompts(recipe: Recipe) -> list[str]:
    placeholder = getattr(recipe.method, "placeholder_token", None)
    if placeholder:
        return [f"a photo of {placeholder}"]
    found = [concept.instance_prompt for concept in load_concepts(recipe.data) if concept.instance_prompt]
    if not found:
        raise UserError("the recipe has no validation.prompts; give some with --prompt")
    return found


def _generate(
    model: DiffusionModel, requests: Sequence[ImageRequest], num_images: int
) -> tuple[list[Image.Image], list[str]]:
    """Generate ``num_images`` images of every prompt; return them with the prompt of each, without its syntax."""
    model.to(best_device())
    every = [each for request in requests for each in request.columns(num_images)]
    shown = [each.prompt if each.plain else plain_text(each.prompt) for each in every]
    return generate(model, every), shown


def _read_folder(folder: Storage) -> tuple[list[Image.Image], list[str]]:
    """Read a folder's images in the order of their names, and their captions if every image has one."""
    rows = sorted(build_index(folder, ScanOptions(recursive=False)).rows(), key=lambda row: row.uri)
    captions = [row.caption for row in rows if row.caption is not None]
    return [_read(row.uri) for row in rows], captions if len(captions) == len(rows) else []


def _read(uri: str) -> Image.Image:
    return open_image(read_image_file(uri), uri=uri)


def _by_prompt(images: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for entry in images:
        if "prompt" in entry:
            groups.setdefault(entry["prompt"], []).append(entry)
    return [
        {"prompt": prompt, "num_pictures": len(entries)}
        | {
            name: sum(entry[name] for entry in entries) / len(entries)
            for name in image_metrics()
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
