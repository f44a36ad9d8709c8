"""Checks before workers start: that all inputs exist, and that the machines have the required resources."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from dreamfleet.datasets.errors import DataError, Errors, ModelError, RecipeError, ResourceError, UserError
from dreamfleet.datasets.path_field import NamedPath
from dreamfleet.datasets.storage.object_store import is_address
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.config.conflicts import require_runnable
from dreamfleet.trainers.config.engines import engine_spec
from dreamfleet.trainers.config.scaling import (
    Resources,
    ScalingConfig,
    WorkerShare,
    describe,
    refuse_impossible,
    refuse_shared_gpus,
    worker_resources,
    workers_that_fit,
)
from dreamfleet.trainers.driver.shared_paths import check_machines, shared_paths, written_paths

if TYPE_CHECKING:
    from dreamfleet.trainers.driver.session import RaySession
    from dreamfleet.trainers.recipe import Recipe

MAX_FILES = 1000  # larger folders are not indexed before workers start


def preflight(
    recipe: Recipe, session: RaySession, say: Callable[[str], None], *, shared: Sequence[str] = ()
) -> WorkerShare:
    """Return the resources of each worker; call ``say`` with a line if the run has to wait for busy machines.

    ``shared``: folders that every machine sees. Raises ResourceError for resources that the cluster can never
    provide, StorageError for files that machines do not share, RecipeError if the length of the training is
    not set.
    """
    nodes = [node.resources for node in session.nodes()]
    limit = session.growth_limit()
    nodes = reserve(nodes, recipe.validation.resources, limit=limit)
    share = worker_resources(recipe.scaling, nodes, limit=limit)
    refuse_impossible(recipe.scaling, share.resources, nodes, limit=limit)
    require_runnable(recipe.train, recipe.optimizer, has_gpu=share.uses_gpu)
    engine = engine_spec(recipe.engine)
    if engine.needs_whole_gpu:
        refuse_shared_gpus(recipe.scaling, share, engine=engine.setting(recipe.engine))
    check_machines(session, reads=shared_paths(recipe), writes=written_paths(recipe), shared=shared)
    if not session.private:
        missing = not workers_that_fit(
            {name: amount * recipe.scaling.min_workers for name, amount in share.resources.items()},
            [session.free()],
        )
        if missing:
            say(
                f"waiting up to {recipe.scaling.wait_minutes} minutes for {recipe.scaling.min_workers} x "
                f"{describe(share.resources)}; free now: {describe(session.free())}"
            )
    return share


def reserve(
    nodes: Sequence[Resources], resources: Resources | None, *, limit: Resources | None = None
) -> list[Resources]:
    """Return the machines without ``validation.resources``, which one process needs on one of them.

    They are taken from a machine that keeps the most GPUs for workers. On an autoscaling cluster (``limit``), another
    machine may be started for them. Raises ResourceError if no machine has them.
    """
    left = [dict(node) for node in nodes]
    if not resources:
        return [*left]
    fitting = [node for node in left if workers_that_fit(resources, [node])]
    if not fitting:
        if limit and all(amount <= limit.get(name, 0) for name, amount in resources.items()):
            return [*left]
        have = "; ".join(describe(node) for node in nodes) or "no machines"
        raise ResourceError(
            f"validation.resources: no machine of the cluster has {describe(resources)} ({have}); ask for less, or "
            "leave validation.resources out: the workers then compute the rounds"
        )
    chosen = min(fitting, key=lambda node: (node.get("GPU", 0), -node.get("CPU", 0)))
    for name, amount in resources.items():
        chosen[name] -= amount
    return [*left]


def check_inputs(recipe: Recipe, *, begun: bool = False) -> None:
    """Raise UserError that lists missing images and models before workers start, which takes half a minute.

    ``begun``: the run has a checkpoint, so the file that it started from may be missing by now. Local folders
    of up to MAX_FILES files are indexed as a worker indexes them; workers check larger folders and buckets.
    """
    from dreamfleet.datasets.index.concepts import load_concepts
    from dreamfleet.datasets.index.file_hashes import known_files
    from dreamfleet.datasets.index.index import build_index
    from dreamfleet.datasets.index.sets import load_sets
    from dreamfleet.datasets.serve.latent_files import find_manifests
    from dreamfleet.trainers.models.formats.lossless_image import require_codecs
    from dreamfleet.trainers.models.vision.judge_files import check_judges

    data, holdout = recipe.data, recipe.validation.holdout
    errors = Errors()
    with errors.collect():
        require_runnable(recipe.train, recipe.optimizer)
    with errors.collect():
        require_codecs(recipe.train.export_formats or ())
    with errors.collect():
        recipe.with_deepspeed_file()
    with errors.collect():
        if data.cache_dir and data.cache != "while_training" and not find_manifests(Storage(data.cache_dir)):
            raise DataError(
                f"data.cache_dir {data.cache_dir} holds no latents yet: run `dreamfleet data cache RECIPE` first, "
                "set data.cache: while_training, or leave data.cache_dir out"
            )
    with errors.collect():
        if all(_is_small(concept.instance_data_dir) for concept in load_concepts(data)):
            load_sets(data, verify=False, known=known_files(data), excluded=recipe.excluded_folders)
    with errors.collect():
        check_judges(recipe.validation)
    for named in recipe.paths:
        with errors.collect():
            if not (errors.has(named.key) or (begun and named.field.is_start)):
                check_exists(named)
    with errors.collect():
        if holdout and not errors.has("validation.holdout") and _is_small(holdout):
            build_index(holdout, max_pixels=data.max_pixels)
    errors.refuse()


def check_exists(named: NamedPath) -> None:
    """Check that a path of a recipe exists if its field requires that; in buckets only images are checked.

    Raises RecipeError, ModelError or DataError, depending on the kind of path.
    """
    key, path, field = named
    if field.kind == "images":
        is_missing = field.must_exist and is_address(path) and not Storage(path).exists()
    else:
        is_missing = field.must_exist and os.path.isabs(path) and not os.path.exists(path)
    if is_missing:
        errors: dict[str, type[UserError]] = {"model": ModelError, "images": DataError}
        error = RecipeError if key.startswith("method.") else errors.get(field.kind, RecipeError)
        raise error(
            f"{key}: {path} does not exist. Check the path; a relative one starts at the recipe's folder"
        )


def _is_small(url: str) -> bool:
    if not is_address(url):
        return False
    folder = Storage(url)
    return folder.is_local and (not folder.exists() or len(folder.list(recursive=True)) <= MAX_FILES)


def this_machine() -> dict[str, float]:
    """Return the number of CPUs and GPUs of this machine, as a private Ray counts them."""
    import torch

    resources = {"CPU": float(os.cpu_count() or 1)}
    if gpus := torch.cuda.device_count():
        resources["GPU"] = float(gpus)
    return resources


def require_room_here(scaling: ScalingConfig, *, evaluates: Mapping[str, float] | None = None) -> None:
    """Raise ResourceError, without starting Ray, if this machine alone cannot hold the workers.

    ``evaluates``: ``validation.resources``, which they leave free.
    """
    here = reserve([this_machine()], evaluates)
    refuse_impossible(scaling, worker_resources(scaling, here).resources, here)
