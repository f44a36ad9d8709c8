"""Who may import whom: the layers of docs/architecture.md, held by reading the imports of every file."""

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("datasets", "trainers", "tune", "cluster")
LAYERS = ("datasets", "trainers/sd", "trainers/methods", "trainers", "tune", "cluster")  # low to high
HEAVY = {  # library -> the folders and files that may import it
    "ray": (
        "cluster/", "tune/", "datasets/serve/stream.py", "datasets/serve/cache.py",
        "trainers/driver/worker.py", "trainers/driver/shared_paths.py", "trainers/driver/session.py",
        "trainers/launch.py",
    ),
    "deepspeed": ("trainers/zero_",),
    "diffusers": ("trainers/sd/", "trainers/methods/"),
    "transformers": ("trainers/sd/", "trainers/methods/"),
}  # fmt: skip
LONG_FILES: dict[str, str] = {  # over 300 lines: file -> why
    "trainers/models/sampling/prompt_syntax.py": "the webui's whole syntax, to be read and compared in one place",
}
LONG_FUNCTIONS = {  # over 60 lines: file::function -> why
    "cluster/sample_grid.py::draw_grid": "half is its options, which are the command's",
    "cluster/cli/artifacts.py::sample": "its options, each with its help, are its signature",
    "cluster/cli/caption.py::caption": "its options, each with its help, are its signature",
    "cluster/cli/prepare.py::prepare": "its options, each with its help, are its signature",
    "cluster/cli/tags.py::tags": "its options, each with its help, are its signature",
    "datasets/tools/inspect.py::survey": "one figure a line",
    "datasets/index/index.py::build_index": "a third is its signature; the rest is one pass in order",
}

FILES = sorted(p.relative_to(ROOT).as_posix() for f in FOLDERS for p in (ROOT / f).rglob("*.py"))


def layer(path: str) -> int:
    """Return the height of the layer that `path` ("trainers/models/stable_diffusion/model.py") lies in."""
    return max(
        (n for n, name in enumerate(LAYERS) if path.startswith(name + "/")), key=lambda n: len(LAYERS[n])
    )


@cache
def imports(path: str) -> set[str]:
    """Return every dotted name that `path` imports, at its top or inside functions."""
    names = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: import by absolute name"
            names.add(str(node.module))
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def test_imports_point_down() -> None:
    wrong: list[str] = []
    for path in FILES:
        names = imports(path)
        own = {n.removeprefix("dreamfleet.").replace(".", "/") + "/" for n in names if n.count(".") > 1}
        if above := sorted(n for n in own if n.split("/")[0] in FOLDERS and layer(n) > layer(path)):
            wrong.append(f"{path} ({LAYERS[layer(path)]}) imports from a higher layer: {above}")
        if bare := sorted(n for n in names if n.split(".")[0] in FOLDERS):
            wrong.append(f"{path}: the folders are imported as dreamfleet.<folder>, not {bare}")
    assert not wrong, "\n".join(wrong)


def test_heavy_libraries_stay_in_their_files() -> None:
    wrong = [
        f"{path} imports {lib}; allowed only in {places}"
        for path in FILES
        for lib, places in HEAVY.items()
        if lib in {name.split(".")[0] for name in imports(path)} and not path.startswith(places)
    ]
    assert not wrong, "\n".join(wrong)


def test_no_init_files() -> None:
    """With one, a Ray task started in the root would get our `datasets` for Hugging Face's."""
    assert not [path for path in FILES if path.endswith("__init__.py")]


def test_long_files_and_functions_have_a_reason() -> None:
    files, functions = set(), set()
    for path in FILES:
        text = (ROOT / path).read_text()
        if text.count("\n") > 300:
            files.add(path)
        for node in ast.walk(ast.parse(text)):
            is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            if is_function and (node.end_lineno or 0) - node.lineno >= 60:
                functions.add(f"{path}::{node.name}")
    assert files == set(LONG_FILES), "split the file, or say in LONG_FILES why not (and drop stale reasons)"
    assert functions == set(LONG_FUNCTIONS), "split the function, or say in LONG_FUNCTIONS why not"


def test_process_groups_end_in_one_place() -> None:
    """Elsewhere one could be destroyed before its users; see trainers/distributed/process_group.py."""
    allowed = {
        "trainers/distributed/process_group.py",
        "trainers/engines/zero_setup.py",
        "tests/support/group_ends.py",
        "tests/repository/test_layers.py",
    }
    calls = {
        path.relative_to(ROOT).as_posix()
        for folder in (*FOLDERS, "tests", "benchmarks", "examples")
        for path in (ROOT / folder).rglob("*.py")
        if "destroy_process_group" in path.read_text()
    }
    assert calls <= allowed, f"end the group with leave_group or lone_group: {sorted(calls - allowed)}"
