"""Tests that the documentation is current: generated parts, links, names of files, commands and functions."""

import ast
import re
import runpy
import shlex
from pathlib import Path
from typing import Any

import pytest

FOLDERS = "cluster|datasets|trainers|tune|tests|docs|recipes|examples|benchmarks"


@pytest.fixture(scope="module")
def pages(root: Path) -> dict[Path, str]:
    """Return the text of every Markdown page in the root and in docs/, by path."""
    return {
        page: page.read_text(encoding="utf-8") for page in [*root.glob("*.md"), *root.glob("docs/**/*.md")]
    }


def test_generated_parts_are_current(root: Path) -> None:
    """Test that the recipe reference matches the models, the diagram the imports, and the examples their files."""
    script = {
        name: runpy.run_path(str(root / "docs" / f"{name}.py"))
        for name in ("write_recipes", "structure", "write_examples", "write_imports")
    }
    page = {
        name: (root / "docs" / f"{name}.md").read_text(encoding="utf-8")
        for name in ("recipes", "architecture", "extending", "imports")
    }
    assert page["recipes"] == script["write_recipes"]["write"](), "run `make pages`"
    structure = script["structure"]
    graph = structure["packages"](structure["read_imports"](root))
    assert page["architecture"] == structure["write_diagram"](page["architecture"], graph), "run `make pages`"
    assert page["extending"] == script["write_examples"]["write"](), "run `make pages`"
    assert page["imports"] == script["write_imports"]["write"](), "run `make pages`"


def test_the_readme_is_short_and_the_same_in_chinese(root: Path) -> None:
    english, chinese = ((root / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh.md"))
    assert english.count("\n") < 200
    for pattern in (
        r"^(?:dreamfleet|make) [^#\n]*",
        r"^\| `\w+`",
        r"\]\((?:docs|benchmarks|examples|trainers)/[^)]*\)",
    ):
        found = [
            sorted({text.strip() for text in re.findall(pattern, page, re.M)}) for page in (english, chinese)
        ]
        assert [text.replace("methods.zh", "methods") for text in found[1]] == found[0]
    assert len(re.findall("^#+ ", english, re.M)) == len(re.findall("^#+ ", chinese, re.M))


def test_links_have_existing_targets(pages: dict[Path, str]) -> None:
    missing = [
        f"{page.name}: {link}"
        for page, text in pages.items()
        for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text)
        if "://" not in link and not (page.parent / link).exists()
    ]
    assert not missing


def test_files_named_in_backticks_exist(root: Path, pages: dict[Path, str]) -> None:
    """Test the paths that start with one of our folders; the history may name deleted files."""
    missing = [
        f"{page.name}: {path}"
        for page, text in pages.items()
        if page.name not in ("CHANGELOG.md", "NOTES.md")
        for path in re.findall(rf"`((?:{FOLDERS})/[\w./-]+)`", text)
        if not (root / path).exists()
    ]
    assert not missing


def test_functions_named_in_the_pages_exist(root: Path, pages: dict[Path, str]) -> None:
    """Test that `path/file.py:name` and `path/file.py:Class.method` are defined in that file."""
    named = {found for text in pages.values() for found in re.findall(r"`([\w/]+\.py):([\w.]+)`", text)}
    assert len(named) > 10
    missing = []
    for file, name in named:
        scope: Any = ast.parse((root / file).read_text(encoding="utf-8")) if (root / file).exists() else None
        for part in name.split("."):
            scope = next(
                (node for node in getattr(scope, "body", ()) if getattr(node, "name", "") == part), None
            )
        missing += [f"{file}:{name}"] * (scope is None)
    assert not missing


def test_commands_of_the_pages_exist(root: Path, pages: dict[Path, str]) -> None:
    """Test that the `dreamfleet` commands and options and the make targets in the pages exist."""
    import typer.main

    from dreamfleet.cluster.cli.program import app

    program: Any = typer.main.get_command(app)
    targets = set(re.findall(r"^([a-z-]+):", (root / "Makefile").read_text(), re.M))
    wrong = []
    for page, text in pages.items():
        wrong += [
            f"{page.name}: make {t}"
            for t in re.findall(r"(?:^|`)make ([a-z-]+)\b", text, re.M)
            if t not in targets
        ]
        for line in re.findall(r"(?:^|`)dreamfleet ([a-z][^`\n]*)", text.replace("\\\n", " "), re.M):
            typed = shlex.split(re.sub(r"['\"\[\]]", " ", line), comments=True)
            command = program
            while typed and typed[0] in getattr(command, "commands", ()):
                command = command.commands[typed.pop(0)]
            known = {name for option in command.params for name in option.opts} | {"--help"}
            # `submit --many` parses the words after it, and its help names their options.
            known |= {
                name
                for option in command.params
                for name in re.findall(r"--[a-z-]+", getattr(option, "help", "") or "")
            }
            unknown = [x for x in typed[: typed.index("--") if "--" in typed else None] if x.startswith("--")]
            if command is program and not line.startswith("--"):
                wrong.append(f"{page.name}: dreamfleet {line}")
            wrong += [f"{page.name}: dreamfleet {line}: {x}" for x in unknown if x.split("=")[0] not in known]
    assert not wrong, "\n".join(wrong)
