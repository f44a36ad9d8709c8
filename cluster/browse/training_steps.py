"""The images and captions of single training steps, from the trainer's own index, batch plan and feed."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NamedTuple

import numpy as np
import pyarrow.compute as pc

from dreamfleet.cluster.browse.image_table import ImageTable
from dreamfleet.cluster.browse.render import Content, as_png
from dreamfleet.datasets.buckets import training_sizes
from dreamfleet.datasets.index.edited_source import original_uri
from dreamfleet.datasets.index.index import FileInfo
from dreamfleet.datasets.index.sets import load_sets
from dreamfleet.trainers.batches.feed import Feed
from dreamfleet.trainers.batches.image_feed import ImageReader
from dreamfleet.trainers.batches.plan_share import PlanShare
from dreamfleet.trainers.batches.sources import Shown, StreamedPixels
from dreamfleet.trainers.distributed.context import DistributedContext
from dreamfleet.trainers.methods.base import method_class
from dreamfleet.trainers.methods.build import build_method
from dreamfleet.trainers.methods.diffusion_method import DiffusionMethod
from dreamfleet.trainers.methods.image_method import ImageMethod
from dreamfleet.trainers.models.family import load_shape
from dreamfleet.trainers.recipe import Recipe
from dreamfleet.trainers.run.build import count_units, make_plan

KEPT = 64  # steps in memory


class TrainedImage(NamedTuple):
    """One image of a step: its row of the table (None if it is not there), use, caption and files for the page."""

    row: int | None
    name: str
    epoch: int
    mirrored: bool
    caption: str | None
    image: Content
    weights: Content | None


class TrainingSteps:
    """Computes steps of a recipe's run with the edits at the time of the construction.

    The method is built on a model without weights, as ``dreamfleet plan`` does. Raises DataError, RecipeError or
    ModelError as the run would.
    """

    def __init__(self, recipe: Recipe, table: ImageTable):
        self.recipe, self.table, data = recipe, table, recipe.data
        sets = load_sets(data, verify=False, known=_Known(table), excluded=recipe.excluded_folders)
        model = load_shape(recipe.model, method_class(recipe.method).needs)
        self.method = build_method(recipe, model, concepts=sets.concepts)
        self.index = sets.instances
        if isinstance(self.method, ImageMethod):
            self.index, _ = self.method.split(self.index)
        self.units = count_units(recipe, DistributedContext())
        sizes = training_sizes(self.index.sizes(), data)
        self.plan = make_plan(
            recipe, self.index, sizes, global_batch=self.units * recipe.train.train_batch_size
        )
        self.share = PlanShare(self.plan, self.units)
        self.shown = Shown(self.index, data, recipe.train.seed)
        self._feed = self._make_feed()
        self._steps: OrderedDict[int, list[TrainedImage]] = OrderedDict()

    def step(self, number: int) -> list[TrainedImage]:
        """Return the images of a step (from 1 on), in the order of its units. Raises DataError, StorageError."""
        if number not in self._steps:
            self._steps[number] = [
                image for unit in range(self.units) for image in self._unit(number - 1, unit)
            ]
            if len(self._steps) > KEPT:
                self._steps.popitem(last=False)
        return self._steps[number]

    def describe(self, number: int) -> dict[str, Any]:
        """Return a step as plain JSON values."""
        images = self.step(number)
        return {
            "step": number,
            "size": list(self.shown.sizes[self.plan.draws(number - 1)[0].row]),
            "images": [
                {
                    "row": one.row,
                    "name": one.name,
                    "use": one.epoch + 1,
                    "mirrored": one.mirrored,
                    "caption": one.caption,
                    "weighted": one.weights is not None,
                }
                for one in images
            ],
        }

    def _make_feed(self) -> Feed | None:
        if isinstance(self.method, ImageMethod) or not isinstance(self.method, DiffusionMethod):
            return None
        images = StreamedPixels(self.index, self.shown, cell=self.method.model.vae_factor)
        return Feed(
            self.share, instances=self.index, images=images, method=self.method, data=self.recipe.data
        )

    def _unit(self, step: int, unit: int) -> list[TrainedImage]:
        draws = self.share.draws(step, unit)
        if self._feed is None:
            return [self._decoded(draw.row, draw.epoch, self.shown.flips(draw)) for draw in draws]
        batch = self._feed.batch(step, unit)
        pixels = ((batch["pixels"] + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
        masks = batch["mask"].numpy()[:, 0] if "mask" in batch else [None] * len(draws)
        return [
            self._image(
                draw.row,
                draw.epoch,
                self.shown.flips(draw),
                caption=caption,
                pixels=image,
                weights=mask,
            )
            for draw, caption, image, mask in zip(draws, batch["prompts"], pixels, masks, strict=True)
        ]

    def _decoded(self, row: int, epoch: int, mirrored: bool) -> TrainedImage:
        """Return an image as a method that trains on images receives it, before its own augmentation."""
        reader = ImageReader(self.index, max_pixels=self.recipe.data.max_pixels)
        assert isinstance(self.method, ImageMethod)
        pixels = np.asarray(self.method.fit(reader(row).image).convert("RGB"))
        return self._image(row, epoch, mirrored, pixels=pixels[:, ::-1] if mirrored else pixels)

    def _image(
        self,
        row: int,
        epoch: int,
        mirrored: bool,
        *,
        pixels: np.ndarray,
        caption: str | None = None,
        weights: np.ndarray | None = None,
    ) -> TrainedImage:
        uri = original_uri(self.index.row(row).uri)
        place = pc.index(self.table.uris, uri).as_py()
        shown = (
            None if weights is None else as_png((255 * weights / max(weights.max(), 1e-9)).astype(np.uint8))
        )
        return TrainedImage(
            place if place >= 0 else None,
            self.table.label(place) if place >= 0 else uri,
            epoch,
            mirrored,
            caption,
            as_png(pixels),
            shown,
        )


class _Known:
    """Hash and size of the files that the page has indexed, so that computing steps reads only edited files."""

    def __init__(self, table: ImageTable):
        columns = (table.table.column(name).to_pylist() for name in ("uri", "sha256", "width", "height"))
        self._files = {uri: FileInfo(*values) for uri, *values in zip(*columns, strict=True)}
        masks = (table.table.column(name).to_pylist() for name in ("mask", "mask_sha256"))
        self._files |= {uri: FileInfo(sha256) for uri, sha256 in zip(*masks, strict=True) if uri}

    def __call__(self, uri: str) -> FileInfo | None:
        return self._files.get(uri)
