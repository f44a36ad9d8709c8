"""Copies the running dreamfleet into folders that Ray sends to every machine of a job."""

from __future__ import annotations

import os
import shutil
from importlib.metadata import requires, version
from importlib.util import find_spec
from pathlib import Path

PACKAGES = ("cluster", "datasets", "trainers", "tune")


def write_code(folder: Path) -> list[Path]:
    """Write the running dreamfleet, from a checkout or installed, into ``folder``; return the folders for py_modules.

    Folders, not a wheel: Ray installs a wheel with whatever ``pip`` is first on PATH on each machine, and there may be
    none, or that of another Python. Ray names a folder by its content, so equal code is sent once. The second folder
    holds dreamfleet's version and requirements.
    """
    code = folder / "dreamfleet"
    for name, path in code_files().items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / name)
    number = version("dreamfleet")
    info = folder / f"dreamfleet-{number}.dist-info"
    info.mkdir()
    lines = ["Metadata-Version: 2.1", "Name: dreamfleet", f"Version: {number}"]
    lines += [f"Requires-Dist: {text}" for text in requires("dreamfleet") or ()]
    (info / "METADATA").write_text("\n".join([*lines, ""]))
    return [code, info]


def code_files() -> dict[str, Path]:
    """Return the files of the running dreamfleet by their paths below a folder of PYTHONPATH."""
    files = {}
    for package in PACKAGES:
        spec = find_spec(f"dreamfleet.{package}")
        assert spec is not None and spec.submodule_search_locations is not None
        # An editable installation also lists a finder, which is not a folder.
        root = Path(next(place for place in spec.submodule_search_locations if os.path.isdir(place)))
        for path in sorted(root.rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                files[f"dreamfleet/{package}/{path.relative_to(root).as_posix()}"] = path
    return files
