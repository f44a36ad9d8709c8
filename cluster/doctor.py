"""Checks whether this machine (and a cluster) meets the requirements of a run; the command `doctor`."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Callable
from ctypes.util import find_library
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import yaml

from dreamfleet.cluster.doctor_cluster import compare_storage, examine_cluster
from dreamfleet.cluster.finding import Finding
from dreamfleet.datasets.environment import PROFILES, has_profile, variables_to_send
from dreamfleet.datasets.errors import RecipeError
from dreamfleet.datasets.storage.probe import probe_storage
from dreamfleet.trainers.driver.node_facts import expected_workers
from dreamfleet.trainers.driver.session import Node, names_cluster

GIB = 2**30


def examine(
    address: str | None = None, *, storage: str | None = None, expected: int | None = None
) -> list[Finding]:
    """Check this machine, and the cluster at ``address`` or RAY_ADDRESS if there is one. Never shows a secret.

    ``storage``: a folder or s3:// prefix that every machine, or this one without a cluster, must reach. ``expected``:
    see :func:`examine_cluster`.
    """
    checks: list[Callable[[], list[Finding]]] = [
        _python,
        _torch,
        _packages,
        _optional_packages,
        _machine,
        _shared_memory,
        _pocket,
        _bucket_credentials,
        _sent_to_workers,
    ]
    found = [line for check in checks for line in check()]
    if names_cluster(address):
        return [*found, *examine_cluster(address, storage=storage, expected=expected)]
    return [*found, *_storage(storage)] if storage else found


def read_expected(config: Path) -> int | None:
    """Return the number of machines beside the head that a `ray up` file asks for. Raises RecipeError."""
    try:
        tree = yaml.safe_load(config.read_text(encoding="utf-8"))
        return expected_workers(tree)
    except (OSError, ValueError, AttributeError, TypeError, yaml.YAMLError) as error:
        raise RecipeError(f"--config {config}: not a file for `ray up` ({error})") from error


def _storage(url: str) -> list[Finding]:
    here = Node("", "this machine", {})
    return compare_storage(url, {here: probe_storage(url)})


def _python() -> list[Finding]:
    state: Literal["ok", "MISSING"] = "ok" if sys.version_info >= (3, 11) else "MISSING"
    system = f"{platform.system()} {platform.machine()}"
    return [Finding("python", state, f"{platform.python_version()} on {system} (3.11 or newer is needed)")]


def _torch() -> list[Finding]:
    if importlib.util.find_spec("torch") is None:
        return [Finding("torch", "MISSING", "pip install torch")]
    import torch

    lines = [Finding("torch", "ok", torch.__version__)]
    if not torch.cuda.is_available():
        reason = "torch was built for CPUs" if torch.version.cuda is None else "no GPU or driver found"
        return [*lines, Finding("gpu", "note", f"none ({reason}): runs use the CPU")]
    for number in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(number)
        detail = f"{facts.name}, {facts.total_memory / GIB:.0f} GiB, CUDA {torch.version.cuda}"
        bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16: use mixed_precision fp16"
        lines.append(Finding(f"gpu {number}", "ok", f"{detail}, {bf16}"))
    return lines


def _packages() -> list[Finding]:
    return [
        _package(name, "MISSING", "pip install dreamfleet installs it")
        for name in ("ray", "diffusers", "transformers")
    ]


def _optional_packages() -> list[Finding]:
    return [
        _package("deepspeed", "note", "absent: engine.zero_stage needs it"),
        _package("bitsandbytes", "note", "absent: 8-bit optimizers need it, and a GPU"),
        _compiler(),
        _libaio(),
    ]


def _compiler() -> Finding:
    found = shutil.which(os.environ.get("CXX") or "c++")
    return Finding(
        "c++ compiler",
        "ok" if found else "note",
        found or "absent: engine.offload_optimizer_device: cpu compiles at its first use",
    )


def _libaio() -> Finding:
    found = find_library("aio")
    return Finding(
        "libaio", "ok" if found else "note", found or "absent: offload to nvme needs it, and libaio-dev"
    )


def _package(name: str, absent: Literal["note", "MISSING"], advice: str) -> Finding:
    # Packages are not imported, because importing all of them takes half a minute on a busy machine.
    try:
        if importlib.util.find_spec(name) is not None:
            return Finding(name, "ok", version(name))
    except (ImportError, ValueError, PackageNotFoundError):
        pass
    return Finding(name, absent, advice)


def _machine() -> list[Finding]:
    cpus = len(os.sched_getaffinity(0))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    disk = shutil.disk_usage(os.getcwd())
    return [
        Finding("cpu", "ok", f"{cpus} cores"),
        Finding(
            "memory",
            "ok" if memory > 4 * GIB else "note",
            f"{memory / GIB:.1f} GiB, {free / GIB:.1f} GiB unused",
        ),
        Finding(
            "disk",
            "ok" if disk.free > 5 * GIB else "note",
            f"{disk.free / GIB:.1f} GiB free in {os.getcwd()}",
        ),
    ]


def _shared_memory() -> list[Finding]:
    try:
        room = shutil.disk_usage("/dev/shm").free
    except OSError:
        return [Finding("/dev/shm", "note", "absent: Ray stores its objects on disk, which is slow")]
    if room < GIB:
        advice = "small: large sets are slow; in Docker start with --shm-size=2g or more"
        return [Finding("/dev/shm", "note", f"{room / GIB:.2f} GiB, {advice}")]
    return [Finding("/dev/shm", "ok", f"{room / GIB:.1f} GiB")]


def _pocket() -> list[Finding]:
    from dreamfleet.trainers.models.pretrained import pocket_folder

    folder = pocket_folder()
    if not (folder / "model_index.json").exists():
        return [
            Finding("pocket model", "MISSING", f"not in {folder}: install the wheel again, or `make pocket`")
        ]
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return [Finding("pocket model", "ok", f"{size / 2**20:.1f} MiB in {folder}")]


def _bucket_credentials() -> list[Finding]:
    keys = "AWS_ACCESS_KEY_ID" in os.environ and "AWS_SECRET_ACCESS_KEY" in os.environ
    profile = next((os.environ[name] for name in PROFILES if os.environ.get(name)), None)
    file = os.path.exists(
        os.path.expanduser(os.environ.get("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials"))
    )
    endpoint = ", custom endpoint" if os.environ.get("AWS_ENDPOINT_URL") else ""
    if keys:
        return [Finding("s3", "ok", f"credentials in the environment{endpoint}")]
    if profile is not None:
        if not has_profile(profile):
            missing = f"AWS_PROFILE is {profile}, which no file on this machine defines: s3:// will not work"
            return [Finding("s3", "MISSING", missing)]
        return [
            Finding("s3", "ok", f"credentials of profile {profile}, whose keys are sent to workers{endpoint}")
        ]
    if file:
        return [Finding("s3", "ok", f"credentials in a file{endpoint}")]
    return [
        Finding(
            "s3",
            "note",
            "no credentials: s3:// works only if the machine has a role",
        )
    ]


def _sent_to_workers() -> list[Finding]:
    """List the names of the environment variables that are sent to workers; values are never shown."""
    names = sorted(variables_to_send(buckets=False))
    return [Finding("sent to workers", "ok", ", ".join(names))] if names else []
