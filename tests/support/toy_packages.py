"""The examples of docs/examples, as modules of this process or as packages that other processes find installed."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


def load_example(name: str, patch: pytest.MonkeyPatch) -> Any:
    """Return the module of an example, which can be imported by its name until the patch is undone."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    patch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


def install_example(site: Path, name: str, *, group: str, entry: str) -> dict[str, str]:
    """Install an example in the new folder ``site``; return the environment variables of processes that find it.

    ``group``: the group of its entry point, without ``dreamfleet.``; ``entry``: the name and the attribute, such as
    ``toy = ToyEngine``.
    """
    info = site / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    shutil.copy(EXAMPLES / f"{name}.py", site)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 1.0\n")
    key, attribute = entry.split(" = ")
    (info / "entry_points.txt").write_text(f"[dreamfleet.{group}]\n{key} = {name}:{attribute}\n")
    return importing_environment(site)


def importing_environment(*sites: Path) -> dict[str, str]:
    """Return the environment variables of processes that import from ``sites``, then from the paths of this one."""
    return os.environ | {"PYTHONPATH": os.pathsep.join([*map(str, sites), *filter(None, sys.path)])}
