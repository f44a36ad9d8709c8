"""One Ray head node for all tests of jobs, and its address and token in the environment of each test of a cluster."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from planted import SECRETS
from ray_head import Head
from ray_heads import free_ports, running, wait_until

from dreamfleet.trainers.driver import session

START_SECONDS = 120


@pytest.fixture(scope="session")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """Start a head node whose session, ports and folders are isolated from other Ray clusters."""
    port, dashboard, agent, agent_grpc, client = free_ports(5)
    # A short path, because the length of a socket path is limited.
    folder = tempfile.mkdtemp(prefix="dreamfleet-", dir="/tmp")
    head = Head(f"http://127.0.0.1:{dashboard}", uuid.uuid4().hex * 2, Path(folder))
    # Ray is started without an activated environment: its programs, `python` and `pip` too, are not on PATH.
    programs = Path(sys.executable).parent
    without = [part for part in os.environ["PATH"].split(os.pathsep) if part != str(programs)]
    environment = {
        **os.environ,
        "PATH": os.pathsep.join(without),
        "HOME": str(tmp_path_factory.mktemp("home")),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": head.token,
    }
    command = [
        programs / "ray", "start", "--head", "--block", f"--temp-dir={folder}", "--num-cpus=2",
        "--object-store-memory=100000000", "--node-ip-address=127.0.0.1", f"--port={port}",
        "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}",
        f"--dashboard-agent-grpc-port={agent_grpc}", f"--ray-client-server-port={client}",
        "--min-worker-port=0", "--max-worker-port=0",
    ]  # fmt: skip
    log = Path(folder) / "start.log"
    try:
        with running(command, environment, log) as process:
            wait_until(head.answers, process, log, seconds=START_SECONDS)
            yield head
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def client(head: Head, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Set the cluster's address and token in this process, and a home folder without a token."""
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN", head.token)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", head.address)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    yield
    monkeypatch.undo()
    session._reread_authentication()
