"""Computes a run's held-out loss, and generates and scores its preview images."""

from __future__ import annotations

import functools
import io
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from PIL import Image

from dreamfleet.datasets.config import DataConfig
from dreamfleet.datasets.images.masks import ImageView
from dreamfleet.datasets.index.index import Index
from dreamfleet.datasets.index.sets import Sets, load_held_out
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.batches.vae_encoding import read_cut, read_pixels
from dreamfleet.trainers.config.image_request import ImageRequest
from dreamfleet.trainers.config.metrics import image_metrics
from dreamfleet.trainers.distributed.agreement import share_index
from dreamfleet.trainers.distributed.context import DistributedContext
from dreamfleet.trainers.engines.base import Engine
from dreamfleet.trainers.engines.passes import Passes, finish
from dreamfleet.trainers.evaluation.heldout_loss import HeldOutImages, HeldOutLoss
from dreamfleet.trainers.evaluation.judge import Judge, References
from dreamfleet.trainers.evaluation.loss_metrics import MeasuredRun, ModelMetric, make_model_metrics
from dreamfleet.trainers.evaluation.previews import class_requests, generate_shared, preview_cells
from dreamfleet.trainers.evaluation.score import MOST_REAL, words_to_strip
from dreamfleet.trainers.evaluation.untuned import UntunedImages, untuned_images
from dreamfleet.trainers.methods.base import Method
from dreamfleet.trainers.methods.diffusion_method import require_diffusion
from dreamfleet.trainers.methods.image_method import ImageMethod
from dreamfleet.trainers.recipe import Recipe

log = logging.getLogger(__name__)


class Evaluated(Protocol):
    """The parts of a run that an evaluation uses."""

    recipe: Recipe
    distributed: DistributedContext
    sets: Sets
    method: Method
    engine: Engine
    held_out: Index | None


@dataclass(frozen=True)
class Previews:
    """The preview images of one step: their grid as a PNG file, the prompt, seed and scores of each, and the scores."""

    grid: bytes
    cells: list[dict[str, Any]]
    scores: dict[str, float]


class Evaluation:
    """Held-out loss, other metrics and preview images of a run: every rank calls :meth:`measure` and :meth:`draw`.

    It is created, and :meth:`begin` is called, before the first step and before a checkpoint is loaded, since some
    metrics compare with the untuned model. The work is
    divided between the ranks, except with an engine in lockstep, whose ranks all do all of it.
    Raises UserError for held-out images that cannot be read.
    """

    def __init__(self, parts: Evaluated):
        self.parts = parts
        recipe, distributed = parts.recipe, parts.distributed
        # With an engine in lockstep every rank computes everything.
        self.sharing = DistributedContext(device=distributed.device) if parts.engine.lockstep else distributed
        self.real = parts.sets.instances  # the images that previews are compared with
        self.held_out: HeldOutLoss | HeldOutImages | None = None
        self._judge: Judge | None = None
        validation = recipe.validation
        self.class_requests: list[ImageRequest] = []
        if validation.uses("class_images"):
            prompts = [concept.class_prompt for concept in parts.sets.concepts if concept.class_prompt]
            self.class_requests = class_requests(validation, recipe.data.resolution, prompts)
        scores = [name for name in image_metrics() if name in validation.metrics]
        if distributed.is_main and scores and not validation.prompts:
            log.warning("validation.metrics: no %s, as previews need validation.prompts", ", ".join(scores))
        if parts.held_out is not None and isinstance(parts.method, ImageMethod):
            self.held_out = HeldOutImages(
                parts.held_out,
                method=parts.method,
                max_pixels=recipe.data.max_pixels,
                distributed=self.sharing,
            )
        elif folder := validation.holdout:
            self.real = share_index(distributed, lambda: load_held_out(folder, recipe.data))
            self.held_out = HeldOutLoss(
                self.real,
                method=require_diffusion(parts.method, "validation.holdout"),
                data=recipe.data,
                count=validation.holdout_timesteps,
                distributed=self.sharing,
            )
        self.model_metrics: list[ModelMetric] = []
        self.has_begun = False
        self.untuned = self._load_untuned()

    def regroup(self) -> None:
        """Continue with the ranks of a new process group: a new rank 0 needs the untuned model's images."""
        if self.untuned is not None:
            self.untuned = self._load_untuned()

    def begin(self) -> Passes[None]:
        """Measure the untuned model for the metrics that compare with it, once."""
        if self.has_begun:
            return
        parts = self.parts
        run = MeasuredRun(parts.method, parts.engine, parts.recipe.data, parts.sets.instances, self.sharing)
        self.model_metrics = yield from make_model_metrics(parts.recipe.validation.model_metrics, run)
        self.has_begun = True

    def measure(self) -> Passes[dict[str, float]]:
        """Return the metrics of held-out images, ``holdout_loss`` among them, and of the model; {} without any."""
        engine = self.parts.engine
        measured: list[ModelMetric] = [*self.model_metrics]
        if self.held_out is not None:
            measured.insert(0, self.held_out)
        if not measured:
            return {}
        return (yield from engine.evaluate_passes(self._figures(measured)))

    def _figures(self, measured: Sequence[ModelMetric]) -> Passes[dict[str, float]]:
        found: dict[str, float] = {}
        for each in measured:
            found |= yield from finish(each.figures(self.parts.engine))
        return found

    def draw(self, step: int) -> Previews | None:
        """Generate the preview images of a step; rank 0 returns them with their scores. None without prompts."""
        parts, validation = self.parts, self.parts.recipe.validation
        if not validation.prompts:
            return None
        requests, cells = preview_cells(validation, parts.recipe.data.resolution)
        if step == 0 and self.untuned is not None:
            images, class_images = self.untuned.previews, self.untuned.class_images
        else:
            method = require_diffusion(parts.method, "validation.prompts")
            generate = functools.partial(generate_shared, method, parts.engine, distributed=self.sharing)
            images, class_images = parts.engine.evaluate(
                lambda: (generate(requests), generate(self.class_requests))
            )
        made: list[Previews] = []
        parts.distributed.on_rank_0(lambda: made.append(self._score(images, class_images, cells)))
        return made[0] if made else None

    def _score(
        self,
        images: Sequence[Image.Image],
        class_images: Sequence[Image.Image],
        cells: list[dict[str, Any]],
    ) -> Previews:
        validation, scores = self.parts.recipe.validation, {}
        if validation.preview_metrics:
            scores = self._load_judge().score(images, cells, class_images=class_images)
        return Previews(to_grid(images, columns=validation.num_images), cells, scores)

    def _load_untuned(self) -> UntunedImages | None:
        """Return the untuned model's images if a metric uses them; every rank calls it."""
        parts, validation = self.parts, self.parts.recipe.validation
        if not (validation.uses("base") or self.class_requests):
            return None
        return untuned_images(
            require_diffusion(parts.method, "validation.prompts"),
            parts.engine,
            previews=preview_cells(validation, parts.recipe.data.resolution)[0],
            class_images=self.class_requests,
            folder=Storage(parts.recipe.untuned_images_dir),
            distributed=parts.distributed,
            sharing=self.sharing,
        )

    def _load_judge(self) -> Judge:
        if self._judge is None:
            recipe, instances = self.parts.recipe, self.parts.sets.instances
            real, untuned = load_real(self.real, recipe.data), self.untuned or UntunedImages()
            references = References(
                real=real,
                masks=self._load_masks(self.real),
                training=real if self.real is instances else load_real(instances, recipe.data),
                base=untuned.previews,
                base_class_images=untuned.class_images,
            )
            self._judge = Judge(recipe.validation, references=references, strip=words_to_strip(recipe))
        return self._judge

    def _load_masks(self, index: Index) -> list[Image.Image]:
        """Return the mask of each image that :func:`load_real` returns; none without ``data.alpha_mask``."""
        data = self.parts.recipe.data
        if not data.alpha_mask:
            return []
        views = [ImageView(row, size=(data.resolution,) * 2) for row in range(min(MOST_REAL, len(index)))]
        return [Image.fromarray(read_cut(index, view, data)[..., 3]) for view in views]


def load_real(index: Index, data: DataConfig) -> list[Image.Image]:
    """Return the first ``MOST_REAL`` images of an index, cropped as a square."""
    arrays = [
        (read_pixels(uri, data).transpose(1, 2, 0) + 1) * 127.5 for uri in index.column("uri")[:MOST_REAL]
    ]
    return [Image.fromarray(array.round().clip(0, 255).astype("uint8")) for array in arrays]


def training_grid(parts: Evaluated) -> bytes:
    """Return a grid of up to 12 training images as a PNG file."""
    images = load_real(parts.sets.instances, parts.recipe.data)[:12]
    return to_grid(images, columns=min(6, len(images)))


def to_grid(images: Sequence[Image.Image], *, columns: int) -> bytes:
    """Return images as one PNG file."""
    from dreamfleet.trainers.models.sampling.sample import image_grid

    buffer = io.BytesIO()
    image_grid(images, columns).save(buffer, "PNG")
    return buffer.getvalue()
