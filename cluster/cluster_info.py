"""Lists the resources of a cluster's machines, or of this machine without a cluster, without starting a run."""

from __future__ import annotations

from collections.abc import Mapping

from dreamfleet.trainers.driver.preflight import this_machine
from dreamfleet.trainers.driver.session import names_cluster, ray_session


def machines(address: str | None) -> tuple[dict[str, Mapping[str, float]], dict[str, float] | None]:
    """Return the resources of each machine by its address, and the limits of an autoscaling cluster (else None).

    Without a cluster, returns the resources that a local Ray would detect on this machine, without starting
    one. Raises ResourceError if the cluster does not answer.
    """
    if not names_cluster(address):
        return {"this machine": this_machine()}, None
    with ray_session(address) as session:
        nodes = {f"{node.address} ({node.node_id[:6]})": node.resources for node in session.nodes()}
        return nodes, session.growth_limit()
