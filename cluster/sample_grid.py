"""Generates the grid of `dreamfleet sample`: any model, with any artifacts, for every prompt and seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dreamfleet.datasets.errors import UserError
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.artifacts.embedding import EmbeddingKind
from dreamfleet.trainers.artifacts.kind import ArtifactKind
from dreamfleet.trainers.artifacts.loading import kind_of, load_exported
from dreamfleet.trainers.config.image_request import ImageRequest
from dreamfleet.trainers.config.model import POCKET, ModelConfig
from dreamfleet.trainers.config.prompt_lines import parse_prompt_line, read_prompts
from dreamfleet.trainers.distributed.device import DRAWING, best_device, on_device
from dreamfleet.trainers.models.family import DiffusionModel, load_model
from dreamfleet.trainers.models.sampling.prompt_syntax import parse_prompt
from dreamfleet.trainers.models.sampling.prompt_tags import (
    HypernetworkFiles,
    LoraFiles,
    PromptFiles,
    split_multiplier,
)
from dreamfleet.trainers.models.sampling.sample import generate
from dreamfleet.trainers.models.stable_diffusion.aesthetic import (
    AestheticEncoder,
    AestheticSettings,
    apply_aesthetic,
)

if TYPE_CHECKING:
    from PIL.Image import Image

    from dreamfleet.cluster.png_metadata import Row


@dataclass(frozen=True)
class Aesthetic:
    """An aesthetic vector file, on disk or in a bucket, and the settings of tuning prompts towards it."""

    path: str
    settings: AestheticSettings
    clip: str | None = None

    def apply(self, model: DiffusionModel) -> None:
        """Tune the model's prompts towards the vector. Raises UserError for a missing file."""
        if not Storage(self.path).exists():
            raise UserError(f"--aesthetic {self.path}: there is no such file")
        with Storage(self.path).local_copy() as path:
            apply_aesthetic(model, path, self.settings, self.clip)

    def entries(self) -> dict[str, Any]:
        """Return the settings as entries of the PNG's text, named as the webui's extension names them."""
        settings = self.settings
        return {
            "Aesthetic embedding": Path(self.path).stem,
            "Aesthetic LR": settings.learning_rate,
            "Aesthetic weight": settings.weight,
            "Aesthetic steps": settings.steps,
            "Aesthetic slerp": settings.slerp != "off",
            "Aesthetic text": settings.text or None,
            "Aesthetic text negative": settings.text_negative if settings.text else None,
            "Aesthetic slerp angle": settings.slerp_angle if settings.text else None,
        }


@dataclass(frozen=True)
class OtherArtifact:
    """An artifact whose kind has no separate command-line option, and its strength."""

    kind: ArtifactKind
    address: str
    strength: float

    def apply(self, model: DiffusionModel) -> None:
        """Load the artifact into a model."""
        with Storage(self.address).local_copy() as path:
            self.kind.load_into(model, path, address=self.address, strength=self.strength)


@dataclass(frozen=True)
class GridRequest:
    """Options of `dreamfleet sample`, which generates a grid with a row per prompt and a column per seed.

    ``model``: pocket, a diffusers folder, a single file, a hub name, or a run folder, whose exports are used.
    ``defaults``: the options of every image; a line of ``prompt_file`` may replace some, in kohya's form.
    ``artifacts``, ``hypernetworks`` and ``loras``: addresses, each with ``:0.8`` where its strength is not 1; the kind
    of an ``artifacts`` entry is detected. Prompts name hypernetworks and LoRAs in the folders, or beside the given
    files, as ``<hypernet:NAME:0.8>`` and ``<lora:NAME:0.8>``. ``clip_skip`` and ``max_token_length``: as in a recipe's
    ``model:``; None keeps the model's. ``out_dir``: a folder for the single images.
    """

    out: Path
    model: str = POCKET
    prompts: Sequence[str] = ()
    prompt_file: str | None = None
    defaults: ImageRequest = field(default_factory=ImageRequest)
    num_images: int = 4
    embeddings: Sequence[str] = ()
    hypernetworks: Sequence[str] = ()
    hypernetwork_dir: str | None = None
    loras: Sequence[str] = ()
    lora_dir: str | None = None
    aesthetic: str | None = None
    aesthetic_settings: AestheticSettings = field(default_factory=AestheticSettings)
    aesthetic_clip: str | None = None
    artifacts: Sequence[str] = ()
    clip_skip: int | None = None
    max_token_length: int | None = None
    out_dir: Path | None = None

    def images(self) -> list[ImageRequest]:
        """Return the request of the first image in each row. Raises UserError without a prompt."""
        requests = [replace(self.defaults, prompt=prompt) for prompt in self.prompts]
        if self.prompt_file is not None:
            lines = read_prompts([self.prompt_file], is_file=True)
            requests += [parse_prompt_line(line, self.defaults) for line in lines]
        if not requests:
            raise UserError("there is nothing to generate: give --prompt, or --prompt-file")
        return requests


@on_device(remedies=DRAWING)
def draw_grid(request: GridRequest) -> list[dict[str, Any]]:
    """Write the grid, whose PNG contains the generation settings; return its cells row by row.

    With an aesthetic vector the cells also have the prompt's cosine with it, before and after tuning.
    """
    from dreamfleet.cluster.png_metadata import Settings, image_text, require_writable, write_images

    require_writable(request.out, request.out_dir)
    request, others = _assign_artifacts(request)
    vector = request.aesthetic
    aesthetic = Aesthetic(vector, request.aesthetic_settings, request.aesthetic_clip) if vector else None
    first_images = request.images()
    settings = Settings(
        request.embeddings,
        {
            **(aesthetic.entries() if aesthetic else {}),
            **{f"Artifact {Path(other.address).stem}": other.strength for other in others},
        },
    )
    prompt_files = PromptFiles(
        HypernetworkFiles(request.hypernetworks, request.hypernetwork_dir),
        LoraFiles(request.loras, request.lora_dir),
    )
    arranged = [prompt_files.select(image.prompt, plain=image.plain) for image in first_images]
    rows = [
        (replace(image, prompt=text), extras)
        for first, (text, extras) in zip(first_images, arranged, strict=True)
        for image in first.columns(request.num_images)
    ]
    model = load_with_embeddings(request.model, request.embeddings)
    model.clip_skip = request.clip_skip or model.clip_skip
    model.max_token_length = request.max_token_length or model.max_token_length
    model.to(best_device())
    applied: list[Aesthetic | OtherArtifact] = [*([aesthetic] if aesthetic else []), *others]
    for artifact in applied:
        artifact.apply(model)
    images = _generate_rows(model, prompt_files, rows)
    texts = [image_text(model, settings, row, image) for row, image in zip(rows, images, strict=True)]
    seeds = [image.seed for image, _ in rows]
    write_images(images, texts, seeds, request.out, request.out_dir, columns=request.num_images)
    asked = [image.prompt for image in first_images for _ in range(request.num_images)]
    return [
        {"prompt": prompt, "seed": image.seed, **_aesthetic_gain(model, image)}
        for prompt, (image, _) in zip(asked, rows, strict=True)
    ]


def load_with_embeddings(name: str, embeddings: Sequence[str] = ()) -> DiffusionModel:
    """Load a model by name (a run folder means its exports), and install the words of embedding files.

    A file ``NAME-neg`` beside ``NAME`` is the word's negative embedding, which is added to the negative
    prompt of images that use the word.
    """
    model = load_named(name)
    for address in embeddings:
        if "://" not in address and not Path(address).expanduser().is_file():
            raise UserError(f"--embedding {address}: there is no such file")
        with Storage(address).local_copy() as path:
            EmbeddingKind().load_into(model, path, address=address)
    return model


def load_named(name: str) -> DiffusionModel:
    """Load the model that ``--model`` names: pocket, a folder, a file, a hub name, or a run."""
    from dreamfleet.trainers.run.export import read_recipe

    path = Path(name).expanduser()
    if "://" not in name and not path.is_dir():
        return load_model(ModelConfig(pretrained_model_name_or_path=str(path) if path.exists() else name))
    place = Storage(name if "://" in name else path)
    if place.exists("recipe.yaml"):
        return load_exported(place, read_recipe(place))
    return load_model(ModelConfig(pretrained_model_name_or_path=place.path()))


def _assign_artifacts(request: GridRequest) -> tuple[GridRequest, list[OtherArtifact]]:
    """Detect the kinds of ``--artifact`` files; return the request with each file in the field of its kind.

    Artifacts of kinds without a field are returned separately. Raises FormatError for an unknown kind;
    UserError for a missing file, for a strength that the kind does not support, and for a second artifact
    where only one is allowed.
    """
    lists = {name: list(getattr(request, f"{name}s")) for name in ("embedding", "hypernetwork", "lora")}
    single: dict[str, str] = {}
    others = []
    for text in request.artifacts:
        address, strength = (text, 1.0) if Storage(text).exists() else split_multiplier(text)
        if not Storage(address).exists():
            raise UserError(f"--artifact {address}: there is no such file")
        kind = kind_of(address)
        if strength != 1 and not kind.has_strength:
            raise UserError(f"--artifact {text}: an artifact of the kind {kind.name} has no strength")
        if kind.option in lists:
            lists[kind.option].append(text if kind.has_strength else address)
        elif kind.option in ("aesthetic", "model"):
            default = POCKET if kind.option == "model" else None
            if kind.option in single or getattr(request, kind.option) != default:
                raise UserError(f"--artifact {address}: one {kind.option} can be used at a time")
            single[kind.option] = address
        else:
            others.append(OtherArtifact(kind, address, strength))
    plural = {f"{name}s": found for name, found in lists.items()}
    return replace(request, **plural, **single), others  # type: ignore[arg-type]


def _generate_rows(model: DiffusionModel, prompt_files: PromptFiles, rows: Sequence[Row]) -> list[Image]:
    """Generate an image for each row; adjacent rows with equal hypernetworks and LoRAs form a batch."""
    apply, images = prompt_files.bind(model), []
    for extras, group in groupby(rows, key=lambda row: row[1]):
        apply(extras)
        images += generate(model, [image for image, _ in group])
    return images


def _aesthetic_gain(model: DiffusionModel, image: ImageRequest) -> dict[str, Any]:
    """Return the cosine of a prompt with the aesthetic vector before and after tuning (of its first text)."""
    encoder = model.prompt_encoder
    if not isinstance(encoder, AestheticEncoder):
        return {}
    text = parse_prompt(image.prompt, image.steps, plain=image.plain)[0].schedule[0][1]
    cosines = encoder.cosines.get(text)
    return {"aesthetic_cosine": [cosines[0], cosines[-1]]} if cosines else {}
