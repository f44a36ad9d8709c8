"""Describes an exported file and how other programs use it, in one line each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dreamfleet.datasets.errors import UserError
from dreamfleet.trainers.artifacts.kind import ARTIFACTS, Usage
from dreamfleet.trainers.config.method import METHODS


def describe(name: str, *, run_name: str, recipe: Mapping[str, Any]) -> Usage:
    """Return the usage of ``exports/NAME`` of a run, from the kinds that the recipe's method exports.

    Raises UserError naming the known kinds for a file that none of them describes.
    """
    method = recipe.get("method")
    method = method if isinstance(method, Mapping) else {"name": method}
    method_name = str(method.get("name"))
    declared = METHODS.get(method_name).artifacts if method_name in METHODS else ()
    for kind in declared:
        if usage := ARTIFACTS.get(kind)().usage(name, run_name=run_name, method=method):
            return usage
    exported = f"the method {method_name} exports {', '.join(declared) or 'none of them'}"
    raise UserError(f"{name}: no artifact of a known kind ({', '.join(ARTIFACTS.names())}); {exported}")
