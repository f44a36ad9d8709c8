"""Compares Python, Ray and the packages of a cluster with what dreamfleet needs, before a job is sent."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import requires, version
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.version import Version

from dreamfleet.cluster.jobs import versions
from dreamfleet.cluster.jobs.client import POLL_SECONDS, JobServer
from dreamfleet.cluster.jobs.job import Job
from dreamfleet.cluster.jobs.package import START_FILE, start_script
from dreamfleet.datasets.errors import ResourceError, UserError

OLDEST_PYTHON = "3.11"
PROBE_SECONDS = 120.0
SHOWN = ("ray", "torch", "diffusers", "transformers")  # whose difference from this machine is reported
FIX = (
    "Install dreamfleet's requirements there, in the environment whose `ray start` runs the node: "
    "pip install -c constraints.txt 'ray[data,train,tune,default]' torch diffusers ... (docs/clusters.md), and start "
    "its Ray again"
)


@dataclass(frozen=True)
class Node:
    """A machine of the cluster, its IP address, and the versions on it: None if it does not answer."""

    address: str
    versions: Mapping[str, str | None] | None


def check_cluster(server: JobServer, say: Callable[[str], None]) -> None:
    """Raise ResourceError if a node cannot run dreamfleet; ``say`` what differs from this machine.

    Python and Ray of the head are asked over HTTP. The packages of every node are asked by a small job, once for a set
    of nodes: its log stays on the cluster. A cluster too busy to answer is not an error.
    """
    python, ray = server.versions()
    here = read_here()
    if Version(python) < Version(OLDEST_PYTHON) or not _allowed("ray", ray):
        raise ResourceError(
            f"the cluster at {server.address} runs Python {python} and Ray {ray}; dreamfleet needs Python "
            f"{OLDEST_PYTHON} or newer and {_needed()['ray']} (this machine: Python {here['python']}, Ray "
            f"{here['ray']}). {FIX}"
        )
    nodes = probe(server, say)
    if nodes is None:
        return
    if wrong := problems(nodes):
        raise ResourceError(
            f"the cluster at {server.address} cannot run dreamfleet {version('dreamfleet')}:\n  "
            + "\n  ".join(wrong)
            + f"\n{FIX}"
        )
    for line in differences(nodes, here):
        say(line)


def problems(nodes: list[Node]) -> list[str]:
    """Return a line for each missing or unsuitable package, and for each that differs between nodes."""
    lines = []
    answered = [node for node in nodes if node.versions is not None]
    for name, requirement in _needed().items():
        by_version: dict[str | None, list[str]] = {}
        for node in answered:
            assert node.versions is not None
            by_version.setdefault(node.versions.get(name), []).append(node.address)
        for found, where in by_version.items():
            if found is None:
                lines.append(f"{name} is missing on {', '.join(where)} (needed: {requirement})")
            elif not requirement.specifier.contains(found, prereleases=True):
                lines.append(f"{name} is {found} on {', '.join(where)} (needed: {requirement})")
        known = {found: where for found, where in by_version.items() if found is not None}
        if name in SHOWN and len(known) > 1:
            each = "; ".join(f"{found} on {', '.join(where)}" for found, where in sorted(known.items()))
            lines.append(f"{name} differs between nodes: {each}")
    return lines


def differences(nodes: list[Node], here: Mapping[str, str | None]) -> list[str]:
    """Return a line if versions differ from this machine's, and one for nodes that did not answer."""
    silent = [node.address for node in nodes if node.versions is None]
    there = next((node.versions for node in nodes if node.versions is not None), {})
    lines = [f"versions not checked, no answer within a minute: {', '.join(silent)}"] if silent else []
    differing = [
        f"{name} {there[name]} (here {here[name]})"
        for name in ("python", *SHOWN)
        if there.get(name) and here.get(name) and there[name] != here[name]
    ]
    if differing:
        lines.append(f"the cluster runs {', '.join(differing)}; results may differ in the last digits")
    return lines


def probe(server: JobServer, say: Callable[[str], None]) -> list[Node] | None:
    """Return the nodes with their versions; None if they cannot be asked now."""
    names = sorted(_needed())
    what = json.dumps([sorted(server.nodes()), names])
    job_id = f"dreamfleet-versions-{hashlib.sha256(what.encode()).hexdigest()[:12]}"
    try:
        job = server.job(job_id)
    except UserError:
        say("checking the versions of Python and packages on the cluster's nodes")
        _start_probe(server, job_id, names)
        job = server.job(job_id)
    job = _wait(server, job)
    if not job.is_over:
        say(f"versions not checked: the cluster is busy (job {job_id} has not ended)")
        return None
    log = server.logs(job_id)
    answer = re.search(r"^versions: (.*)$", log, re.MULTILINE)
    if answer is None:
        raise ResourceError(
            f"the cluster at {server.address} cannot start a Python with Ray on its head node: "
            f"{_last_line(log, job)}. {FIX}"
        )
    return [Node(one["address"], one["versions"]) for one in json.loads(answer[1]).values()]


def read_here() -> dict[str, str | None]:
    """Return the versions on this machine."""
    return versions.read_versions(list(SHOWN))


def _start_probe(server: JobServer, job_id: str, names: list[str]) -> None:
    with tempfile.TemporaryDirectory(prefix="dreamfleet-") as folder:
        for file in (start_script(), Path(versions.__file__)):
            shutil.copyfile(file, Path(folder) / file.name)
        try:
            server.submit(
                f"exec sh {START_FILE} versions.py {' '.join(names)}",
                job_id=job_id,
                runtime_env={"working_dir": folder},
                metadata={},
            )
        except ResourceError as error:
            if "already exists" not in str(error):  # another submission asks the same at this moment
                raise


def _wait(server: JobServer, job: Job) -> Job:
    deadline = time.monotonic() + PROBE_SECONDS
    while not job.is_over and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS / 2)
        job = server.job(job.id)
    return job


def _last_line(log: str, job: Job) -> str:
    lines = [line for line in (log or job.message).strip().splitlines() if line.strip()]
    return lines[-1].strip(" .") if lines else "no reason given"


def _needed() -> dict[str, Requirement]:
    """Return the requirements of dreamfleet without its extras, by package."""
    found: dict[str, Any] = {}
    for text in requires("dreamfleet") or ():
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            found[requirement.name] = requirement
    return found


def _allowed(name: str, found: str) -> bool:
    return _needed()[name].specifier.contains(found, prereleases=True)
