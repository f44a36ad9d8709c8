"""The untuned model's images, which metrics compare a run's previews with; the runs of a search or fleet share them."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from dreamfleet.datasets.json_text import json_text
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.config.image_request import ImageRequest
from dreamfleet.trainers.distributed.context import DistributedContext
from dreamfleet.trainers.engines.base import Engine
from dreamfleet.trainers.evaluation.previews import generate_shared
from dreamfleet.trainers.methods.diffusion_method import DiffusionMethod


@dataclass(frozen=True)
class UntunedImages:
    """Images of the model before its first step, on rank 0: of the previews' requests, and of the class prompts."""

    previews: Sequence[Image.Image] = ()
    class_images: Sequence[Image.Image] = ()


def untuned_images(
    method: DiffusionMethod,
    engine: Engine,
    *,
    previews: Sequence[ImageRequest],
    class_images: Sequence[ImageRequest],
    folder: Storage,
    distributed: DistributedContext,
    sharing: DistributedContext | None = None,
) -> UntunedImages:
    """Load the untuned model's images from ``folder``, or generate and store them; every rank calls it.

    Must be called before the first step, and before a checkpoint is loaded. The file is named by everything that the
    images depend on, so the trials of a search and the runs of a fleet generate them once. ``sharing``: the ranks that
    share the work, by default all.
    """
    requests = [*previews, *class_images]
    name = f"{_key(method, engine, requests)}.safetensors"
    images: list[Image.Image] | None = None

    def load() -> bool:
        nonlocal images
        images = _read(folder, name, len(requests))
        return images is not None

    if not distributed.on_rank_0(load):
        images = engine.evaluate(
            lambda: generate_shared(method, engine, requests, distributed=sharing or distributed)
        )
        distributed.on_rank_0(lambda: folder.write_bytes(name, _pack(images or [])))
    found = (images or []) if distributed.is_main else []
    return UntunedImages(found[: len(previews)], found[len(previews) :])


def _key(method: DiffusionMethod, engine: Engine, requests: Sequence[ImageRequest]) -> str:
    """Return a hash of what the images depend on: model, the method's initial state, requests and precision."""
    depends: list[Any] = [
        method.model.content_hash,
        method.config.model_dump(mode="json"),
        engine.seed,
        engine.mixed_precision,
        engine.device.type,
        [dataclasses.asdict(request) for request in requests],
    ]
    return hashlib.sha256(json_text(depends).encode()).hexdigest()[:16]


def _pack(images: Sequence[Image.Image]) -> bytes:
    # One file of arrays, not image files, which another run could mistake for training images.
    from safetensors.numpy import save

    return save({f"{number:04d}": np.asarray(image.convert("RGB")) for number, image in enumerate(images)})


def _read(folder: Storage, name: str, count: int) -> list[Image.Image] | None:
    """Return the images in a file, None if there is none or it is incomplete."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    if not folder.exists(name):
        return None
    try:
        arrays = load(folder.read_bytes(name))
    except SafetensorError:
        return None
    if len(arrays) != count:
        return None
    return [Image.fromarray(arrays[number]) for number in sorted(arrays)]
