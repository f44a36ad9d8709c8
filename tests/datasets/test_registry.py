"""Test registries: built-in entries, entry points of installed packages, and names that are already taken."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dreamfleet.datasets.errors import UserError
from dreamfleet.datasets.registry import Registry


def registry() -> Registry[object]:
    return Registry("shape", group="dreamfleet.test_shapes", builtin={"path": "pathlib:Path"})


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Install a package that adds one shape; yield its dist-info folder."""
    (tmp_path / "toy_shapes.py").write_text("class Square: ...\n")
    info = tmp_path / "toy_shapes-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-shapes\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[dreamfleet.test_shapes]\nsquare = toy_shapes:Square\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield info
    sys.modules.pop("toy_shapes", None)


def test_entries_are_imported_on_first_use(package: Path) -> None:
    shapes = registry()
    assert shapes.names() == ["path", "square"] and "toy_shapes" not in sys.modules
    assert shapes.get("square").__name__ == "Square" and shapes.get("path") is Path  # type: ignore[attr-defined]


def test_an_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(UserError, match=r"'pth'.*'path'"):
        registry().get("pth")


def test_an_entry_that_cannot_be_imported_is_named(package: Path) -> None:
    (package / "entry_points.txt").write_text("[dreamfleet.test_shapes]\nsquare = toy_shapes:Circle\n")
    with pytest.raises(UserError, match=r"square.*toy_shapes:Circle"):
        registry().get("square")


def test_a_name_belongs_to_one_implementation(package: Path) -> None:
    (package / "entry_points.txt").write_text("[dreamfleet.test_shapes]\npath = toy_shapes:Square\n")
    with pytest.raises(UserError, match=r"toy-shapes.*'path'"):
        registry().names()
    (package / "entry_points.txt").write_text("")
    shapes = registry()
    shapes.register("round")(dict)
    shapes.register("round")(dict)
    with pytest.raises(ValueError, match=r"round"):
        shapes.register("round")(list)
    shapes.unregister("round")
    assert "round" not in shapes


def test_a_rejected_entry_is_not_kept() -> None:
    shapes = Registry[object](
        "shape",
        group="dreamfleet.test_shapes",
        builtin={},
        find_problem=lambda name, entry: "it has no sides",
    )
    with pytest.raises(UserError, match=r"round.*no sides"):
        shapes.register("round")(dict)
    assert "round" not in shapes
