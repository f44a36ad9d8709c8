"""Builds the feed of a run's batches, and the function that prepares them on the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dreamfleet.datasets.index.index import Index
from dreamfleet.datasets.plan import BatchPlan
from dreamfleet.datasets.serve.encoding_actors import EncodingActors
from dreamfleet.datasets.serve.latent_files import LatentCache
from dreamfleet.trainers.batches.cached_latents import serve_images
from dreamfleet.trainers.batches.class_latents import add_class_latents
from dreamfleet.trainers.batches.feed import Feed, Preparer
from dreamfleet.trainers.batches.image_feed import ImageFeed
from dreamfleet.trainers.batches.plan_share import PlanShare
from dreamfleet.trainers.distributed.context import DistributedContext
from dreamfleet.trainers.methods.base import Batch, Method
from dreamfleet.trainers.methods.diffusion_method import DiffusionMethod
from dreamfleet.trainers.methods.image_method import ImageMethod
from dreamfleet.trainers.recipe import Recipe


def build_feed(
    recipe: Recipe,
    method: Method,
    plan: BatchPlan,
    distributed: DistributedContext,
    *,
    num_units: int,
    instances: Index,
    classes: Index | None = None,
    cache: LatentCache | None = None,
    start_actors: Callable[[], EncodingActors] | None = None,
) -> tuple[Feed | ImageFeed, Callable[[Batch], Batch]]:
    """Return the feed of batches, and the function that prepares a batch on the device.

    Batches have latents, noise and prompts for a :class:`DiffusionMethod`, decoded images for an
    :class:`ImageMethod`. ``num_units``: the units that the workers divide among them at each step.
    ``start_actors`` starts the actors of ``data.cache_resources``.
    """
    share = PlanShare(plan, num_units, distributed)
    if isinstance(method, ImageMethod):
        return ImageFeed(share, instances=instances, method=method, data=recipe.data), lambda batch: batch
    assert isinstance(method, DiffusionMethod)
    options: dict[str, Any] = {"cache": cache, "seed": recipe.train.seed, "distributed": distributed}
    feed = Feed(
        share,
        method=method,
        data=recipe.data,
        noise=recipe.train,
        instances=instances,
        images=serve_images(instances, method.model, recipe.data, **options, start_actors=start_actors),
        classes=classes,
        class_images=None
        if classes is None
        else serve_images(
            classes,
            method.model,
            recipe.data,
            **options
            | {"cache": add_class_latents(classes, method.model, recipe.data, distributed) or cache},
        ),
    )
    return feed, Preparer(method)
