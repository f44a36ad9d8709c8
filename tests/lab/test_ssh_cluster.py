"""Test `cluster/launch/ssh.yaml` on three machines with SSH servers: `ray up`, a submitted job, `ray down`.

Only its addresses, user, key and the set-up commands are replaced: the machines reach no package index, and link this
environment instead. Needs sshd and rsync, installed or unpacked into the folders that LAB_TOOLS names.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from lab.laboratory import why_not
from lab.machine import ROOT, VENV, Machine, Switch

PLACES = os.pathsep.join(
    [os.environ.get("LAB_TOOLS", ""), "/usr/local/sbin", "/usr/sbin", os.environ["PATH"]]
)
TOOLS = {name: shutil.which(name, path=PLACES) for name in ("sshd", "rsync", "ssh", "ssh-keygen")}
MISSING = sorted(name for name, path in TOOLS.items() if path is None)
REASON = why_not() or (f"needs {', '.join(MISSING)} (Debian: openssh-server, rsync)" if MISSING else "")
pytestmark = [pytest.mark.lab, pytest.mark.timeout(900), pytest.mark.skipif(bool(REASON), reason=REASON)]
BIN = "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"


class SshLab:
    """Machines with SSH servers that share a folder, and an operator's machine with the key to them."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="dreamfleet-ssh-", dir="/tmp"))
        self.shared = self.folder / "shared"
        self.shared.mkdir()
        self.switch = Switch()
        self.laptop, self.head, *self.workers = (
            Machine(name, number, self.switch, self.folder, shared=self.shared)
            for number, name in enumerate(("laptop", "h0", "h1", "h2"), start=20)
        )

    def start(self) -> None:
        """Boot all machines."""
        self.laptop.boot()
        home = self.laptop.disk / "root"
        (home / ".ssh").mkdir(mode=0o700)
        key = home / ".ssh" / "id_ed25519"
        subprocess.run(
            [str(TOOLS["ssh-keygen"]), "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True
        )
        (home / ".ray").mkdir()
        (home / ".ray" / "auth_token").write_text(uuid.uuid4().hex * 2)
        for machine in (self.head, *self.workers):
            self.serve_ssh(machine, key.with_suffix(".pub").read_text())

    def serve_ssh(self, machine: Machine, public: str) -> None:
        """Boot a machine with an SSH server; its sessions find `rsync`, and no Python of ours, on PATH."""
        machine.boot()
        place = machine.disk / "root" / ".ssh"
        place.mkdir(mode=0o700)
        (place / "authorized_keys").write_text(public)
        tools = machine.disk / "tmp" / "sshd"
        tools.mkdir()
        command = [str(TOOLS["ssh-keygen"]), "-q", "-t", "ed25519", "-N", "", "-f", str(tools / "hostkey")]
        subprocess.run(command, check=True)
        (tools / "config").write_text(
            "HostKey /tmp/sshd/hostkey\nPermitRootLogin yes\nStrictModes no\nUsePAM no\nPidFile none\n"
        )
        users = re.sub(
            r"^root:.*$", "root:x:0:0:root:/root:/bin/bash", Path("/etc/passwd").read_text(), flags=re.M
        )
        if "\nsshd:" not in users:
            users += "sshd:x:65533:65534::/run/sshd:/bin/false\n"
        (tools / "passwd").write_text(users)
        script = (  # a login shell sets PATH anew, so rsync must be in a usual folder
            f"mount -t tmpfs tmpfs /usr/local/bin; ln -s {TOOLS['rsync']} /usr/local/bin/rsync; "
            "mount --bind /tmp/sshd/passwd /etc/passwd; mount -t tmpfs tmpfs /run; mkdir -p /run/sshd; "
            f"exec {TOOLS['sshd']} -D -e -f /tmp/sshd/config"
        )
        machine.start(["bash", "-c", script], {"PATH": BIN}, log=self.folder / f"sshd-{machine.name}.log")

    def write_config(self) -> None:
        """Write the configuration for these machines beside what it copies to them."""
        own = yaml.safe_load((ROOT / "cluster" / "launch" / "ssh.yaml").read_text())
        own["provider"] |= {"head_ip": self.head.ip, "worker_ips": [worker.ip for worker in self.workers]}
        own["auth"] |= {"ssh_user": "root", "ssh_private_key": "/root/.ssh/id_ed25519"}
        mounts = own["file_mounts"].items()
        own["file_mounts"] = {there.replace("/home/ME", "/root"): here for there, here in mounts}
        own["setup_commands"][:-1] = [f"ln -sfn {VENV} ~/dreamfleet"]  # the last one is about PATH
        for role in ("head", "worker"):  # two cores carry all of this
            *_, start = commands = own[f"{role}_start_ray_commands"]
            cpus = 0 if role == "head" else 1
            commands[-1] = f"{start} --num-cpus={cpus} --object-store-memory=100000000"
        folder = self.laptop.disk / "root"
        shutil.copy(ROOT / "constraints.txt", folder)
        (folder / "own.yaml").write_text(yaml.safe_dump(own))

    def operate(self, command: str, *, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        """Run a command on the operator's machine, in its home folder."""
        return self.laptop.run(["bash", "-c", f"cd /root; {command}"], self.environment(), timeout=timeout)

    def environment(self) -> dict[str, str]:
        """Return the variables of the operator's programs."""
        return {
            "PATH": f"{VENV}/bin:{Path(str(TOOLS['rsync'])).parent}:{BIN}",
            "PYTHONPATH": str(ROOT / "build" / "types"),
            "HOME": "/root",
            "LANG": "C.UTF-8",
            "TERM": "dumb",
            "RAY_AUTH_MODE": "token",
            "RAY_USAGE_STATS_ENABLED": "0",
            "HF_HUB_OFFLINE": "1",
        }

    def close(self) -> None:
        """End everything that was started."""
        for machine in (self.laptop, self.head, *self.workers):
            machine.power_off(farewell=True)
        self.switch.close()
        shutil.rmtree(self.folder, ignore_errors=True)


@pytest.fixture
def ssh_lab() -> Iterator[SshLab]:
    lab = SshLab()
    try:
        lab.start()
        yield lab
    finally:
        lab.close()


def test_a_cluster_over_ssh_trains_and_ends(ssh_lab: SshLab) -> None:
    lab = ssh_lab
    lab.write_config()
    up = lab.operate("ray up -y --no-config-cache own.yaml")
    assert up.returncode == 0, up.stdout + up.stderr
    wait_for_nodes(lab, 3)

    log = lab.folder / "dashboard.log"
    lab.laptop.start(["bash", "-c", "cd /root; exec ray dashboard own.yaml"], lab.environment(), log=log)
    shutil.copytree(ROOT / "examples" / "cat" / "train", lab.shared / "cat")
    recipe = {
        "method": {"name": "dreambooth"},
        "model": {"pretrained_model_name_or_path": "pocket"},
        "data": {
            "instance_data_dir": "/tmp/shared/cat",
            "instance_prompt": "a sks cat face",
            "resolution": 64,
        },
        "train": {"max_train_steps": 4, "train_batch_size": 2, "seed": 0},
        "scaling": {"num_workers": 2, "use_gpu": False},
        "output_dir": "/tmp/shared/run",
    }
    (lab.shared / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    wait_for_dashboard(lab, log)
    submit = "dreamfleet submit --shared /tmp/shared --follow -- train /tmp/shared/recipe.yaml"
    done = lab.operate(submit, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step 4/4" in done.stderr
    assert (lab.shared / "run" / "summary.json").exists()

    down = lab.operate("ray down -y own.yaml")
    assert down.returncode == 0, down.stdout + down.stderr
    deadline = time.monotonic() + 150  # a worker ends when it has missed the head for a minute
    while left := [(m.name, pid) for m in (lab.head, *lab.workers) for pid in m.pids("raylet/raylet")]:
        assert time.monotonic() < deadline, f"`ray down` left these nodes running: {left}\n{down.stdout}"
        time.sleep(1)


def wait_for_nodes(lab: SshLab, count: int) -> None:
    """Wait until Ray has ``count`` nodes."""
    deadline = time.monotonic() + 240
    while True:
        status = lab.operate("ray exec own.yaml 'RAY_AUTH_MODE=token ray status'")
        active = status.stdout.partition("Active:")[2].partition("Pending:")[0]
        if len(re.findall(r"^\s+\d+ ", active, re.M)) >= count or re.search(rf"^\s+{count} ", active, re.M):
            return
        assert time.monotonic() < deadline, status.stdout + status.stderr
        time.sleep(3)


def wait_for_dashboard(lab: SshLab, log: Path) -> None:
    """Wait until jobs can be listed through the tunnel."""
    deadline = time.monotonic() + 60
    while (jobs := lab.operate("dreamfleet jobs")).returncode:
        assert time.monotonic() < deadline, jobs.stderr + log.read_text()
        time.sleep(1)
