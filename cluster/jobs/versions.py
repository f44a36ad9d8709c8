"""Prints the versions of Python, Ray and other packages on every node of the cluster, as one line of JSON.

A job whose only file this is; it runs before dreamfleet's code is on the cluster, so it imports Ray alone.
"""

from __future__ import annotations

import json
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

ANSWER_SECONDS = 60.0


def read_versions(packages: list[str]) -> dict[str, str | None]:
    """Return the versions of Python and of packages on this machine; None for a package that it does not have."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def ask_nodes(packages: list[str]) -> dict[str, dict[str, Any]]:
    """Return for each node, by ID: its ``address``, and its ``versions``, or None if it does not answer in a minute.

    A node that is lost meanwhile does not answer either.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ray.init(address="auto", log_to_driver=False)
    nodes = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    asked = {}
    for node in nodes:
        here = NodeAffinitySchedulingStrategy(node, soft=False)
        asked[node] = ray.remote(read_versions).options(num_cpus=0, scheduling_strategy=here).remote(packages)
    done, _ = ray.wait(list(asked.values()), num_returns=len(asked), timeout=ANSWER_SECONDS)
    answers = {}
    for node, reference in asked.items():
        try:
            found = ray.get(reference) if reference in done else None
        except ray.exceptions.RayError:
            found = None
        answers[node] = {"address": nodes[node], "versions": found}
    return answers


if __name__ == "__main__":
    sys.stdout.write("versions: " + json.dumps(ask_nodes(sys.argv[1:])) + "\n")
