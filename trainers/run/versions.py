"""Versions of Python, of packages and of dreamfleet's git commit, recorded with a run."""

from __future__ import annotations

import os
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from dreamfleet.datasets.environment import is_secret

PACKAGES = ("dreamfleet", "torch", "diffusers", "transformers", "ray", "deepspeed")


def versions() -> dict[str, str]:
    """Return the versions that affect a run's results, and ``commit`` if this is a git checkout.

    They are those of this process, read once: a process trains many subjects.
    """
    return dict(_versions())


@cache
def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    if commit := git_commit(Path(__file__).resolve().parents[2]):
        found["commit"] = commit
    return found


def git_commit(checkout: Path) -> str:
    """Return a checkout's commit (12 digits, ``-dirty`` if files differ); "" if it is not a checkout."""
    if not (checkout / ".git").exists():  # a wheel may be installed inside another project's checkout
        return ""
    command = ["git", "-C", str(checkout), "describe", "--always", "--abbrev=12", "--dirty", "--exclude=*"]
    env = {name: value for name, value in os.environ.items() if not is_secret(name, value)}
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10, env=env)
        return done.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
