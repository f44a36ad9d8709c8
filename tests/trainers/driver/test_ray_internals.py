"""The installed Ray Train has the internals that replacing single workers relies on."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

from dreamfleet.trainers.distributed.internals import Internal
from dreamfleet.trainers.driver.ray_internals import INTERNALS

DRIVER = Path(__file__).parents[3] / "trainers/driver"


def find_difference(internal: Internal) -> str | None:
    """Return how the installed Ray differs from the expected internal, or None if it does not."""
    module, _, owner = internal.owner.partition(":")
    found: Any = getattr(importlib.import_module(module), owner, None)
    if found is None:
        return "the owner is gone"
    if internal.parameters is None:
        source = inspect.getsource(found)
        assigned = re.compile(rf"\b(self\.)?{internal.name}\b[^=\n]*=[^=]", re.MULTILINE)
        return None if assigned.search(source) else "nothing assigns it"
    method = getattr(found, internal.name, None)
    if method is None:
        return "the method is gone"
    every = inspect.signature(method).parameters.values()
    names = tuple(one.name for one in every if one.name != "self" and one.kind != one.VAR_KEYWORD)
    return None if names == internal.parameters else f"its parameters are {names}"


@pytest.mark.parametrize("internal", INTERNALS, ids=lambda one: f"{one.owner.partition(':')[2]}.{one.name}")
def test_ray_has_the_internals_in_use(internal: Internal) -> None:
    assert find_difference(internal) is None


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"name": "no_such_name"}, "nothing assigns"),
        ({"owner": INTERNALS[0].owner + "2"}, "owner"),
        ({"name": "no_such_name", "parameters": ()}, "method is gone"),
        ({"name": "poll_status", "parameters": ("other",)}, "parameters"),
    ],
)
def test_a_change_of_ray_is_found(change: dict[str, Any], difference: str) -> None:
    assert difference in (find_difference(INTERNALS[0]._replace(**change)) or "")


def test_internals_of_the_subclasses_are_named() -> None:
    named = {internal.name for internal in INTERNALS}
    for file, own in (("member_group.py", "MemberGroup"), ("member_controller.py", "MemberController")):
        source = (DRIVER / file).read_text()
        module = importlib.import_module(f"dreamfleet.trainers.driver.{file[:-3]}")
        kind = getattr(module, own)
        ours = {name for name in vars(kind) if name not in named} | set(
            re.findall(r"self\.(_\w+)\b[^=\n]* = ", source)
        )
        used = set(re.findall(r"(?:self|super\(\)|group)\.(_[a-z]\w+)", source))
        assert used - ours - named <= {"__init__"}, used - ours - named
