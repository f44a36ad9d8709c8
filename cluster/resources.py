"""Checks whether a cluster has the resources that a recipe requests."""

from __future__ import annotations

from dreamfleet.cluster.cluster_info import machines
from dreamfleet.datasets.errors import ResourceError
from dreamfleet.trainers.config.scaling import describe, refuse_impossible, worker_resources
from dreamfleet.trainers.driver.preflight import reserve
from dreamfleet.trainers.recipe import Recipe


def check_resources(recipe: Recipe, address: str | None) -> tuple[str, bool, str]:
    """Return ("resources", whether the workers fit, details) for the cluster at ``address``, or this machine."""
    scaling, evaluates = recipe.scaling, recipe.validation.resources
    try:
        nodes, limit = machines(address)
        left = reserve(list(nodes.values()), evaluates, limit=limit)
        share = worker_resources(scaling, left, limit=limit)
        if not scaling.is_local:
            refuse_impossible(scaling, share.resources, left, limit=limit)
    except ResourceError as error:
        return "resources", False, str(error)
    if scaling.is_local:
        return "resources", True, f"in this process, on {'a GPU' if share.uses_gpu else 'CPU'}"
    where = f"{len(nodes)} machines" if len(nodes) > 1 else next(iter(nodes), "no machine")
    more = f", and {describe(evaluates)} for validation" if evaluates else ""
    return "resources", True, f"{scaling.words} x ({describe(share.resources)}){more} on {where}"
