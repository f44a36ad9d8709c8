"""Print the structure of the code, and write the package diagram of docs/architecture.md: `make structure`.

`python docs/structure.py [ROOT] [--write]` reads the imports of every Python file of the four folders of a checkout,
also those inside functions and under TYPE_CHECKING. It needs networkx (which torch brings) and imports nothing of
dreamfleet, so it measures any version.
"""

from __future__ import annotations

import argparse
import ast
import re
from collections import Counter
from pathlib import Path

import networkx as nx

FOLDERS = ("datasets", "trainers", "tune", "cluster")
COUNTED = (*FOLDERS, "benchmarks", "examples", "docs")
STYLE = '%%{init: {"flowchart": {"nodeSpacing": 20, "rankSpacing": 40}}}%%'
BLOCK = re.compile(r"```mermaid\n.*?```", re.S)


def read_imports(root: Path) -> nx.DiGraph:
    """Return the graph of all source files, by path; an edge leads from a file to a file that it imports."""
    files = {p.relative_to(root).as_posix() for folder in FOLDERS for p in (root / folder).rglob("*.py")}
    graph = nx.DiGraph()
    graph.add_nodes_from(sorted(files))
    for file in files:
        names = imported_names(root / file)
        for name in names:
            path = name.removeprefix("dreamfleet.").replace(".", "/")
            if f"{path}.py" in files:
                graph.add_edge(file, f"{path}.py")
            # `from package import module` does not use what the package's own file defines.
            elif f"{path}/__init__.py" in files and not any(
                f"{path}/{other.rpartition('.')[2]}.py" in files
                for other in names
                if other.startswith(name + ".")
            ):
                graph.add_edge(file, f"{path}/__init__.py")
    graph.remove_edges_from([(file, file) for file in files])
    return graph


def imported_names(file: Path) -> set[str]:
    """Return every dotted name that a file imports, at its top or anywhere inside."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            names.add(module)
            names.update(f"{module}.{alias.name}" for alias in node.names)
    return names


def package(file: str) -> str:
    """Return the package of a file: its folder, except that a file directly in `trainers/` counts as one."""
    folder = file.rpartition("/")[0]
    return file if folder == "trainers" else folder


def packages(files: nx.DiGraph) -> nx.DiGraph:
    """Return the graph of packages that a graph of files makes."""
    graph = nx.DiGraph()
    graph.add_nodes_from(dict.fromkeys(map(package, files)))
    graph.add_edges_from((package(a), package(b)) for a, b in files.edges if package(a) != package(b))
    return graph


def cycles(graph: nx.DiGraph) -> list[list[str]]:
    """Return the import cycles: the groups of nodes that import each other."""
    return sorted(sorted(group) for group in nx.strongly_connected_components(graph) if len(group) > 1)


def levels(graph: nx.DiGraph) -> int:
    """Return the length of the longest chain of imports, in which a cycle counts as one node."""
    return int(nx.dag_longest_path_length(nx.condensation(graph))) + 1


def diagram(graph: nx.DiGraph) -> str:
    """Return the Mermaid source of the package graph: an arrow for each import that other arrows do not imply."""
    reduced = nx.transitive_reduction(graph)
    identifiers = {name: re.sub(r"\W", "_", name) for name in sorted(graph)}
    lines = [STYLE, "flowchart TD"]
    for folder in reversed(FOLDERS):
        boxes = [
            f'{identifier}["{name.partition("/")[2] or "*.py"}"]'
            for name, identifier in identifiers.items()
            if name.split("/")[0] == folder
        ]
        lines.append(f'    subgraph {folder}_folder["{folder}/"]\n        {"; ".join(boxes)}\n    end')
    for name, identifier in identifiers.items():
        if targets := sorted(identifiers[target] for target in reduced[name]):
            lines.append(f"    {identifier} --> {' & '.join(targets)}")
    return "\n".join(lines) + "\n"


def write_diagram(page: str, graph: nx.DiGraph) -> str:
    """Return the text of docs/architecture.md with its Mermaid block made from ``graph``."""
    return BLOCK.sub(lambda _: f"```mermaid\n{diagram(graph)}```", page, count=1)


def count_lines(root: Path) -> Counter[str]:
    """Return the number of lines of code by top-level folder, without tests."""
    lines: Counter[str] = Counter()
    for folder in COUNTED:
        for file in (root / folder).rglob("*"):
            if file.suffix in (".py", ".html", ".css", ".js", ".j2", ".cpp") and file.is_file():
                lines[folder] += file.read_text(encoding="utf-8").count("\n")
    return lines


def main() -> None:
    """Print the figures; with ``--write``, update the diagram."""
    parser = argparse.ArgumentParser(description=__doc__)
    here = Path(__file__).resolve().parents[1]
    parser.add_argument(
        "root", nargs="?", type=Path, default=here, help="a checkout of dreamfleet (default: this one)"
    )
    parser.add_argument("--write", action="store_true", help="update the diagram in docs/architecture.md")
    options = parser.parse_args()
    files = read_imports(options.root)
    graph = packages(files)
    print(f"files {len(files)}, levels of imports {levels(files)}, cycles {len(cycles(files))}")
    print(f"packages {len(graph)}, levels of imports {levels(graph)}, cycles {len(cycles(graph))}")
    for group in cycles(files):
        print("  cycle of files:", ", ".join(group))
    for group in cycles(graph):
        print("  cycle of packages:", ", ".join(group))
    lines = count_lines(options.root)
    print(f"lines without tests {lines.total()}:", ", ".join(f"{folder} {n}" for folder, n in lines.items()))
    if options.write:
        page = options.root / "docs" / "architecture.md"
        page.write_text(write_diagram(page.read_text(encoding="utf-8"), graph), encoding="utf-8")


if __name__ == "__main__":
    main()
