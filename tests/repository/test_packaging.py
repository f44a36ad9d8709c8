"""Tests the package: the wheel is complete, names do not collide, and light modules import no heavy libraries."""

import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest

FOLDERS = ("cluster", "datasets", "trainers", "tune")
MEGABYTE = 1_000_000


def run_python(code: str, *arguments: str | Path, cwd: Path) -> str:
    """Run `code` in a new Python process and return its output."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def modules_of(root: Path) -> list[str]:
    """Return the dotted names of all modules of the four folders."""
    files = (p for folder in FOLDERS for p in (root / folder).rglob("*.py"))
    return sorted("dreamfleet." + ".".join(p.relative_to(root).with_suffix("").parts) for p in files)


@pytest.fixture(scope="module")
def wheel(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy of the sources without earlier build folders; return its path."""
    import shutil

    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, source)
    for name in FOLDERS:
        shutil.copytree(root / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "dist"]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return next((source / "dist").glob("*.whl"))


@pytest.mark.slow
def test_wheel_contains_the_pocket_model(root: Path, wheel: Path) -> None:
    pocket = root / "trainers" / "models" / "pocket"
    files = [p for p in pocket.rglob("*") if p.is_file()]
    assert files, "trainers/models/pocket is empty"
    assert sum(p.stat().st_size for p in files) <= 24 * MEGABYTE
    packed = zipfile.ZipFile(wheel).namelist()
    assert {f"dreamfleet/{p.relative_to(root).as_posix()}" for p in files} <= set(packed)
    assert not [name for name in packed if name.startswith(("dreamfleet/tests", "tests", "build"))]


@pytest.mark.slow
def test_wheel_contains_the_templates_of_the_reports(root: Path, wheel: Path) -> None:
    templates = [*root.glob("trainers/report/templates/*"), *root.glob("tune/templates/*")]
    assert len(templates) >= 5
    packed = set(zipfile.ZipFile(wheel).namelist())
    assert {f"dreamfleet/{path.relative_to(root).as_posix()}" for path in templates} <= packed


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel with pip into a folder; return the folder."""
    target = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, f"--target={target}", str(wheel)], check=True, capture_output=True, timeout=300)
    return target


# Removes the editable installation of this environment from the path.
ONLY_INSTALLED = """
    import importlib, sys
    from pathlib import Path
    target = sys.argv[1]
    sys.meta_path[:] = [f for f in sys.meta_path if "__editable__" not in getattr(f, "__module__", "")]
    sys.path[:] = [target, *(p for p in sys.path if "__editable__" not in p)]
"""


@pytest.mark.slow
def test_every_module_imports_from_the_installed_wheel(root: Path, site: Path, tmp_path: Path) -> None:
    code = f"""{ONLY_INSTALLED}
    for name in sys.argv[2].split(","):
        module = importlib.import_module(name)
        assert module.__file__.startswith(target), (name, module.__file__)
    from dreamfleet.cluster import cli
    assert callable(cli.main)
    """
    run_python(code, site, ",".join(modules_of(root)), cwd=tmp_path)


@pytest.mark.slow
def test_jobs_contain_the_same_files_as_the_wheel(wheel: Path, site: Path, tmp_path: Path) -> None:
    """Test jobs submitted from an installation and from this checkout, which may contain other files as well."""
    from dreamfleet.cluster.jobs.code import code_files

    with zipfile.ZipFile(wheel) as archive:
        built = {name: archive.read(name) for name in archive.namelist() if ".dist-info/" not in name}
    write = "from dreamfleet.cluster.jobs.code import write_code\n    write_code(Path.cwd() / 'sent')"
    run_python(f"{ONLY_INSTALLED}    {write}", site, cwd=tmp_path)
    sent = {
        path.relative_to(tmp_path / "sent").as_posix(): path.read_bytes()
        for path in (tmp_path / "sent" / "dreamfleet").rglob("*")
        if path.is_file()
    }
    assert sent == built
    checkout = {name: path.read_bytes() for name, path in code_files().items()}
    assert {name: checkout.get(name) for name in built} == built
    assert {name for name in checkout if name.endswith(".py")} <= set(built)


def test_hugging_face_datasets_is_importable_from_the_root(root: Path) -> None:
    """Test that our folder `datasets/` in the current directory does not hide the library of that name."""
    code = """
        import datasets, dreamfleet.datasets.errors
        assert hasattr(datasets, "load_dataset"), datasets
    """
    run_python(code, cwd=root)


@pytest.mark.cluster
def test_hugging_face_datasets_is_importable_in_a_ray_task(root: Path) -> None:
    code = """
        import ray

        @ray.remote
        def find():
            import os, datasets, dreamfleet.datasets.errors as ours
            return os.getcwd(), hasattr(datasets, "load_dataset"), ours.__name__

        ray.init(address="local", num_cpus=1, include_dashboard=False, logging_level="ERROR")
        folder, complete, name = ray.get(find.remote())
        assert folder == os.getcwd() and complete and name == "dreamfleet.datasets.errors", (folder, complete, name)
    """
    run_python("import os\n" + textwrap.dedent(code), cwd=root)


@pytest.mark.slow
def test_the_loop_needs_neither_ray_nor_deepspeed(root: Path, tmp_path: Path) -> None:
    """Test that without Ray and DeepSpeed all of trainers/ is importable except the files that need them."""
    apart = (
        "dreamfleet.cluster",
        "dreamfleet.tune",
        "dreamfleet.datasets.serve.stream",
        "dreamfleet.datasets.serve.cache",
    )
    members = ("member_controller", "member_group", "member_trainer")
    files = {
        f"dreamfleet.trainers.driver.{name}"
        for name in ("causes", "evaluator", *members, "ray_internals", "watch")
    }
    assert files <= set(modules_of(root))
    names = [n for n in modules_of(root) if not n.startswith(apart) and n not in files]
    code = """
        import importlib, sys
        class Refuse:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in ("ray", "deepspeed"):
                    raise ImportError(f"{name} must not be imported")
        sys.meta_path.insert(0, Refuse())
        for name in sys.argv[1].split(","):
            importlib.import_module(name)
    """
    run_python(code, ",".join(names), cwd=tmp_path)


def test_the_command_line_imports_nothing_heavy(root: Path, tmp_path: Path) -> None:
    """Test the imports of `dreamfleet --help`, which takes less than a second."""
    code = """
        import sys
        import dreamfleet.cluster.cli
        heavy = {"torch", "ray", "diffusers", "transformers", "deepspeed", "numpy", "PIL", "pyarrow"} & set(sys.modules)
        assert not heavy, heavy
    """
    run_python(code, cwd=tmp_path)


def test_constraints_pin_every_dependency(root: Path) -> None:
    import re
    import tomllib

    def plain(name: str) -> str:
        return re.sub(r"[-_.]+", "-", re.split(r"[\[<>=!~; ]", name)[0]).lower()

    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(d for e in project["optional-dependencies"].values() for d in e)]
    lines = (root / "constraints.txt").read_text().splitlines()
    pins = {plain(line): line for line in lines if line and not line.startswith("#")}
    assert {plain(name) for name in wanted} <= set(pins)
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in pins.values())


def test_pyproject_lists_every_package(root: Path) -> None:
    """Test that pyproject.toml lists every package, because an unlisted package is missing only from the wheel."""
    import tomllib

    listed = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert {name.rpartition(".")[0] for name in modules_of(root)} <= set(listed)
