"""Compares two recipes as plain trees."""

from __future__ import annotations

import re
from typing import Any

_PACKAGE = re.compile(r'(^|")/[^"]*/_ray_pkg_[0-9a-f]+/')  # at the start, or within a list of paths


def differences(one: Any, other: Any, path: str = "") -> list[str]:
    """Return the sorted keys, such as ``train.seed``, whose values differ; the folder of a job's package is ignored."""
    if isinstance(one, dict) and isinstance(other, dict):
        return [
            found
            for key in sorted(one.keys() | other.keys())
            for found in differences(one.get(key), other.get(key), f"{path}.{key}".lstrip("."))
        ]
    return [] if without_package_path(one) == without_package_path(other) else [path]


def without_package_path(value: Any) -> Any:
    """Return a value of a recipe without the folder into which Ray unpacks a job's package.

    The name of that folder is a hash of the content, recipe included.
    """
    return _PACKAGE.sub(r"\1", value) if isinstance(value, str) else value
