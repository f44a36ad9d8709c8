"""The class pictures of prior preservation: those that are there, and generating the missing ones."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from dreamfleet.datasets.errors import DataError
from dreamfleet.datasets.images import PICTURE_SUFFIXES
from dreamfleet.datasets.index import Index, build_index
from dreamfleet.datasets.sets import Sets
from dreamfleet.datasets.storage import Storage
from dreamfleet.trainers.engine import DTYPES
from dreamfleet.trainers.methods.base import Method
from dreamfleet.trainers.place import Place
from dreamfleet.trainers.recipe import Recipe

log = logging.getLogger(__name__)


def gather_class_images(recipe: Recipe, sets: Sets, method: Method, place: Place) -> Index | None:
    """Return the class pictures of every concept, generating the missing ones in parallel by all workers.

    Generated ones lie in ``class_data_dir``, or beside the run folder under a key of everything that
    shaped them, where the next run with the same key finds them.
    """
    prior = method.prior
    if prior is None:
        return None
    from dreamfleet.trainers.sd.prior import class_image_key, generate_class_images

    indexes = []
    for class_set in sets.class_sets:
        options: dict[str, Any] = {
            "seed": recipe.train.seed,
            "steps": prior.steps,
            "guidance_scale": prior.guidance_scale,
            "resolution": recipe.data.resolution,
        }
        if class_set.folder is None:
            name = class_image_key(method.model.content_hash, class_set.prompt, **options)
            parent = recipe.output_dir.rstrip("/").rpartition("/")[0]
            storage = Storage(f"{parent}/class-images/{name}")
        else:
            storage = Storage(class_set.folder)
        here = len(list_pictures(storage))
        if here < prior.num_class_images:
            if place.leads:
                log.info(
                    "generating %d class pictures of %r", prior.num_class_images - here, class_set.prompt
                )
            place.wait()  # everyone has counted before anyone writes
            # With full_bf16 a part may be narrow but for the weights that do not learn.
            narrow = torch.autocast(place.device.type, torch.bfloat16, enabled=recipe.train.full_bf16)
            with lent_to(place.device, method, DTYPES[recipe.train.mixed_precision]), narrow:
                generate_class_images(
                    method.model,
                    class_set.prompt,
                    storage=storage,
                    num=prior.num_class_images,
                    rank=place.rank,
                    world=place.world,
                    batch_size=prior.batch_size,
                    **options,
                )
        place.wait()
        indexes.append(
            build_index(storage, concept=class_set.concept, role="class", max_pixels=recipe.data.max_pixels)
        )
    if len(indexes) < len(sets.concepts):
        raise DataError("prior preservation needs a class_prompt for every concept")
    return Index.concat(indexes)


def list_pictures(storage: Storage) -> list[str]:
    """List the picture files of a folder that may not exist yet."""
    return [name for name in storage.list() if name.lower().endswith(PICTURE_SUFFIXES)]


@contextmanager
def lent_to(device: torch.device, method: Method, dtype: torch.dtype) -> Iterator[None]:
    """Within this context what waits on the host is on the device, in ``dtype``; its exact weights stay behind."""
    every = itertools.chain(method.parameters(), *(part.parameters() for part in method.loss_parts.values()))
    kept = {param: param.data for param in every if param.device.type != device.type}
    try:
        for param in kept:
            param.data = param.data.to(device=device, dtype=dtype)
        yield
    finally:
        for param, data in kept.items():
            param.data = data
