"""Test the comparison of a cluster's versions with the requirements, before a job is sent."""

from __future__ import annotations

import json
import re
from importlib.metadata import requires, version
from types import SimpleNamespace
from typing import Any

import pytest

from dreamfleet.cluster.jobs.check_versions import Node, check_cluster, differences, problems, read_here
from dreamfleet.cluster.jobs.client import JobServer
from dreamfleet.cluster.jobs.versions import read_versions
from dreamfleet.datasets.errors import ResourceError

NEEDED = [
    re.split(r"[\s\[<>=!~;]", line)[0] for line in requires("dreamfleet") or [] if "extra ==" not in line
]


def node(address: str, **changes: str | None) -> Node:
    return Node(address, {**read_versions(NEEDED), **changes})


def test_equal_nodes_have_no_problem() -> None:
    nodes = [node("10.0.0.1"), node("10.0.0.2")]
    assert problems(nodes) == []
    assert differences(nodes, read_here()) == []


def test_a_package_missing_on_one_node_is_named_with_the_node() -> None:
    (line,) = problems([node("10.0.0.1"), node("10.0.0.2", typer=None), node("10.0.0.3", typer=None)])
    assert line.startswith("typer is missing on 10.0.0.2, 10.0.0.3 (needed: typer")


def test_an_old_version_and_a_difference_between_nodes_are_named() -> None:
    (line,) = problems([node("10.0.0.1", diffusers="0.30.1"), node("10.0.0.2", diffusers="0.30.1")])
    assert "diffusers is 0.30.1 on 10.0.0.1, 10.0.0.2" in line
    (line,) = problems([node("10.0.0.1"), node("10.0.0.2", torch="99.0")])
    assert line == f"torch differs between nodes: {version('torch')} on 10.0.0.1; 99.0 on 10.0.0.2"
    assert problems([node("10.0.0.1"), node("10.0.0.2", rich="14.9")]) == [], (
        "only what computes must be equal"
    )


def test_differences_from_this_machine_and_silent_nodes_are_notes() -> None:
    found = [Node("10.0.0.9", None), node("10.0.0.1", python="3.12.1", torch="99.0")]
    silent, other = differences(found, read_here())
    assert "10.0.0.9" in silent
    assert "python 3.12.1 (here 3.11" in other or "python 3.12.1 (here 3.1" in other
    assert f"torch 99.0 (here {version('torch')})" in other


class FakeCluster:
    """A cluster with scripted answers; counts the jobs that ask for versions."""

    def __init__(self, *, python: str = "3.11.7", ray: str | None = None, log: str = "", nodes: str = "ab"):
        self.python, self.ray, self.log, self.names = python, ray or version("ray"), log, list(nodes)
        self.jobs: dict[str, Any] = {}

    def _do_request(self, method: str, path: str) -> Any:
        if "cluster_metadata" in path:
            data: Any = {"pythonVersion": self.python, "rayVersion": self.ray}
        else:
            rows = [{"node_id": name, "state": "ALIVE"} for name in self.names]
            data = {"result": {"result": [*rows, {"node_id": "gone", "state": "DEAD"}]}}
        return SimpleNamespace(status_code=200, json=lambda: {"data": data})

    def get_job_info(self, job_id: str) -> SimpleNamespace:
        if job_id not in self.jobs:
            raise RuntimeError("Request failed with status code 404")
        return SimpleNamespace(
            submission_id=job_id, job_id=None, status="SUCCEEDED", metadata={}, start_time=1, end_time=2,
            driver_exit_code=0, message="", error_type=None,
        )  # fmt: skip

    def submit_job(self, **given: Any) -> None:
        self.jobs[given["submission_id"]] = given

    def get_job_logs(self, job_id: str) -> str:
        return self.log


def server_of(cluster: FakeCluster) -> JobServer:
    return JobServer(cluster, "http://head:8265")


def answer(*nodes: Node) -> str:
    found = {str(n): {"address": one.address, "versions": one.versions} for n, one in enumerate(nodes)}
    return f"Running entrypoint ...\nversions: {json.dumps(found)}\n"


def test_the_nodes_are_asked_once_and_again_when_they_change() -> None:
    cluster = FakeCluster(log=answer(node("10.0.0.1"), node("10.0.0.2")))
    said: list[str] = []
    for _ in range(2):
        check_cluster(server_of(cluster), said.append)
    assert len(cluster.jobs) == 1
    assert len(said) == 1
    (sent,) = cluster.jobs.values()
    assert "typer" in sent["entrypoint"].split() and "torch" in sent["entrypoint"].split()
    cluster.names.append("c")
    check_cluster(server_of(cluster), said.append)
    assert len(cluster.jobs) == 2


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"python": "3.10.4"}, r"Python 3\.10\.4 and Ray .* needs Python 3\.11 or newer.*this machine: Python 3"),
        ({"ray": "2.44.0"}, r"Ray 2\.44\.0; dreamfleet needs .*ray.*2\.60.*this machine.*Ray 2\.60"),
        ({"log": answer(node("10.0.0.2", typer=None))}, r"typer is missing on 10\.0\.0\.2.*\n.*pip install"),
        ({"log": "ModuleNotFoundError: No module named 'ray'\n"}, "head node: ModuleNotFoundError: .*'ray'"),
    ],
)  # fmt: skip
def test_a_cluster_that_cannot_run_dreamfleet_is_refused_with_both_versions(
    given: dict[str, str], expected: str
) -> None:
    with pytest.raises(ResourceError, match=f"(?s){expected}"):
        check_cluster(server_of(FakeCluster(**given)), lambda text: None)
