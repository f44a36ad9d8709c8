"""The pages are current: links lead somewhere, commands exist, docs/recipes.md is what the models say."""

import re
import runpy
from pathlib import Path

import pytest

PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "NOTES.md",
    "CHANGELOG.md",
    "docs/architecture.md",
    "docs/dependencies.md",
    "docs/formats.md",
]


def test_recipes_page_is_current(root: Path) -> None:
    page = runpy.run_path(str(root / "docs" / "write_recipes.py"))
    assert (root / "docs" / "recipes.md").read_text() == page["write"](), "run `make docs`"


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(root: Path, name: str) -> None:
    page = root / name
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("name", PAGES)
def test_files_named_in_backticks_exist(root: Path, name: str) -> None:
    """Only for paths that start with one of our folders; `datasets/x.py` renamed must be renamed in the pages."""
    named = re.findall(
        r"`((?:cluster|datasets|trainers|tune|tests|docs|recipes|examples)/[\w./-]+)`",
        (root / name).read_text(),
    )
    assert not [path for path in named if not (root / path).exists()]


@pytest.mark.parametrize("name", PAGES)
def test_commands_of_the_pages_exist(root: Path, name: str) -> None:
    import typer.main

    from dreamfleet.cluster.cli.program import app

    text = (root / name).read_text()
    known = set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    assert set(re.findall(r"(?:^|`)dreamfleet ([a-z]+)\b", text, re.M)) <= known
    targets = set(re.findall(r"^([a-z-]+):", (root / "Makefile").read_text(), re.M))
    assert set(re.findall(r"(?:^|`)make ([a-z-]+)\b", text, re.M)) <= targets
