"""Tests the import rules of docs/architecture.md, and the limits on the length of files and functions."""

import ast
import runpy
from pathlib import Path
from typing import Any

# Low to high: a package may import itself, the packages listed before it, and the heavy libraries in its value.
# A file directly in trainers/ counts as a package.
LAYERS = {
    "datasets": "",
    "datasets/storage": "",
    "datasets/processing": "ray",
    "datasets/images": "",
    "datasets/index": "",
    "datasets/serve": "ray",
    "datasets/tools": "",
    "trainers/config": "",
    "trainers/config/methods": "",
    "trainers/recipe.py": "",
    "trainers/imports": "",
    "trainers/imports/programs": "",
    "trainers/distributed": "torch",
    "trainers/models/formats": "torch diffusers transformers",
    "trainers/models": "torch diffusers transformers",
    "trainers/models/vision": "torch transformers",
    "trainers/models/stable_diffusion": "torch diffusers transformers",
    "trainers/models/sampling": "torch diffusers",
    "trainers/artifacts": "torch",
    "trainers/report": "",
    "trainers/tracking": "torch",
    "trainers/optim": "torch",
    "trainers/methods": "torch",
    "trainers/engines": "torch deepspeed",
    "trainers/batches": "torch",
    "trainers/memory": "torch",
    "trainers/evaluation": "torch",
    "trainers/step_metrics.py": "torch",
    "trainers/loop.py": "torch",
    "trainers/run": "torch",
    "trainers/scale": "torch",
    "trainers/driver": "torch ray",
    "trainers/packing": "torch",
    "trainers/launch.py": "ray",
    "tune/pool": "torch ray",
    "tune": "torch ray",
    "tune/fleet": "torch ray",
    "cluster": "torch",
    "cluster/jobs": "ray",
    "cluster/labeling": "",
    "cluster/browse": "",
    "cluster/monitoring": "",
    "cluster/cli": "",
}
HEAVY = {"torch", "ray", "deepspeed", "diffusers", "transformers"}
WITH_INIT = {"cluster/cli/__init__.py"}  # `dreamfleet.cluster.cli:main` is the program's entry point
LONG_FILES = {  # over 300 lines: file -> reason
    "cluster/cli/artifacts.py": "the commands sample, score, export and convert, mostly their options",
    "datasets/storage/storage.py": "the whole interface of storage, each method for disks and buckets side by side",
    "trainers/engines/zero_engine.py": "the engine's whole use of DeepSpeed, in one class",
    "trainers/models/family.py": "the whole model family interface with its defaults, to be read in one place",
    "trainers/models/sampling/prompt_syntax.py": "the webui's whole prompt syntax, comparable with its documentation",
    "trainers/models/stable_diffusion/model.py": "the implementation of that interface, in its order",
}
LONG_FUNCTIONS = {  # over 60 lines: file::function -> reason
    "cluster/cli/artifacts.py::sample": "its signature declares the options and their help",
    "cluster/cli/caption.py::caption": "its signature declares the options and their help",
    "cluster/cli/jobs.py::submit": "its signature declares the options and their help",
    "cluster/cli/measure.py::measure": "its signature declares the options and their help",
    "cluster/cli/plan.py::plan": "its signature declares the options and their help",
    "cluster/cli/prepare.py::prepare": "its signature declares the options and their help",
    "cluster/cli/tags.py::tags": "its signature declares the options and their help",
    "trainers/evaluation/score.py::score_run": "a third is its signature and docstring; the rest is one pass in order",
    "trainers/run/build.py::assemble": "builds the parts of a run in the only possible order",
}
# Files that may call torch.distributed.destroy_process_group: others could destroy a group that is still in
# use.
END_GROUPS = {
    "trainers/distributed/process_group.py",
    "trainers/engines/zero_setup.py",
    "tests/support/group_ends.py",
    "tests/repository/test_layers.py",
}


def test_imports_point_down_without_cycles(root: Path) -> None:
    structure = runpy.run_path(str(root / "docs" / "structure.py"))
    files, package = structure["read_imports"](root), structure["package"]
    order = list(LAYERS)
    found = {package(file) for file in files}
    wrong = [f"{name} has no entry in LAYERS" for name in found - set(order)]
    wrong += [f"LAYERS names {name}, which does not exist" for name in set(order) - found]
    wrong += [
        f"{a} imports {b} of a higher layer"
        for a, b in files.edges
        if {package(a), package(b)} <= set(order) and order.index(package(b)) > order.index(package(a))
    ]
    wrong += ["import cycle: " + ", ".join(group) for group in structure["cycles"](files)]
    for file in files:
        names = structure["imported_names"](root / file)
        libraries = {name.split(".")[0] for name in names}
        allowed = set(LAYERS.get(package(file), "").split())
        wrong += [f"{file} imports {name}" for name in (libraries & HEAVY) - allowed]
        wrong += [f"{file}: write dreamfleet.{name}" for name in libraries & set(structure["FOLDERS"])]
        wrong += [f"{file}: import by absolute name" for name in names if name.startswith(".")]
        # With an __init__.py, a Ray task started in the repository would import our `datasets`, not Hugging
        # Face's.
        wrong += [
            f"{file}: no __init__.py" for _ in (1,) if file.endswith("__init__.py") and file not in WITH_INIT
        ]
    assert not wrong, "\n".join(sorted(wrong))


def test_long_files_and_functions_have_a_reason_and_groups_end_in_one_place(root: Path) -> None:
    structure: dict[str, Any] = runpy.run_path(str(root / "docs" / "structure.py"))
    files, functions = set(), set()
    for path in structure["read_imports"](root):
        text = (root / path).read_text()
        if text.count("\n") > 300:
            files.add(path)
        for node in ast.walk(ast.parse(text)):
            is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            if is_function and (node.end_lineno or 0) - node.lineno >= 60:
                functions.add(f"{path}::{node.name}")
    assert files == set(LONG_FILES), "split the file, or give a reason in LONG_FILES (and drop stale reasons)"
    assert functions == set(LONG_FUNCTIONS), "split the function, or give a reason in LONG_FUNCTIONS"
    calls = {
        path.relative_to(root).as_posix()
        for folder in (*structure["FOLDERS"], "tests", "benchmarks", "examples")
        for path in (root / folder).rglob("*.py")
        if "destroy_process_group" in path.read_text()
    }
    assert calls <= END_GROUPS, f"end the group with leave_group or lone_group: {sorted(calls - END_GROUPS)}"
