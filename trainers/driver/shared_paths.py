"""Checks that all machines of a cluster, including those that an autoscaler adds, see the files of a run."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from dreamfleet.datasets.errors import ResourceError, StorageError
from dreamfleet.datasets.index.concepts import load_concepts
from dreamfleet.datasets.path_field import by_key, is_under, list_paths
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.recipe import Recipe
from dreamfleet.trainers.run.run_folder import MARKER_PREFIX

if TYPE_CHECKING:
    from dreamfleet.trainers.driver.session import Node, RaySession

logger = logging.getLogger(__name__)

PACKAGES = "/runtime_resources/working_dir_files/"  # where Ray unpacks the files of a job, on every machine
MAX_LISTED = 5  # paths or machines that an error names
PathsByKey = Mapping[str, Sequence[str]]


def shared_paths(recipe: Recipe) -> dict[str, list[str]]:
    """Return the paths that every machine must see, by recipe key, including those in a file of concepts."""
    paths = [named for named in recipe.paths if not named.field.per_machine]
    if isinstance(recipe.data.concepts_list, str):
        for concept in load_concepts(recipe.data):
            paths += list_paths(concept, prefix="data.concepts_list.")
    return by_key(paths)


def written_paths(recipe: Recipe) -> dict[str, list[str]]:
    """Return the folders that a run writes, by recipe key: the run folder, and folders for class images."""
    found = {"output_dir": [recipe.output_dir]}
    if not getattr(recipe.method, "with_prior_preservation", False):
        return found
    if recipe.data.class_cache_dir is not None:
        found["data.class_cache_dir"] = [recipe.data.class_cache_dir]
    for concept in load_concepts(recipe.data):
        folder = concept.class_data_dir
        if folder is None:
            found["class images beside output_dir"] = [recipe.class_images_dir]
        elif "://" in folder or not os.path.exists(folder) or os.access(folder, os.W_OK):
            found.setdefault("data.class_data_dir", []).append(folder)
    return found


def check_machines(
    session: RaySession,
    *,
    reads: PathsByKey,
    writes: PathsByKey,
    shared: Sequence[str] = (),
) -> None:
    """Check that every machine can run dreamfleet and sees the same files; one fixed machine is not checked.

    ``reads`` and ``writes`` are paths and addresses by their keys in the recipe. If an autoscaler starts
    machines, local paths must lie under one of the ``shared`` folders, which the user declares. Each running
    machine checks whether the paths exist; a marker file in every folder that is written to distinguishes a
    shared folder from a local one of the same name. Raises StorageError for files that machines do not share,
    ResourceError for a machine that cannot run dreamfleet; both name the machines.
    """
    if session.growth_limit() is not None:
        refuse_local(
            {key: [*reads.get(key, ()), *writes.get(key, ())] for key in {**reads, **writes}}, shared
        )
    nodes = session.nodes()
    if len(nodes) < 2:
        return
    with ExitStack() as stack:
        markers = {
            stack.enter_context(_marked(Storage(path))): key
            for key, paths in writes.items()
            for path in paths
            if "://" not in path
        }
        local = [
            path for paths in reads.values() for path in paths if "://" not in path and os.path.exists(path)
        ]
        seen = _ask(session, nodes, [*markers, *dict.fromkeys(local)])
    refuse_unseen(seen, markers)


def refuse_local(named: PathsByKey, shared: Sequence[str]) -> None:
    """Raise StorageError for local paths outside the ``shared`` folders.

    A machine that an autoscaler starts would look for such a path on its own disk.
    """
    local = {
        f"{key} {path}": path
        for key, paths in named.items()
        for path in paths
        if "://" not in path and PACKAGES not in path and not is_under(path, shared)
    }
    if local:
        more = f" and {len(local) - MAX_LISTED} more" if len(local) > MAX_LISTED else ""
        raise StorageError(
            f"this cluster starts machines on demand, and they do not see local files: "
            f"{', '.join(list(local)[:MAX_LISTED])}{more}. Use s3://BUCKET/PREFIX, or, if every machine mounts the "
            f"folder under this name, add --shared {os.path.dirname(next(iter(local.values())))}"
        )


def refuse_unseen(seen: Sequence[tuple[Node, Sequence[str]]], markers: Mapping[str, str]) -> None:
    """Raise StorageError for a path that a machine lacks; ``markers``: the recipe keys by marker file."""
    for path in {path: None for _, missing in seen for path in missing}:
        blind = [node.address for node, missing in seen if path in missing]
        machines = ", ".join(blind[:MAX_LISTED]) + (" and more" if len(blind) > MAX_LISTED else "")
        if path in markers:
            raise StorageError(
                f"{markers[path]} {os.path.dirname(path)} is not shared: {machines} cannot see it. With several "
                "machines, set it to a folder that all of them mount, or to s3://bucket/prefix."
            )
        raise StorageError(
            f"{path} is missing on {machines}. With several machines, keep it where all of them see it: "
            "a mounted folder, or s3://bucket/prefix."
        )


def find_missing(paths: Sequence[str]) -> list[str]:
    """Return the paths that do not exist on this machine."""
    return [path for path in paths if not os.path.exists(path)]


def _ask(session: RaySession, nodes: Sequence[Node], paths: Sequence[str]) -> list[tuple[Node, list[str]]]:
    """Return the missing paths of every machine, found by one Ray task on each.

    A machine that leaves the cluster meanwhile is left out: one without power counts as running until its heartbeats
    have been missed for some time. Raises ResourceError for a machine on which the task fails.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(num_cpus=0, max_retries=0)(find_missing)
    asked = [
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node.node_id, soft=False)).remote(
            list(paths)
        )
        for node in nodes
    ]
    seen = []
    for node, answer in zip(nodes, asked, strict=True):
        try:
            seen.append((node, ray.get(answer, timeout=120)))
        except ray.exceptions.RayError as error:
            if node.node_id not in {living.node_id for living in session.nodes()}:
                logger.warning("machine %s has left the cluster", node.address)
                continue
            cause = str(error).strip().splitlines()[-1]
            raise ResourceError(
                f"machine {node.address} cannot run dreamfleet ({cause}). Every machine needs the same Python and "
                f"the dreamfleet wheel (pip install, or in the image); here it is Python {sys.version.split()[0]}."
            ) from error
    return seen


@contextmanager
def _marked(folder: Storage) -> Iterator[str]:
    """Yield the path of a new marker file in a folder; at the end remove it, and a folder created for it."""
    is_new, marker = not folder.exists(), f"{MARKER_PREFIX}{uuid.uuid4().hex}"
    folder.write_text(marker, "")
    try:
        yield folder.path(marker)
    finally:
        folder.remove(marker)
        if is_new:
            shutil.rmtree(folder.path(), ignore_errors=True)
