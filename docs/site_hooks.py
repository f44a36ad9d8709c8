"""Hooks of the documentation site (mkdocs.yml): its files, its diagrams, and names in docstrings."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import mermaidx
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "README.zh.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "NOTES.md")
LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)")
ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):<code>~?")


def on_config(config: MkDocsConfig) -> None:
    """Draw Mermaid blocks while the site is built: Mermaid's script in the browser would come from another host."""
    fence = {"name": "mermaid", "class": "mermaid", "format": draw_diagram}
    config.mdx_configs["pymdownx.superfences"] = {"custom_fences": [fence]}


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Return the files of the site under their paths in the repository, so that links are the same in both.

    These are the pages of the repository's root, docs/, and every file that one of them links to.
    """
    paths = (
        [ROOT / name for name in PAGES] + sorted((ROOT / "docs").rglob("*.md")) + [ROOT / "docs" / "site.css"]
    )
    found: dict[str, File] = {}
    while paths:
        path = paths.pop(0).resolve()
        name = path.relative_to(ROOT).as_posix()
        if name in found or not path.is_file():
            continue  # a link to a file that does not exist fails in mkdocs, with the page that has it
        found[name] = File.generated(config, name, abs_src_path=str(path))
        if path.suffix == ".md":
            links = LINK.findall(path.read_text(encoding="utf-8"))
            paths += [
                path.parent / link for link in links if "://" not in link and not link.startswith("mailto:")
            ]
    theme = [
        file
        for file in files
        if not file.abs_src_path or not Path(file.abs_src_path).is_relative_to(ROOT / "docs")
    ]
    return Files([*theme, *found.values()])


def on_page_content(html: str, **kwargs: Any) -> str:
    """Remove Sphinx's roles before names in docstrings: `:class:` and the like."""
    return ROLE.sub("<code>", html)


def draw_diagram(source: str, language: str, css_class: str, options: Any, md: Any, **kwargs: Any) -> str:
    """Return a Mermaid block as inline SVG that scales down to the width of the page."""
    svg = mermaidx.render(source).svg()
    return f'<div class="{css_class}">{svg[svg.index("<svg") :]}</div>'
