"""A real Ray head with dashboard, token and a second node on this machine, isolated from other Ray clusters."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

START_SECONDS = 180


@dataclass(frozen=True)
class RayHead:
    """A running head node: ``address`` for drivers, ``jobs`` for the job server, its token, and its folder."""

    address: str
    jobs: str
    token: str
    folder: Path

    @property
    def service_discovery(self) -> Path:
        """The file in which Ray lists the addresses of metrics for Prometheus."""
        return self.folder / "prom_metrics_service_discovery.json"

    def answers(self, *, nodes: int) -> bool:
        """Return whether the head answers to the token, and lists ``nodes`` live nodes."""
        headers = {"Authorization": f"Bearer {self.token}"}
        request = urllib.request.Request(f"{self.jobs}/api/v0/nodes", headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:
                rows = json.load(answer)["data"]["result"]["result"]
        except OSError:
            return False
        return sum(row["state"] == "ALIVE" for row in rows) == nodes


@contextmanager
def ray_head(
    home: Path, *, nodes: int = 2, cpus: int = 2, environment: Mapping[str, str]
) -> Iterator[RayHead]:
    """Start a head and ``nodes`` - 1 more nodes with ``cpus`` CPUs each; ``environment``: more variables for them."""
    port, dashboard, client = free_ports(3)
    folder = Path(
        tempfile.mkdtemp(prefix="df-", dir="/tmp")
    )  # short, as the length of a socket's path is limited
    head = RayHead(f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}", uuid.uuid4().hex * 2, folder)
    programs = Path(sys.executable).parent
    variables = {
        **os.environ,
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(home),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": head.token,
        **environment,
    }
    start = [
        str(programs / "ray"),
        "start",
        "--block",
        f"--num-cpus={cpus}",
        "--object-store-memory=100000000",
    ]
    first = [
        *start, "--head", f"--temp-dir={folder}", "--node-ip-address=127.0.0.1", f"--port={port}",
        "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}",
        *agent_ports(),
    ]  # fmt: skip
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        process = stack.enter_context(running(first, variables, folder / "head.log"))
        wait_until(lambda: head.answers(nodes=1), process, folder / "head.log")
        for number in range(1, nodes):
            more = [
                *start,
                f"--address={head.address}",
                f"--node-ip-address=127.0.0.{number + 1}",
                *agent_ports(),
            ]
            log = folder / f"node-{number}.log"
            process = stack.enter_context(running(more, variables, log))
            joined = number + 1
            wait_until(lambda joined=joined: head.answers(nodes=joined), process, log)
        yield head


def agent_ports() -> list[str]:
    """Return options that give a node's agents free ports."""
    names = (
        "dashboard-agent-listen-port",
        "dashboard-agent-grpc-port",
        "metrics-export-port",
        "runtime-env-agent-port",
    )
    ports = zip(names, free_ports(len(names)), strict=True)
    return [*(f"--{name}={port}" for name, port in ports), "--min-worker-port=0", "--max-worker-port=0"]


def free_ports(count: int) -> list[int]:
    """Return ports of the loopback interface that are free now."""
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in held]
    for each in held:
        each.close()
    return ports


@contextmanager
def running(
    command: Sequence[str | os.PathLike[str]], environment: Mapping[str, str], log: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a node's process within this context; its output goes to ``log``."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=dict(environment), stdout=output, stderr=output, start_new_session=True
        )
    try:
        yield process
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(process.pid, number)  # the workers end together with Ray's other processes
                process.wait(timeout=10)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue


def wait_until(
    ready: Callable[[], bool], process: subprocess.Popen[bytes], log: Path, *, seconds: float = START_SECONDS
) -> None:
    """Wait until a node is ready. Raises RuntimeError if its process ends before, or after ``seconds``."""
    deadline = time.monotonic() + seconds
    while not ready():
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"a node did not start: {log.read_text()[-3000:]}")
        time.sleep(0.5)
