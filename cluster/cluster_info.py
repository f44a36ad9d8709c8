"""A look at a cluster without starting a run: its machines by address, or this machine where there is none."""

from __future__ import annotations

import os
from collections.abc import Mapping

from dreamfleet.trainers.driver.preflight import this_machine
from dreamfleet.trainers.driver.session import ray_session


def has_cluster(address: str | None) -> bool:
    """Whether a cluster was named: by ``address`` or by RAY_ADDRESS."""
    return (address or os.environ.get("RAY_ADDRESS") or "local") != "local"


def machines(address: str | None) -> tuple[dict[str, Mapping[str, float]], dict[str, float] | None]:
    """Return the resources of each machine by its address, and the most an autoscaling cluster grows to.

    Without a cluster, that is this machine as a private Ray would see it, without starting one. Raises ResourceError
    when no cluster answers.
    """
    if not has_cluster(address):
        return {"this machine": this_machine()}, None
    with ray_session(address) as session:
        nodes = {f"{node.address} ({node.node_id[:6]})": node.resources for node in session.nodes()}
        return nodes, session.growth_limit()
