"""The latents of class images in ``data.class_cache_dir``, which runs with the same class images share."""

from __future__ import annotations

import functools
import logging

from dreamfleet.datasets.config import DataConfig
from dreamfleet.datasets.index.index import Index
from dreamfleet.datasets.serve.cache import encode_shards, jobs_of, make_shards, missing_from
from dreamfleet.datasets.serve.encoding import encoding_of
from dreamfleet.datasets.serve.latent_files import LatentCache, open_cache, write_manifest
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.batches.cached_latents import keys_of
from dreamfleet.trainers.batches.vae_encoding import encode_all
from dreamfleet.trainers.distributed.context import DistributedContext
from dreamfleet.trainers.models.family import DiffusionModel

log = logging.getLogger(__name__)


def add_class_latents(
    classes: Index, model: DiffusionModel, data: DataConfig, distributed: DistributedContext
) -> LatentCache | None:
    """Return the cache of the latents of all class images, after rank 0 has encoded the missing ones.

    Two runs that add the same latents at the same time write the same files. Returns None without
    ``data.class_cache_dir``, if images are cropped differently at every use (``data.center_crop: false``), and if an
    image cannot be encoded.
    """
    if data.class_cache_dir is None or not (data.center_crop and data.cache_latents):
        return None
    cache, encoding = Storage(data.class_cache_dir), encoding_of(data, model.encoder_hash)
    jobs = jobs_of(classes, data)

    def add() -> None:
        missing = missing_from(open_cache(cache, encoding), jobs)
        if not missing:
            return
        log.info("encoding %d class images into %s", len(missing), cache.url)
        folder = write_manifest(cache, encoding)
        encode = functools.partial(encode_all, model=model)
        for _ in encode_shards(make_shards(missing, workers=1), folder, lambda: encode, data=data):
            pass

    distributed.on_rank_0(add)
    found = distributed.on_every_rank(lambda: open_cache(cache, encoding))
    entries = [found.entries.get(key) for key in keys_of(classes, data)]
    return None if any(entry is None or entry.reason for entry in entries) else found
