"""Class images of prior preservation: loads existing ones and generates missing ones."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dreamfleet.datasets.config import DataConfig
from dreamfleet.datasets.errors import DataError
from dreamfleet.datasets.index.exclusions import CLASS_IMAGES
from dreamfleet.datasets.index.index import Index, log_left_out
from dreamfleet.datasets.index.sets import ClassSet, Sets, load_class_images
from dreamfleet.datasets.json_text import json_text
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.batches.class_image_drawing import (
    class_image_key,
    generate_class_images,
    generated_name,
)
from dreamfleet.trainers.config.image_request import ImageRequest
from dreamfleet.trainers.distributed.agreement import share_index
from dreamfleet.trainers.distributed.context import DistributedContext
from dreamfleet.trainers.engines.base import DTYPES
from dreamfleet.trainers.methods.diffusion_method import DiffusionMethod
from dreamfleet.trainers.recipe import Recipe

log = logging.getLogger(__name__)


def gather_class_images(
    recipe: Recipe, sets: Sets, method: DiffusionMethod, distributed: DistributedContext
) -> Index | None:
    """Return the class images of every concept; all ranks generate the missing ones in parallel.

    Generated images are stored in ``class_data_dir``, or else beside the run folder in a folder named by
    :func:`class_image_key`, where later runs with the same key find them. Rank 0 decides which are missing.
    Returns None without prior preservation. Raises DataError if a concept has no class prompt.
    """
    if method.prior is None:
        return None
    indexes = [_gather_one(recipe, class_set, method, distributed) for class_set in sets.class_sets]
    if len(indexes) < len(sets.concepts):
        raise DataError("prior preservation needs a class_prompt for every concept")
    return Index.concat(indexes)


def _gather_one(
    recipe: Recipe, class_set: ClassSet, method: DiffusionMethod, distributed: DistributedContext
) -> Index:
    """Return the class images of one concept."""
    prior = method.prior
    assert prior is not None
    storage, request = _where_and_how(recipe, class_set, method)
    missing = distributed.on_rank_0(lambda: find_missing(storage, prior.num_class_images, recipe.data))
    if missing:
        if distributed.is_main:
            log.info("generating %d class images of %r", len(missing), class_set.prompt)
        _generate(method, request, missing, storage, recipe=recipe, distributed=distributed)

    def load() -> Index:
        index = load_class_images(storage, recipe.data, concept=class_set.concept)
        assert index is not None  # existing or generated
        return index

    index = share_index(distributed, load)
    if distributed.is_main:
        log_left_out(index)
    return index


def find_missing(storage: Storage, num: int, data: DataConfig) -> list[int]:
    """Return the numbers of the images to generate until a folder has ``num`` usable images of any name.

    Images are counted as in every image folder (with subfolders, all formats). Existing files are not
    overwritten.
    """
    index = load_class_images(storage, data)
    wanted = max(0, num - (len(index) if index is not None else 0))
    names = set(storage.list()) if wanted else set()
    free = (number for number in itertools.count() if generated_name(number) not in names)
    return list(itertools.islice(free, wanted))


def _where_and_how(
    recipe: Recipe, class_set: ClassSet, method: DiffusionMethod
) -> tuple[Storage, ImageRequest]:
    """Return the folder of a concept's class images, and the request that generates them."""
    prior = method.prior
    assert prior is not None
    resolution = recipe.data.resolution
    request = ImageRequest(
        class_set.prompt,
        seed=recipe.train.seed,
        steps=prior.steps,
        guidance_scale=prior.guidance_scale,
        width=resolution,
        height=resolution,
        plain=True,  # the prompt is literal text, as in training
    )
    if class_set.folder is not None:
        return Storage(class_set.folder), request
    name = class_image_key(method.model.content_hash, request)
    return Storage(recipe.class_images_dir).child(name), request


def _generate(
    method: DiffusionMethod,
    request: ImageRequest,
    missing: list[int],
    storage: Storage,
    *,
    recipe: Recipe,
    distributed: DistributedContext,
) -> None:
    """Generate the missing images: each rank some of the batches, which are equal for any number of ranks."""
    assert method.prior is not None
    size = max(1, method.prior.batch_size)
    batches = [missing[start : start + size] for start in range(0, len(missing), size)]
    mine = list(itertools.chain.from_iterable(batches[number] for number in distributed.share(len(batches))))

    def draw() -> None:
        if distributed.is_main and not storage.exists(CLASS_IMAGES):
            # The file tells later runs that the folder has class images, not images of a subject.
            storage.write_text(CLASS_IMAGES, json_text({"prompt": request.prompt}) + "\n")
        # With full_bf16, only the trainable weights of a part are bfloat16; autocast covers the frozen ones.
        narrow = torch.autocast(distributed.device.type, torch.bfloat16, enabled=recipe.train.full_bf16)
        with lent_to(distributed.device, method, DTYPES[recipe.train.mixed_precision]), narrow:
            generate_class_images(method.model, request, numbers=mine, storage=storage, batch_size=size)

    distributed.on_every_rank(draw)


@contextmanager
def lent_to(device: torch.device, method: DiffusionMethod, dtype: torch.dtype) -> Iterator[None]:
    """Move parameters that are stored on the host to the device in ``dtype`` within this context.

    Afterwards the original tensors are used again, so that the weights stay exact.
    """
    every = itertools.chain(method.parameters(), *(part.parameters() for part in method.loss_parts.values()))
    kept = {param: param.data for param in every if param.device.type != device.type}
    try:
        for param in kept:
            param.data = param.data.to(device=device, dtype=dtype)
        yield
    finally:
        for param, data in kept.items():
            param.data = data
