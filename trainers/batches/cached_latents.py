"""Latents from a cache: opens the recipe's cache, checks that it fits the run, and reads latents from it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import pyarrow as pa
import torch
from torch import Tensor

from dreamfleet.datasets.config import DataConfig
from dreamfleet.datasets.errors import DataError
from dreamfleet.datasets.index.index import BadFile, Index
from dreamfleet.datasets.plan import Draw
from dreamfleet.datasets.serve.cache import jobs_of, missing_from
from dreamfleet.datasets.serve.encoding import Encoding, encoding_of
from dreamfleet.datasets.serve.encoding_actors import EncodingActors
from dreamfleet.datasets.serve.latent_files import (
    Key,
    LatentCache,
    find_manifests,
    open_cache,
    write_manifest,
)
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.batches.filling_latents import FillingLatents
from dreamfleet.trainers.batches.sources import Images, ResidentLatents, Shown, load_images
from dreamfleet.trainers.batches.vae_encoding import Encoded
from dreamfleet.trainers.distributed.context import DistributedContext
from dreamfleet.trainers.models.family import DiffusionModel

log = logging.getLogger(__name__)


class CachedLatents:
    """Latents read from the cache when they are used, for sets too large for one worker's memory."""

    def __init__(self, cache: LatentCache, index: Index, shown: Shown):
        self.cache, self.shown = cache, shown
        self._keys = keys_of(index, shown.data)

    def take(self, draws: Sequence[Draw]) -> dict[str, Tensor]:
        """Return ``mean`` and ``std`` ``[B, C, h, w]`` of each draw's image, and ``mask`` if it is cached."""
        keys = [self._keys[draw.row]._replace(flip=self.shown.flips(draw)) for draw in draws]
        found = self.cache.read(keys)
        return {
            name: torch.stack([torch.from_numpy(one[name]) for one in found]) for name in self.cache.names
        }


def open_latents(data: DataConfig, model: DiffusionModel) -> LatentCache | None:
    """Open the cache of ``data.cache_dir``; return None without that key.

    Raises DataError if the cache has no latents, or none that were encoded with this run's settings; with
    ``data.cache: while_training`` the run will add them.
    """
    if data.cache_dir is None:
        return None
    cache, encoding = Storage(data.cache_dir), encoding_of(data, model.encoder_hash)
    if data.cache == "while_training":
        write_manifest(cache, encoding)
    found = open_cache(cache, encoding)
    if not found.entries and data.cache != "while_training":
        raise DataError(_why_nothing(cache, encoding))
    return found


def leave_out_bad(index: Index, cache: LatentCache, data: DataConfig) -> Index:
    """Return the index without the images that the cache records as undecodable; decodes nothing."""
    entries = [cache.entries.get(key) for key in keys_of(index, data)]
    bad = [
        BadFile(uri, entry.reason)
        for uri, entry in zip(index.column("uri"), entries, strict=True)
        if entry is not None and entry.reason
    ]
    if not bad:
        return index
    kept = [row for row, entry in enumerate(entries) if entry is None or not entry.reason]
    return Index(
        index.table.take(pa.array(kept, pa.int64())), bad=sorted([*index.bad, *bad]), skipped=index.skipped
    )


def serve_images(
    index: Index,
    model: DiffusionModel,
    data: DataConfig,
    *,
    cache: LatentCache | None,
    seed: int,
    distributed: DistributedContext | None = None,
    start_actors: Callable[[], EncodingActors] | None = None,
) -> Images:
    """Return the source of an index's images: the cache if there is one, else that of :func:`load_images`.

    ``start_actors`` starts the actors that encode what the cache lacks, with ``data.cache: while_training``.

    Raises DataError on every rank if the cache lacks images on any rank. For class images, which may be newer
    than the cache, it is no error: the run then encodes all of them.
    """
    distributed = distributed or DistributedContext()
    if cache is None:
        return load_images(index, model, data, seed=seed, distributed=distributed)
    jobs = jobs_of(index, data)
    # Each rank opened the cache by itself, and another command may have added images in between.
    shown = Shown(index, data, seed)
    missing = max(distributed.gather(missing_from(cache, jobs)), key=len)
    if missing and data.cache == "while_training":
        if distributed.is_main:
            log.info("the cache lacks %d of %d encodings: this run adds them", len(missing), len(jobs))
        keeps = not reads_lazily(index, model, data, shown)
        return FillingLatents(
            cache, index, shown, model, keys=keys_of(index, data), keeps=keeps, start_actors=start_actors
        )
    if missing:
        summary = (
            f"{len(missing)} of {len(jobs)} encodings are not in the cache {cache.folder.url}, for example of "
            f"{missing[0].uri}"
        )
        if set(index.column("role")) == {"class"}:
            if distributed.is_main:
                log.info("class images: %s; this run encodes them all", summary)
            return load_images(index, model, data, seed=seed, distributed=distributed)
        raise DataError(
            f"data.cache_dir: {summary}: these images or captions were added or changed after the cache was "
            "written. Run "
            "`dreamfleet data cache RECIPE`, which encodes only these, or remove data.cache_dir from the recipe"
        )
    if reads_lazily(index, model, data, shown):
        return CachedLatents(cache, index, shown)
    return ResidentLatents(distributed.on_every_rank(lambda: _load(cache, index, data)), shown)


def reads_lazily(index: Index, model: DiffusionModel, data: DataConfig, shown: Shown) -> bool:
    """Return whether cached latents are read on use: with ``data.source: stream``, or if they are too large.

    With ``data.source: auto`` they are too large beyond ``data.resident_limit_mb``.
    """
    if data.source != "auto":
        return data.source == "stream"
    floats = 2 * model.latent_channels + data.alpha_mask
    cells = sum(width * height for width, height in shown.sizes) // model.vae_factor**2
    return 4 * floats * cells * (1 + data.random_flip) > data.resident_limit_mb * 2**20


def keys_of(index: Index, data: DataConfig) -> list[Key]:
    """Return the cache key of each image's latents, not mirrored."""
    masks = index.column("mask_sha256") if data.alpha_mask else [None] * len(index)
    return [
        Key(sha256, mask or "", False) for sha256, mask in zip(index.column("sha256"), masks, strict=True)
    ]


def _load(cache: LatentCache, index: Index, data: DataConfig) -> Encoded:
    """Read all latents of an index into memory, those of mirrored images after the others."""
    flips = (False, True) if data.random_flip else (False,)
    keys = [key._replace(flip=flip) for flip in flips for key in keys_of(index, data)]
    kept: dict[str, list[Tensor]] = {name: [torch.empty(0)] * len(keys) for name in cache.names}
    for position, latents in cache.read_all(keys):
        for name, values in latents.items():
            kept[name][position] = torch.from_numpy(values)
    return Encoded(kept["mean"], kept["std"], kept.get("mask"))


def _why_nothing(cache: Storage, encoding: Encoding) -> str:
    manifests = find_manifests(cache)
    if not manifests:
        return (
            f"data.cache_dir {cache.url} contains no latents yet: run `dreamfleet data cache RECIPE` first, or remove "
            "data.cache_dir from the recipe"
        )
    found = min((encoding.differences(manifest) for manifest in manifests), key=len)
    if not found:
        return (
            f"data.cache_dir {cache.url} contains no latents for this run yet: run `dreamfleet data cache RECIPE`, "
            "which continues an interrupted run"
        )
    nearest = "" if len(manifests) == 1 else f", the closest of {len(manifests)} sets"
    return (
        f"data.cache_dir {cache.url} contains latents encoded with other settings{nearest}: {'; '.join(found)}. Run "
        "`dreamfleet data cache RECIPE` to add latents for this run (existing latents are kept), restore these "
        "settings in the recipe, or remove data.cache_dir from the recipe"
    )
