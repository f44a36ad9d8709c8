"""Checks whether a cluster has the resources that a recipe requests."""

from __future__ import annotations

from dreamfleet.cluster.cluster_info import machines
from dreamfleet.datasets.errors import ResourceError
from dreamfleet.trainers.config.scaling import ScalingConfig, describe, refuse_impossible, worker_resources


def check_resources(scaling: ScalingConfig, address: str | None) -> tuple[str, bool, str]:
    """Return ("resources", whether the workers fit, details) for the cluster at ``address``, or this machine."""
    try:
        nodes, limit = machines(address)
        share = worker_resources(scaling, list(nodes.values()), limit=limit)
        if not scaling.is_local:
            refuse_impossible(scaling, share.resources, list(nodes.values()), limit=limit)
    except ResourceError as error:
        return "resources", False, str(error)
    if scaling.is_local:
        return "resources", True, f"in this process, on {'a GPU' if share.uses_gpu else 'CPU'}"
    where = f"{len(nodes)} machines" if len(nodes) > 1 else next(iter(nodes), "no machine")
    return "resources", True, f"{scaling.words} x ({describe(share.resources)}) on {where}"
