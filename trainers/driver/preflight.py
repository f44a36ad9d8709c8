"""Checks before workers start: inputs that are missing, and resources that the machines lack."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from dreamfleet.datasets.errors import DataError, ModelError, RecipeError
from dreamfleet.datasets.storage.object_store import is_address
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.config.conflicts import require_runnable
from dreamfleet.trainers.config.engines import engine_spec
from dreamfleet.trainers.config.paths import shared_paths, written_paths
from dreamfleet.trainers.config.scaling import (
    ScalingConfig,
    WorkerShare,
    describe,
    refuse_impossible,
    refuse_shared_gpus,
    worker_resources,
    workers_that_fit,
)
from dreamfleet.trainers.driver.shared_paths import check_machines

if TYPE_CHECKING:
    from dreamfleet.trainers.driver.session import RaySession
    from dreamfleet.trainers.recipe import Recipe

MAX_FILES = 1000  # larger folders are not indexed before workers start


def preflight(
    recipe: Recipe, session: RaySession, say: Callable[[str], None], *, shared: Sequence[str] = ()
) -> WorkerShare:
    """Return the resources of each worker; ``say`` gets a line if the run has to wait for busy machines.

    ``shared`` are folders that every machine sees. Raises ResourceError for what the cluster can never provide,
    StorageError for files that machines do not share.
    """
    nodes = [node.resources for node in session.nodes()]
    limit = session.growth_limit()
    share = worker_resources(recipe.scaling, nodes, limit=limit)
    refuse_impossible(recipe.scaling, share.resources, nodes, limit=limit)
    require_runnable(recipe, has_gpu=share.uses_gpu)
    engine = engine_spec(recipe.engine)
    if engine.needs_whole_gpu:
        refuse_shared_gpus(recipe.scaling, share, engine=engine.setting(recipe.engine))
    check_machines(session, reads=shared_paths(recipe), writes=written_paths(recipe), shared=shared)
    if not session.private:
        missing = not workers_that_fit(
            {name: amount * recipe.scaling.num_workers for name, amount in share.resources.items()},
            [session.free()],
        )
        if missing:
            say(
                f"waiting up to {recipe.scaling.wait_minutes} minutes for {recipe.scaling.num_workers} x "
                f"{describe(share.resources)}; free now: {describe(session.free())}"
            )
    return share


def check_inputs(recipe: Recipe, *, begun: bool = False) -> None:
    """Raise UserError for missing images or models, before workers start, which takes half a minute.

    ``begun``: the run has a checkpoint, so the file that it started from may be missing. Local folders of up to
    MAX_FILES files are indexed as a worker indexes them; workers check larger folders and buckets.
    """
    from dreamfleet.datasets.index.concepts import load_concepts
    from dreamfleet.datasets.index.file_hashes import known_files
    from dreamfleet.datasets.index.index import build_index
    from dreamfleet.datasets.index.sets import load_sets
    from dreamfleet.datasets.serve.latent_files import find_manifests
    from dreamfleet.trainers.config.deepspeed import with_deepspeed_file
    from dreamfleet.trainers.recipe import METHOD_FILES, METHOD_MODELS, START_FILES

    require_runnable(recipe)
    with_deepspeed_file(recipe)
    if recipe.data.cache_dir and not find_manifests(Storage(recipe.data.cache_dir)):
        raise DataError(
            f"data.cache_dir {recipe.data.cache_dir} holds no latents yet: run `dreamfleet data cache RECIPE` first, "
            "or leave data.cache_dir out"
        )
    if all(_is_small(concept.instance_data_dir) for concept in load_concepts(recipe.data)):
        load_sets(recipe.data, verify=False, known=known_files(recipe.data), apart=recipe.apart)
    for name in ("pretrained_model_name_or_path", "pretrained_vae_model_name_or_path"):
        model = getattr(recipe.model, name)
        if model and os.path.isabs(model) and not os.path.exists(model):
            raise ModelError(
                f"model.{name}: there is no {model}. Check the path (relative ones start at the recipe)"
            )
    holdout = recipe.validation.holdout
    if holdout and is_address(holdout) and not Storage(holdout).exists():
        raise DataError(
            f"validation.holdout: there is no {holdout}. Check the path (relative ones start at the recipe)"
        )
    if holdout and _is_small(holdout):
        build_index(holdout, max_pixels=recipe.data.max_pixels)
    for name in ("clip", "dino"):
        model = getattr(recipe.validation, name)
        if model and os.path.isabs(model) and not os.path.exists(model):
            raise ModelError(
                f"validation.{name}: there is no {model}. Check the path (relative ones start at the recipe)"
            )
    for name in (*METHOD_FILES, *METHOD_MODELS):
        place = None if begun and name in START_FILES else getattr(recipe.method, name, None)
        if place and os.path.isabs(place) and not os.path.exists(place):
            raise RecipeError(
                f"method.{name}: there is no {place}. Check the path (relative ones start at the recipe)"
            )


def _is_small(url: str) -> bool:
    if not is_address(url):
        return False
    folder = Storage(url)
    return folder.is_local and (not folder.exists() or len(folder.list(recursive=True)) <= MAX_FILES)


def this_machine() -> dict[str, float]:
    """Return the resources of this machine as a private Ray would count them."""
    import torch

    resources = {"CPU": float(os.cpu_count() or 1)}
    if gpus := torch.cuda.device_count():
        resources["GPU"] = float(gpus)
    return resources


def require_room_here(scaling: ScalingConfig) -> None:
    """Raise ResourceError if this machine alone has no room for the workers, without starting Ray."""
    here = [this_machine()]
    refuse_impossible(scaling, worker_resources(scaling, here).resources, here)
