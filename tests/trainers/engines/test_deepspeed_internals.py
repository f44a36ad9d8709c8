"""Test that one file names all DeepSpeed internals in use, and that the installed DeepSpeed matches it."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

from dreamfleet.trainers.distributed.internals import Internal
from dreamfleet.trainers.engines.deepspeed_internals import INTERNALS

deepspeed = pytest.importorskip("deepspeed")
ROOT = Path(__file__).parents[3]
FILE = ROOT / "trainers/engines/deepspeed_internals.py"


def find_difference(internal: Internal) -> str | None:
    """Return how the installed DeepSpeed differs from the expected internal, or None if it does not."""
    module, _, owner = internal.owner.partition(":")
    found: Any = getattr(importlib.import_module(module), owner, None)
    if found is None:
        return "the owner is gone"
    bases = [kind for kind in getattr(found, "__mro__", [found]) if kind is not object]
    source = "".join(map(inspect.getsource, bases))
    if internal.parameters is None:
        assigned = re.compile(rf'\b(self|param)\.{internal.name}\b[^=\n]*=[^=]|"{internal.name}"')
        return None if assigned.search(source) else "nothing assigns it"
    # Read from the source, since decorators hide the parameters of some methods.
    methods = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    method = next((node for node in methods if node.name == internal.name), None)
    if method is None:
        return "the method is gone"
    parameters = tuple(argument.arg for argument in method.args.args)[1:]
    return None if parameters == internal.parameters else f"its parameters are {parameters}"


@pytest.mark.parametrize("internal", INTERNALS, ids=lambda internal: f"{internal.owner}.{internal.name}")
def test_deepspeed_has_the_internals_in_use(internal: Internal) -> None:
    assert find_difference(internal) is None


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"name": "no_such_name"}, "nothing assigns"),
        ({"owner": INTERNALS[0].owner + "2"}, "owner"),
        ({"name": "no_such_name", "parameters": ()}, "method is gone"),
        ({"name": "zero_grad", "parameters": ("other",)}, "parameters"),
    ],
)
def test_a_change_of_deepspeed_is_found(change: dict[str, Any], difference: str) -> None:
    assert difference in (find_difference(INTERNALS[0]._replace(**change)) or "")


def test_internals_are_named_in_one_file() -> None:
    names = {internal.name for internal in INTERNALS} - {"optimizer", "zero_grad", "partition", "all_gather"}

    def accessed(path: Path) -> set[str]:
        return {
            node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)
        }

    folders = ("datasets", "trainers", "tune", "cluster")
    others = {path for folder in folders for path in (ROOT / folder).rglob("*.py")} - {FILE}
    assert len(others) > 100
    elsewhere = {path.name: found for path in others if (found := accessed(path) & names)}
    assert not elsewhere
    own = {"Parameter", "update", "fromkeys", "ops"}  # of torch and Python, and an internal's owner
    assert accessed(FILE) - own <= {internal.name for internal in INTERNALS}
