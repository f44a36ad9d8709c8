"""One machine made of Linux namespaces: own network, processes, mounts and host name, own /tmp, /root and /dev/shm."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
VENV = Path(sys.prefix)
PRIVATE = (Path("/tmp"), Path("/root"))  # folders that each machine has for itself
NETWORK = "10.77.0"  # every laboratory has a network of its own, so all can use the same addresses
NOWHERE = "02:00:00:00:00:99"  # an Ethernet address that no machine has
BOOT_SECONDS = 60

# Process 1 of a machine. Orphans become its children, and are removed from the process table when they end.
INIT = "import signal; signal.signal(signal.SIGCHLD, signal.SIG_IGN)\nwhile True: signal.pause()"


def run(*words: object, check: bool = True) -> str:
    """Run a command of this host; return its output. Raises RuntimeError if it fails and ``check`` is set."""
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise RuntimeError(f"{shlex.join(map(str, words))}: {done.stderr.strip()}")
    return done.stdout


class Switch:
    """An Ethernet switch in a network namespace of its own; it ends with the process that created it."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "unshare", "--net", "sleep", "infinity"],
            stdin=subprocess.DEVNULL,
        )
        own = os.readlink("/proc/self/ns/net")
        deadline = time.monotonic() + BOOT_SECONDS
        while os.readlink(f"/proc/{self.process.pid}/ns/net") == own:
            if time.monotonic() > deadline:
                raise RuntimeError("the switch did not start")
            time.sleep(0.01)
        self.ip("link", "add", "br0", "type", "bridge")
        self.ip("link", "set", "br0", "up")

    def ip(self, *words: object, check: bool = True, tool: str = "ip") -> str:
        """Run an ``ip`` command, or one of another ``tool``, in the switch's namespace; return its output."""
        return run("nsenter", "-t", self.process.pid, "-n", tool, *words, check=check)

    def close(self) -> None:
        """Remove the switch and with it every cable."""
        self.process.kill()
        self.process.wait()


@dataclass
class Machine:
    """One machine on a switch. ``folder`` holds its disk; ``number`` is the last part of its IP address."""

    name: str
    number: int
    switch: Switch
    folder: Path
    shared: Path | None = None  # a folder that it sees as /tmp/shared, as others do
    init: int = 0  # pid of its process 1, as this host counts; 0: it is off
    holder: subprocess.Popen[bytes] | None = None
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def ip(self) -> str:
        """Its IP address."""
        return f"{NETWORK}.{self.number}"

    @property
    def disk(self) -> Path:
        """The folder of this host that holds its /tmp and /root."""
        return self.folder / self.name

    @property
    def is_on(self) -> bool:
        """Whether its process 1 lives."""
        return self.holder is not None and self.holder.poll() is None

    def boot(self) -> None:
        """Start it with an empty disk; only the trace of earlier boots is kept. Raises RuntimeError if it fails."""
        trace = self.disk / "tmp" / "trace.jsonl"
        kept = trace.read_bytes() if trace.exists() else b""
        shutil.rmtree(self.disk, ignore_errors=True)
        for private in PRIVATE:
            (self.disk / private.relative_to("/")).mkdir(parents=True)
        (self.disk / "tmp").chmod(0o1777)
        trace.write_bytes(kept)
        (self.disk / "hosts").write_text(f"127.0.0.1 localhost\n{self.ip} {self.name}\n")
        script = (
            "set -e\n" + "\n".join(self._mounts()) + f"\nexec {sys.executable} -S -c {shlex.quote(INIT)}\n"
        )
        with (self.folder / f"boot-{self.name}.log").open("ab") as log:
            self.holder = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", "unshare", "--net", "--mount", "--pid", "--uts", "--ipc", "--fork",
                 "--kill-child", "--mount-proc", "bash", "-c", script],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log,
            )  # fmt: skip
        deadline = time.monotonic() + BOOT_SECONDS
        while not (self.init and b"SIGCHLD" in command_line(self.init)):
            if time.monotonic() > deadline or not self.is_on:
                raise RuntimeError(f"{self.name} did not boot: {self.folder / f'boot-{self.name}.log'}")
            time.sleep(0.02)
            self.init = next(iter(children(self.holder.pid)), 0)
        self._connect()

    def power_off(self, *, farewell: bool = False) -> None:
        """End all its processes at once; unless ``farewell``, its cable is pulled first, so nobody receives a reset."""
        if self.holder is None:
            return
        if not farewell:
            self.cut()
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.init, signal.SIGKILL)
        for process in (self.holder, *self.started):
            process.wait()
        self.init, self.holder, self.started = 0, None, []

    def cut(self) -> None:
        """Pull its cable: packets are lost, the link stays up."""
        self.switch.ip("link", "set", f"p-{self.name}", "nomaster", check=False)

    def reconnect(self) -> None:
        """Undo :meth:`cut`."""
        self.switch.ip("link", "set", f"p-{self.name}", "master", "br0", check=False)

    def deafen(self, other: Machine) -> None:
        """Lose every packet that it sends to another machine."""
        self.own_ip("neigh", "replace", other.ip, "lladdr", NOWHERE, "dev", "eth0", "nud", "permanent")

    def undeafen(self, other: Machine) -> None:
        """Undo :meth:`deafen`."""
        self.own_ip("neigh", "del", other.ip, "dev", "eth0", check=False)

    def own_ip(self, *words: object, check: bool = True, tool: str = "ip") -> str:
        """Run an ``ip`` command, or one of another ``tool``, in the machine's network; return its output."""
        return run("nsenter", "-t", self.init, "-n", tool, *words, check=check)

    # ---- processes ------------------------------------------------------------------------------------

    def command(self, words: list[str], env: Mapping[str, str]) -> list[str]:
        """Return the command of this host that runs ``words`` on the machine with exactly the variables ``env``."""
        return [
            "setpriv", "--pdeathsig", "KILL", "nsenter", "-t", str(self.init), "-m", "-n", "-p", "-u", "-i", "--",
            "env", "-i", "-C", "/tmp", *(f"{name}={value}" for name, value in env.items()), *words,
        ]  # fmt: skip

    def start(self, words: list[str], env: Mapping[str, str], *, log: Path) -> subprocess.Popen[bytes]:
        """Start a program on the machine that appends its output to a log of this host."""
        with log.open("ab") as file:
            process = subprocess.Popen(
                self.command(words, env), stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT
            )
        self.started.append(process)
        return process

    def run(
        self, words: list[str], env: Mapping[str, str], *, timeout: float = 120
    ) -> subprocess.CompletedProcess[str]:
        """Run a program on the machine to its end."""
        return subprocess.run(
            self.command(words, env),
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout, check=False,
        )  # fmt: skip

    def pids(self, text: str = "") -> list[int]:
        """Return the pids, as this host counts, of the machine's processes whose command line contains ``text``."""
        if not self.is_on:
            return []
        space = os.readlink(f"/proc/{self.init}/ns/pid")
        return [
            pid
            for pid in _all_pids()
            if pid != self.init and _space_of(pid) == space and text.encode() in command_line(pid)
        ]

    def pid_here(self, inner: int) -> int | None:
        """Return the pid, as this host counts, of the process that the machine itself numbers ``inner``."""
        for pid in self.pids():
            with contextlib.suppress(OSError):
                status = Path(f"/proc/{pid}/status").read_text()
                numbers = next(line for line in status.splitlines() if line.startswith("NSpid")).split()
                if int(numbers[-1]) == inner:
                    return pid
        return None

    # ---- details --------------------------------------------------------------------------------------

    def _mounts(self) -> Iterator[str]:
        """Yield the commands that give the machine its private folders and a read-only view of the code."""
        for source in (ROOT, VENV.resolve(), Path(os.path.realpath(sys.executable)).parents[1]):
            target = source
            if any(source.is_relative_to(private) for private in PRIVATE):
                target = self.disk / source.relative_to("/")
                target.mkdir(parents=True, exist_ok=True)
            yield f"mount --bind {source} {target}"
            yield f"mount -o remount,bind,ro {target}"
        if self.shared is not None:
            (self.disk / "tmp" / "shared").mkdir()
            yield f"mount --bind {self.shared} {self.disk}/tmp/shared"
        yield f"mount --bind {self.disk}/hosts /etc/hosts"
        yield f"mount --rbind {self.disk}/root /root"
        yield "mount -t tmpfs -o size=1g tmpfs /dev/shm"
        yield f"mount --rbind {self.disk}/tmp /tmp"
        yield f"hostname {self.name}"

    def _connect(self) -> None:
        """Plug a cable of the switch into the machine, which has just booted."""
        self.switch.ip("link", "del", f"p-{self.name}", check=False)
        self.switch.ip(
            "link", "add", f"p-{self.name}", "type", "veth", "peer", "name", "eth0", "netns", self.init
        )
        self.switch.ip("link", "set", f"p-{self.name}", "master", "br0", "up")
        self.own_ip("link", "set", "lo", "up")
        self.own_ip("addr", "add", f"{self.ip}/24", "dev", "eth0")
        self.own_ip("link", "set", "eth0", "up")


def command_line(pid: int) -> bytes:
    """Return the command line of a process with spaces between its words; empty if there is no such process."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ")
    except OSError:
        return b""


def children(pid: int) -> list[int]:
    """Return the pids of a process's children."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += [int(word) for word in task.read_text().split()]
    return found


def _all_pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _space_of(pid: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/ns/pid")
    except OSError:
        return ""
