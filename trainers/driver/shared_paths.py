"""Whether all machines of a cluster, also those that are still to come, see the files a run reads and writes."""

from __future__ import annotations

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

PACKAGES = "/runtime_resources/working_dir_files/"  # where Ray unpacks a job's files, on each machine that needs them
MOST_TOLD = 5
PathsByKey = Mapping[str, Sequence[str]]


def shared_paths(recipe: Recipe) -> dict[str, list[str]]:
    """Return the paths that every machine must see, by key, including the folders in a file of concepts."""
    paths = [named for named in recipe.paths if not named.field.per_machine]
    if isinstance(recipe.data.concepts_list, str):
        for concept in load_concepts(recipe.data):
            paths += list_paths(concept, prefix="data.concepts_list.")
    return by_key(paths)


def written_paths(recipe: Recipe) -> dict[str, list[str]]:
    """Return the folders that a run writes, by key: its own, and those of class images that it may generate."""
    found = {"output_dir": [recipe.output_dir]}
    if not getattr(recipe.method, "with_prior_preservation", False):
        return found
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
    """Raise unless every machine can run our code and sees the same files; nothing to check on a single fixed one.

    ``reads`` and ``writes`` are paths and addresses by their keys in the recipe. Where an autoscaler starts machines,
    local ones are taken only under one of the ``shared`` folders, which the person vouches for. Machines that are there
    are asked; a marker file in each folder that is written to tells a shared one from another of the same name. Raises
    StorageError or ResourceError naming the machines.
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
        seen = _ask(nodes, [*markers, *dict.fromkeys(local)])
    refuse_unseen(seen, markers)


def refuse_local(named: PathsByKey, shared: Sequence[str]) -> None:
    """Raise StorageError for paths that a machine started by an autoscaler would look for on its own disk."""
    local = {
        f"{key} {path}": path
        for key, paths in named.items()
        for path in paths
        if "://" not in path and PACKAGES not in path and not is_under(path, shared)
    }
    if local:
        told = list(local)
        more = f" and {len(told) - MOST_TOLD} more" if len(told) > MOST_TOLD else ""
        raise StorageError(
            f"this cluster starts machines when they are needed, and each has a disk of its own: "
            f"{', '.join(told[:MOST_TOLD])}{more} would not be the same there. Use s3://BUCKET/PREFIX, or, when every "
            f"machine mounts the folder under this name, say so: --shared {os.path.dirname(next(iter(local.values())))}"
        )


def refuse_unseen(seen: Sequence[tuple[Node, Sequence[str]]], markers: Mapping[str, str]) -> None:
    """Raise StorageError for a path that a machine is missing; ``markers`` tells the keys of folders written to."""
    for path in {path: None for _, missing in seen for path in missing}:
        blind = [node.address for node, missing in seen if path in missing]
        machines = ", ".join(blind[:MOST_TOLD]) + (" and more" if len(blind) > MOST_TOLD else "")
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
    """List the paths that are missing on the machine this runs on."""
    return [path for path in paths if not os.path.exists(path)]


def _ask(nodes: Sequence[Node], paths: Sequence[str]) -> list[tuple[Node, list[str]]]:
    """Ask every machine which of the paths it is missing."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    look = ray.remote(num_cpus=0, max_retries=0)(find_missing)
    asked = [
        look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node.node_id, soft=False)).remote(
            list(paths)
        )
        for node in nodes
    ]
    seen = []
    for node, answer in zip(nodes, asked, strict=True):
        try:
            seen.append((node, ray.get(answer, timeout=120)))
        except ray.exceptions.RayError as error:
            cause = str(error).strip().splitlines()[-1]
            raise ResourceError(
                f"machine {node.address} cannot run dreamfleet ({cause}). Every machine needs the same Python and "
                f"the dreamfleet wheel (pip install, or in the image); here it is Python {sys.version.split()[0]}."
            ) from error
    return seen


@contextmanager
def _marked(folder: Storage) -> Iterator[str]:
    """Give the path of a marker file in a folder, which is left as it was found."""
    made, marker = not folder.exists(), f"{MARKER_PREFIX}{uuid.uuid4().hex}"
    folder.write_text(marker, "")
    try:
        yield folder.path(marker)
    finally:
        folder.remove(marker)
        if made:
            shutil.rmtree(folder.path(), ignore_errors=True)
