"""What one machine of a cluster reports about itself; runs on machines without dreamfleet, so it imports only Python.

Ray sends this module by value: see ``trainers/driver/node_probe.py``.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from typing import Any

PACKAGES = ("ray", "torch", "dreamfleet", "deepspeed", "diffusers", "transformers", "peft", "numpy")
BOOTSTRAP = (
    "~/ray_bootstrap_config.yaml"  # where `ray up` stores the cluster's configuration on the head node
)


def node_facts() -> dict[str, Any]:
    """Return versions, sizes and GPUs of this machine as plain data; it holds no secrets."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "host": platform.node(),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "cpus": len(os.sched_getaffinity(0)),
        "memory": memory,
        "shared_memory": _disk("/dev/shm"),
        "disk": _disk(os.environ.get("TMPDIR", "/tmp")),
        "gpus": _gpus(),
        "has_rsync": shutil.which("rsync") is not None,
        "expected": _expected_workers(),
    }


def now() -> float:
    """Return this machine's clock in seconds since 1970."""
    return time.time()


def expected_workers(config: dict[str, Any]) -> int | None:
    """Return the number of machines beside the head that a `ray up` configuration asks for at least."""
    provider = config.get("provider") or {}
    if isinstance(ips := provider.get("worker_ips"), list):
        wanted = config.get("min_workers")
        return min(len(ips), int(wanted)) if wanted is not None else len(ips)
    types = config.get("available_node_types")
    if not isinstance(types, dict):
        return None
    head = config.get("head_node_type")
    return sum(int((each or {}).get("min_workers") or 0) for name, each in types.items() if name != head)


def _expected_workers() -> int | None:
    path = os.path.expanduser(BOOTSTRAP)
    if not os.path.exists(path):
        return None
    try:
        import yaml

        with open(path, encoding="utf-8") as file:
            found = yaml.safe_load(file)
        return expected_workers(found) if isinstance(found, dict) else None
    except Exception:  # noqa: BLE001 - not a configuration
        return None


def _version(name: str) -> str | None:
    try:
        number = version(name)
    except PackageNotFoundError:
        return None
    return f"{number} ({_code_hash()})" if name == "dreamfleet" else number


def _code_hash() -> str:
    """Return a hash of dreamfleet's code, as checkouts of one version differ."""
    digest = hashlib.sha256()
    for package in ("cluster", "datasets", "trainers", "tune"):
        spec = importlib.util.find_spec(f"dreamfleet.{package}")
        for root in sorted(spec.submodule_search_locations or ()) if spec else ():
            for folder, folders, files in os.walk(root):
                folders.sort()
                for file in sorted(files):
                    if file.endswith(".py"):
                        with open(os.path.join(folder, file), "rb") as source:
                            digest.update(file.encode() + source.read())
    return digest.hexdigest()[:8]


def _disk(path: str) -> dict[str, int] | None:
    try:
        usage = shutil.disk_usage(path)
    except OSError:
        return None
    return {"total": usage.total, "free": usage.free}


def _gpus() -> list[dict[str, str]]:
    if shutil.which("nvidia-smi") is None:
        return []
    names = "name,driver_version,memory.total"
    command = ["nvidia-smi", f"--query-gpu={names}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [line.split(", ") for line in done.stdout.strip().splitlines()]
    return [dict(zip(("name", "driver", "memory"), row, strict=False)) for row in rows]
