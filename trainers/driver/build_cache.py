"""Encodes the images of a recipe into its latent cache, with actors on a Ray cluster or in this process."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from dreamfleet.datasets.errors import DataError, RecipeError
from dreamfleet.datasets.index.file_hashes import known_files
from dreamfleet.datasets.index.index import Index, log_left_out
from dreamfleet.datasets.index.sets import load_class_images, load_sets
from dreamfleet.datasets.serve.cache import Pool, encode_shards, jobs_of, make_shards, missing_from
from dreamfleet.datasets.serve.encoding import encoding_of
from dreamfleet.datasets.serve.latent_files import open_cache, write_manifest
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.config.scaling import WorkerShare, refuse_impossible, worker_resources
from dreamfleet.trainers.distributed.device import ENCODING, on_device
from dreamfleet.trainers.driver.preflight import require_room_here, this_machine
from dreamfleet.trainers.driver.shared_paths import check_machines, shared_paths
from dreamfleet.trainers.methods.base import method_class
from dreamfleet.trainers.methods.image_method import ImageMethod
from dreamfleet.trainers.models.family import DiffusionModel, load_model
from dreamfleet.trainers.recipe import Recipe
from dreamfleet.trainers.run.vae_encoder import VaeEncoder


@dataclass
class CacheMade:
    """Result of :func:`cache_latents`: numbers of images, and of latents with those of mirrored images.

    ``cache``: the address of the latents; ``bytes`` and ``seconds``: size and duration of what was encoded;
    ``left_out``: the reason by URI of each image that cannot be encoded.
    """

    cache: str
    pictures: int
    encoded: int = 0
    reused: int = 0
    bytes: int = 0
    seconds: float = 0.0
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def per_second(self) -> float:
        """Encoded latents per second, start-up included."""
        return self.encoded / self.seconds if self.seconds else 0.0


def cache_latents(
    recipe: Recipe,
    *,
    address: str | None = None,
    shared: Sequence[str] = (),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> CacheMade:
    """Encode the images whose latents ``data.cache_dir`` lacks.

    ``scaling.num_workers`` actors encode, each with the resources of a training worker, on the cluster at
    ``address``, else at RAY_ADDRESS, else on a private one; with 0, this process encodes. ``shared``: folders
    that all machines see. ``progress`` is called with the numbers of latents (tried, to encode). Written
    latents are kept if the call is interrupted. Raises UserError for errors that the user can fix, and if no
    image could be encoded.
    """
    began = time.monotonic()
    data = recipe.data
    if data.cache_dir is None:
        raise RecipeError(
            "data.cache_dir, the folder of the latent cache, is not set: set it, such as data.cache_dir=cache/latents"
        )
    if issubclass(method_class(recipe.method), ImageMethod):
        raise RecipeError(f"{recipe.method.name} trains on images, not on latents: there is nothing to cache")
    model = load_model(recipe.model, {"vae"})
    _check_sizes(recipe, model)
    index = _images(recipe)
    cache, encoding = Storage(data.cache_dir), encoding_of(data, model.encoder_hash)
    jobs = jobs_of(index, data)
    missing = missing_from(open_cache(cache, encoding), jobs)
    made = CacheMade(cache.child(encoding.folder).url, len(index), reused=len(jobs) - len(missing))
    made.left_out = {bad.uri: bad.reason for bad in index.bad}
    if missing:
        folder = write_manifest(cache, encoding)
        with _encoders(recipe, cache, address, shared) as (workers, pool, share):
            shards = make_shards(missing, workers=workers)
            make_encode = functools.partial(
                VaeEncoder,
                recipe.model,
                encoder_hash=model.encoder_hash,
                device="cuda" if share.uses_gpu else "cpu",
                gpu_share=min(1.0, share.resources.get("GPU", 1.0)),
                threads=share.threads if pool else None,
            )
            tried = 0
            here = share.uses_gpu and pool is None
            with on_device("cuda" if here else "cpu", remedies=ENCODING):
                for done in encode_shards(shards, folder, make_encode, data=data, pool=pool):
                    made.encoded += done.encoded
                    made.bytes += done.bytes
                    made.left_out |= done.bad
                    tried += done.tried
                    progress(tried, len(missing))
    made.seconds = time.monotonic() - began
    if not made.encoded + made.reused:
        reason = next(iter(made.left_out.items()))
        raise DataError(f"none of {len(index)} images could be encoded, such as {reason[0]}: {reason[1]}")
    return made


@contextmanager
def _encoders(
    recipe: Recipe, cache: Storage, address: str | None, shared: Sequence[str]
) -> Iterator[tuple[int, Pool | None, WorkerShare]]:
    """Yield the number of encoders, their pool (None: this process encodes), and the resources of each."""
    scaling = recipe.scaling
    if scaling.is_local:
        yield 1, None, worker_resources(scaling, [this_machine()])
        return
    from dreamfleet.trainers.driver.session import ray_session, uses_cluster
    from dreamfleet.trainers.driver.worker import worker_environment

    if not uses_cluster(address):
        require_room_here(scaling)
    with ray_session(address) as session:
        nodes, limit = [node.resources for node in session.nodes()], session.growth_limit()
        share = worker_resources(scaling, nodes, limit=limit)
        refuse_impossible(scaling, share.resources, nodes, limit=limit)
        check_machines(
            session, reads=shared_paths(recipe), writes={"data.cache_dir": [cache.path()]}, shared=shared
        )
        cpus = sum(node.get("CPU", 0.0) for node in nodes)
        # GPU encoders get images decoded by spare CPUs; CPU encoders are the bottleneck and decode their own.
        spare = cpus - scaling.pool_size * share.resources.get("CPU", 0.0) >= 1
        pool = Pool(
            scaling.pool_size,
            share.resources,
            worker_environment(share.threads),
            decode_apart=share.uses_gpu and spare,
        )
        yield scaling.pool_size, pool, share


def _images(recipe: Recipe) -> Index:
    """Index the images that a run trains on, including existing class images, and store their hashes."""
    known = known_files(recipe.data)
    sets = load_sets(recipe.data, verify=False, known=known, excluded=recipe.excluded_folders, keep=True)
    log_left_out(sets.instances)
    indexes = [sets.instances]
    if getattr(recipe.method, "with_prior_preservation", False):
        folders = [one.folder for one in sets.class_sets if one.folder is not None]
        indexes += [
            index
            for folder in folders
            if (index := load_class_images(folder, recipe.data, verify=False, known=known)) is not None
        ]
    index = Index.concat(indexes)
    if known is not None:
        known.remember(index)
    return index


def _check_sizes(recipe: Recipe, model: DiffusionModel) -> None:
    for key in ("resolution", "bucket_reso_steps") if recipe.data.enable_bucket else ("resolution",):
        if (size := getattr(recipe.data, key)) % model.vae_factor:
            raise RecipeError(
                f"data.{key} {size} does not suit {model.folder}: it must be a multiple of {model.vae_factor}"
            )
