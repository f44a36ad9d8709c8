"""Compares two recipes as plain trees."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from dreamfleet.datasets.json_text import json_text

_PACKAGE = re.compile(r'(^|")/[^"]*/_ray_pkg_[0-9a-f]+/')  # at the start, or within a list of paths


def differences(one: Any, other: Any, path: str = "") -> list[str]:
    """Return the sorted keys, such as ``train.seed``, whose values differ; the folder of a job's package is ignored."""
    return [key for key, _, _ in _different(one, other, path)]


def describe_differences(there: Any, here: Any) -> list[str]:
    """Return the keys whose values differ, with both: ``train.seed: there 0, here 1``."""
    return [
        f"{key}: there {json_text(before)}, here {json_text(now)}"
        for key, before, now in _different(there, here, "")
    ]


def _different(one: Any, other: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(one, dict) and isinstance(other, dict):
        for key in sorted(one.keys() | other.keys()):
            yield from _different(one.get(key), other.get(key), f"{path}.{key}".lstrip("."))
    elif without_package_path(one) != without_package_path(other):
        yield path, one, other


def without_package_path(value: Any) -> Any:
    """Return a value of a recipe without the folder into which Ray unpacks a job's package.

    The name of that folder is a hash of the content, recipe included.
    """
    return _PACKAGE.sub(r"\1", value) if isinstance(value, str) else value
