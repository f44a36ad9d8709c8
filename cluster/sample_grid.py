"""What `sample` and `convert` do: find the model behind a name, draw with it, write it in another format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dreamfleet.datasets.errors import UserError
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.artifacts.embedding import EmbeddingKind
from dreamfleet.trainers.artifacts.kind import detect_kind
from dreamfleet.trainers.config.model import ModelConfig
from dreamfleet.trainers.distributed.device import DRAWING, best_device, on_device
from dreamfleet.trainers.models.stable_diffusion.aesthetic import (
    AestheticEncoder,
    AestheticSettings,
    apply_aesthetic,
)
from dreamfleet.trainers.models.stable_diffusion.model import StableDiffusion, load_model

if TYPE_CHECKING:
    from PIL.Image import Image

    from dreamfleet.cluster.png_metadata import Row
    from dreamfleet.trainers.config.prompt_lines import Shot
    from dreamfleet.trainers.models.sampling.prompt_tags import Shelves


@dataclass(frozen=True)
class Aesthetic:
    """An aesthetic vector's file, on disk or in a bucket, and how prompts are tuned towards it."""

    path: str
    settings: AestheticSettings
    clip: str | None = None

    def apply(self, model: StableDiffusion) -> None:
        """Make a model draw with it. Raises UserError for a file that is not there."""
        if not Storage(self.path).exists():
            raise UserError(f"--aesthetic {self.path}: there is no such file")
        with Storage(self.path).local_copy() as path:
            apply_aesthetic(model, path, self.settings, self.clip)

    def entries(self) -> dict[str, Any]:
        """Tell the settings under the names of the webui's extension."""
        told = self.settings
        return {
            "Aesthetic embedding": Path(self.path).stem,
            "Aesthetic LR": told.learning_rate,
            "Aesthetic weight": told.weight,
            "Aesthetic steps": told.steps,
            "Aesthetic slerp": told.slerp != "off",
            "Aesthetic text": told.text or None,
            "Aesthetic text negative": told.text_negative if told.text else None,
            "Aesthetic slerp angle": told.slerp_angle if told.text else None,
        }


@on_device(remedies=DRAWING)
def draw_grid(
    model_name: str,
    prompts: Sequence[str],
    out: Path,
    *,
    embeddings: Sequence[str] = (),
    hypernetworks: Sequence[str] = (),
    hypernetwork_dir: str | None = None,
    loras: Sequence[str] = (),
    lora_dir: str | None = None,
    aesthetic: Aesthetic | None = None,
    negative_prompt: str = "",
    num_images: int = 4,
    seed: int = 0,
    steps: int = 25,
    guidance_scale: float = 7.5,
    scheduler: str = "ddim",
    width: int | None = None,
    height: int | None = None,
    clip_skip: int | None = None,
    max_token_length: int | None = None,
    prompt_file: str | None = None,
    plain_prompts: bool = False,
    out_dir: Path | None = None,
) -> list[dict[str, Any]]:
    """Write a grid with a row a prompt and a column a seed; return the cells in reading order.

    ``prompts``: in the webui's syntax, or literal where ``plain_prompts``. ``prompt_file``: more of them, one a line,
    with options of their own as kohya's files have them.
    ``model_name``: pocket, a diffusers folder, a single file, a hub name, or a run folder (its exports are used).
    ``hypernetworks``: files, each with ``:0.8`` where its strength is not 1; prompts name others, in
    ``hypernetwork_dir`` or beside these, as ``<hypernet:NAME:0.8>``. ``loras``: the same, as ``<lora:NAME:0.8>``.
    ``aesthetic``: a vector that prompts are tuned towards; the cells then tell the cosine with it before and after.
    ``clip_skip`` and ``max_token_length``: as in a recipe's ``model:``; None: the run's, 1 and 75. ``out_dir``: a
    folder for each picture by itself. PNGs say how they were drawn, as the webui's do.
    """
    from dreamfleet.cluster.png_metadata import Settings, drawn_text, require_place, write_images
    from dreamfleet.trainers.config.prompt_lines import Shot
    from dreamfleet.trainers.config.samplers import plain_sampler
    from dreamfleet.trainers.models.sampling.prompt_tags import HypernetworkShelf, LoraShelf, Shelves

    require_place(out, out_dir)
    usual = Shot(
        "", negative_prompt, seed, steps, guidance_scale, plain_sampler(scheduler), width=width, height=height
    )
    shots = _shots(usual, prompts, prompt_file)
    settings = Settings(embeddings, aesthetic.entries() if aesthetic else {}, plain_prompts)
    shelves = Shelves(HypernetworkShelf(hypernetworks, hypernetwork_dir), LoraShelf(loras, lora_dir))
    arranged = [shelves.arrange(shot.prompt, plain=plain_prompts) for shot in shots]
    rows = [
        (replace(shot, prompt=text, seed=shot.seed + column), extras)
        for shot, (text, extras) in zip(shots, arranged, strict=True)
        for column in range(num_images)
    ]
    model = load_with_embeddings(model_name, embeddings)
    _make_ready(model, aesthetic, clip_skip, max_token_length)
    images = _draw(model, shelves, rows, plain=plain_prompts)
    texts = [drawn_text(model, settings, row, image) for row, image in zip(rows, images, strict=True)]
    write_images(images, texts, [shot.seed for shot, _ in rows], out, out_dir, columns=num_images)
    asked = [shot.prompt for shot in shots for _ in range(num_images)]
    return [
        {"prompt": prompt, "seed": shot.seed, **_gain(model, shot, plain=plain_prompts)}
        for prompt, (shot, _) in zip(asked, rows, strict=True)
    ]


def _shots(usual: Shot, prompts: Sequence[str], prompt_file: str | None) -> list[Shot]:
    """List what to draw: the prompts as they are, and those of a file with their own options."""
    from dreamfleet.trainers.config.prompt_lines import read_prompts, shot_of

    shots = [replace(usual, prompt=prompt) for prompt in prompts]
    if prompt_file is not None:
        shots += [shot_of(line, usual) for line in read_prompts([prompt_file], is_file=True)]
    if not shots:
        raise UserError("there is nothing to draw: give --prompt, or --prompt-file")
    return shots


def _draw(model: StableDiffusion, shelves: Shelves, rows: Sequence[Row], *, plain: bool) -> list[Image]:
    """Draw a picture for each row; those in a row that name the same extras are drawn together."""
    from dreamfleet.trainers.models.sampling.draw_shots import draw_shots

    apply, images = shelves.on(model), []
    for extras, group in groupby(rows, key=lambda row: row[1]):
        apply(extras)
        images += draw_shots(model, [shot for shot, _ in group], plain=plain)
    return images


def load_with_embeddings(name: str, embeddings: Sequence[str] = ()) -> StableDiffusion:
    """Load the model behind a name (a run folder stands for its exports), and teach it the words of embedding files.

    A ``NAME-neg`` beside a file is the word's negative, which pictures that use the word are drawn with.
    """
    model = load_named(name)
    for path in embeddings:
        if "://" not in path and not Path(path).expanduser().is_file():
            raise UserError(f"--embedding {path}: there is no such file")
        with Storage(path).local_copy() as local:
            EmbeddingKind().load_into(model, local, address=path)
    return model


def load_named(name: str) -> StableDiffusion:
    """Load what a person calls a model: pocket, a folder, a file, a hub name, or a run."""
    from dreamfleet.trainers.artifacts.loading import load_exported
    from dreamfleet.trainers.run.export import read_recipe

    path = Path(name).expanduser()
    if "://" not in name and not path.is_dir():
        return load_model(ModelConfig(pretrained_model_name_or_path=str(path) if path.exists() else name))
    place = Storage(name if "://" in name else path)
    if place.exists("recipe.yaml"):
        return load_exported(place, read_recipe(place))
    return load_model(ModelConfig(pretrained_model_name_or_path=place.path()))


def convert_artifact(source: Path, target: Path) -> Path:
    """Write ``source`` in the format that the name of ``target`` says.

    Raises FormatError for a source of no known kind, UserError for a format that its kind does not have and for a
    target that exists.
    """
    if not source.exists():
        raise UserError(f"there is no {source}")
    if target.exists():
        raise UserError(f"{target} exists already; give another name")
    return detect_kind(source).convert(source, target)


def _make_ready(
    model: StableDiffusion, aesthetic: Aesthetic | None, clip_skip: int | None, max_token_length: int | None
) -> None:
    model.clip_skip = clip_skip or model.clip_skip
    model.max_token_length = max_token_length or model.max_token_length
    model.to(best_device())
    if aesthetic:
        aesthetic.apply(model)


def _gain(model: StableDiffusion, shot: Shot, *, plain: bool) -> dict[str, Any]:
    """Tell how much nearer to the aesthetic vector a prompt was tuned: its first text, where there are several."""
    from dreamfleet.trainers.models.sampling.prompt_syntax import parse_prompt

    encoder = model.encode_prompts
    if not isinstance(encoder, AestheticEncoder):
        return {}
    text = parse_prompt(shot.prompt, shot.steps, plain=plain)[0].schedule[0][1]
    cosines = encoder.cosines.get(text)
    return {"aesthetic_cosine": [cosines[0], cosines[-1]]} if cosines else {}
