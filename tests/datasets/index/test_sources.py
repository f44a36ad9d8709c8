"""Test image sources from outside the tree: training, inspection and caching without image files."""

from __future__ import annotations

import hashlib
import io
import json
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from PIL import Image
from toy_packages import install_example
from typer.testing import CliRunner

from dreamfleet.cluster.cli import program
from dreamfleet.datasets.errors import DataError
from dreamfleet.datasets.index.file_hashes import known_files
from dreamfleet.datasets.index.index import build_index
from dreamfleet.datasets.index.sources import (
    SOURCES,
    Listing,
    ScanOptions,
    Source,
    SourceImage,
    find_source,
    read_image_file,
)
from dreamfleet.trainers.recipe import build_recipe
from dreamfleet.trainers.run.run import run_worker

EXAMPLE = Path(__file__).parents[3] / "docs" / "examples" / "toy_source.py"


def pack(pictures: Path, folder: Path, *, empty: int = 0) -> Path:
    """Write a folder's images and captions in the example source's format; return the new folder.

    The last ``empty`` entries have no bytes.
    """
    folder.mkdir()
    entries: list[dict[str, Any]] = []
    data = b""
    for path in sorted(pictures.glob("*.png")):
        content, caption = path.read_bytes(), path.with_suffix(".txt")
        with Image.open(io.BytesIO(content)) as image:
            entry: dict[str, Any] = {"start": len(data), "end": len(data) + len(content), "size": image.size}
        entry["sha256"] = hashlib.sha256(content).hexdigest()
        entries.append({**entry, "caption": caption.read_text()} if caption.exists() else entry)
        data += content
    entries += [{"start": 7, "end": 7, "sha256": "", "size": [1, 1]}] * empty
    (folder / "images.bin").write_bytes(data)
    (folder / "toy.json").write_text(json.dumps(entries))
    return folder


@pytest.fixture
def toy() -> Iterator[type[Source]]:
    """Register the example's source in this process; yield its class."""
    source = SOURCES.register("toy")(runpy.run_path(str(EXAMPLE))["ToySource"])
    yield source
    SOURCES.unregister("toy")


@pytest.fixture
def folders(tmp_path: Path, toy: type[Source]) -> tuple[Path, Path]:
    """Return two folders with the same images: as files, and in the example source's format."""
    pictures = tiny.make_images(tmp_path / "pictures", 6, captions=True)
    return pictures, pack(pictures, tmp_path / "packed", empty=1)


def losses(folder: Path, run: str, **changes: Any) -> list[float]:
    recipe = build_recipe(tiny.make_recipe(folder, output_dir=str(folder / run), **changes))
    run_worker(recipe, resume=True)
    lines = (folder / run / "metrics.jsonl").read_text().splitlines()
    return [line["loss"] for line in map(json.loads, lines) if "loss" in line]


def test_an_index_of_a_source_is_that_of_the_same_files(folders: tuple[Path, Path]) -> None:
    files, packed = (build_index(folder) for folder in folders)
    assert packed.content_hash == files.content_hash and len(packed) == 6
    assert packed.row(0).uri.startswith(f"toy://{folders[1]}#")
    assert read_image_file(packed.row(0).uri) == read_image_file(files.row(0).uri)
    assert [item.reason for item in packed.bad] == ["its byte range in the table is empty"]


def test_images_with_listed_properties_are_not_read(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = build_index(folders[1]).content_hash
    (folders[1] / "images.bin").unlink()
    assert build_index(folders[1], verify=False).content_hash == whole


def test_content_that_differs_from_the_listed_hash_is_left_out(folders: tuple[Path, Path]) -> None:
    table = folders[1] / "toy.json"
    entries = json.loads(table.read_text())
    entries[2]["sha256"] = "0" * 64
    table.write_text(json.dumps(entries))
    index = build_index(folders[1])
    assert len(index) == 5 and any("sha256" in item.reason for item in index.bad)


@pytest.mark.parametrize("changes", [{}, {"data__center_crop": False}], ids=["latents", "pixels"])
def test_training_from_a_source_equals_training_from_files(
    folders: tuple[Path, Path], tmp_path: Path, changes: dict[str, Any]
) -> None:
    files, packed = folders
    expected = losses(tmp_path, "files", data__instance_data_dir=str(files), **changes)
    assert losses(tmp_path, "packed", data__instance_data_dir=str(packed), **changes) == expected
    assert losses(tmp_path, "scheme", data__instance_data_dir=f"toy://{packed}", **changes) == expected


def test_a_run_resumes_on_a_source_and_notices_other_images(
    folders: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    changes = {"data__instance_data_dir": str(folders[1]), "train__checkpointing_steps": 2}
    whole = losses(tmp_path, "whole", **changes)
    losses(tmp_path, "halves", **{**changes, "train__max_train_steps": 2})
    assert losses(tmp_path, "halves", **changes) == whole
    table = folders[1] / "toy.json"
    table.write_text(json.dumps(json.loads(table.read_text())[1:]))
    assert "dataset_hash" not in caplog.text
    losses(tmp_path, "halves", **{**changes, "train__max_train_steps": 6})
    assert "dataset_hash" in caplog.text


def test_inspect_and_cache_read_a_source(folders: tuple[Path, Path], tmp_path: Path) -> None:
    files, packed = (str(folder) for folder in folders)
    surveys = []
    for folder in (files, packed):
        result = CliRunner().invoke(program.app, ["data", "inspect", folder, "--resolution", "32", "--json"])
        assert result.exit_code == 0, result.output
        surveys.append(json.loads(result.stdout))
    for key in ("pictures", "width", "tags", "captioned", "formats", "shown_at"):
        assert surveys[0][key] == surveys[1][key], key
    assert len(surveys[1]["bad"]) == 1 and not surveys[0]["bad"]

    tree = tiny.make_recipe(tmp_path, data__instance_data_dir=packed, data__cache_dir=str(tmp_path / "cache"))
    recipe = tiny.write_recipe(tmp_path / "recipe.yaml", tree)
    result = CliRunner().invoke(program.app, ["data", "cache", str(recipe), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["encoded"] == 6
    expected = losses(tmp_path, "files", data__instance_data_dir=files)
    changes = {"data__instance_data_dir": packed, "data__cache_dir": str(tmp_path / "cache")}
    assert losses(tmp_path, "cached", **changes) == expected


def test_held_out_images_can_come_from_a_source(folders: tuple[Path, Path], tmp_path: Path) -> None:
    changes: dict[str, Any] = {"validation": {"holdout": f"toy://{folders[1]}", "steps": 2}}
    assert losses(tmp_path, "held", data__instance_data_dir=str(folders[0]), **changes)
    lines = (tmp_path / "held" / "metrics.jsonl").read_text()
    assert "holdout_loss" in lines


def test_unchanged_images_without_a_listed_hash_are_not_read_again(tmp_path: Path) -> None:
    reads = []

    class Stamped(Source):
        def matches(self, url: str) -> bool:
            return False

        def scan(self, url: str, options: ScanOptions) -> Listing:
            return Listing([SourceImage(f"stamped://{number}") for number in range(3)])

        def stamps(self, url: str) -> dict[str, str]:
            return {f"stamped://{number}": "v1" for number in range(3)}

        def read(self, uri: str) -> bytes:
            reads.append(uri)
            buffer = io.BytesIO()
            Image.new("RGB", (20, 20), (int(uri[-1]), 0, 0)).save(buffer, "PNG")
            return buffer.getvalue()

    SOURCES.register("stamped")(Stamped)
    try:
        recipe = build_recipe(
            tiny.make_recipe(tmp_path, data__instance_data_dir="stamped://x", data__cache_dir=str(tmp_path))
        )
        known = known_files(recipe.data)
        assert known is not None
        known.remember(build_index("stamped://x", verify=False, known=known))
        assert len(reads) == 3
        again = known_files(recipe.data)
        assert len(build_index("stamped://x", verify=False, known=again)) == 3 and len(reads) == 3
    finally:
        SOURCES.unregister("stamped")


def test_urls_that_no_source_or_several_read_are_refused(toy: type[Source], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"mds://.*installed: .*list.*toy"):
        find_source("mds://cats")
    result = CliRunner().invoke(program.app, ["data", "inspect", "mds://cats"])
    assert result.exit_code == 2 and "mds://" in result.output
    (tmp_path / "toy.json").write_text("[]")
    SOURCES.register("other")(type("Other", (toy,), {}))
    try:
        with pytest.raises(DataError, match="toy, other"):
            find_source(str(tmp_path))
    finally:
        SOURCES.unregister("other")
    with pytest.raises(DataError, match="no image"):
        build_index(tmp_path)
    (tmp_path / "toy.json").write_text("{")
    with pytest.raises(DataError, match=r"toy\.json is not JSON"):
        build_index(tmp_path)


def test_a_source_may_describe_several_subjects(folders: tuple[Path, Path], tmp_path: Path) -> None:
    from dreamfleet.datasets.config import Concept, DataConfig
    from dreamfleet.datasets.index.sets import load_sets

    class Subjects(Source):
        def matches(self, url: str) -> bool:
            return url.endswith(".subjects")

        def scan(self, url: str, options: ScanOptions) -> Listing:
            raise AssertionError("its subjects are folders")

        def concepts(self, url: str, data: DataConfig) -> list[Concept]:
            lines = Path(url).read_text().splitlines()
            return [Concept(instance_data_dir=line, repeats=2) for line in lines]

    list_file = tmp_path / "two.subjects"
    list_file.write_text("\n".join(map(str, folders)))
    SOURCES.register("subjects")(Subjects)
    try:
        for key in ("train_data_dir", "concepts_list"):
            sets = load_sets(DataConfig(**{key: str(list_file)}))
            assert sets.instances.column("repeats") == [2] * 12 and len(sets.concepts) == 2
    finally:
        SOURCES.unregister("subjects")


@pytest.fixture
def installed(tmp_path: Path) -> dict[str, str]:
    """Return the environment variables of a process in which the example is an installed package."""
    return install_example(tmp_path / "site", "toy_source", group="sources", entry="toy = ToySource")


def test_an_installed_package_adds_a_source(installed: dict[str, str], tmp_path: Path) -> None:
    packed = pack(tiny.make_images(tmp_path / "pictures", 6), tmp_path / "packed")
    tree = tiny.make_recipe(tmp_path, data__instance_data_dir=f"toy://{packed}")
    recipe = tiny.write_recipe(tmp_path / "recipe.yaml", tree)
    for arguments in (["data", "inspect", str(packed)], ["train", str(recipe)]):
        command = [sys.executable, "-m", "dreamfleet.cluster.cli", *arguments]
        done = subprocess.run(command, env=installed, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "summary.json").exists()


@pytest.mark.cluster
@pytest.mark.parametrize(
    "changes",
    [{}, {"data__source": "stream", "data__center_crop": False}],
    ids=["resident", "stream"],
)
def test_two_workers_read_a_source(
    installed: dict[str, str], tmp_path: Path, changes: dict[str, Any]
) -> None:
    packed = pack(tiny.make_images(tmp_path / "pictures", 6), tmp_path / "packed")
    figures = []
    for workers, batch in ((0, 2), (2, 1)):
        tree = tiny.make_recipe(
            tmp_path,
            output_dir=str(tmp_path / f"run-{workers}"),
            data__instance_data_dir=str(packed),
            data__center_crop=changes.get("data__center_crop", True),
            train__train_batch_size=batch,
            scaling={"num_workers": workers, "resources_per_worker": {"CPU": 0.5}}
            if workers
            else {"num_workers": 0},
            **({"data__source": "stream"} if workers and changes else {}),
        )
        recipe = tiny.write_recipe(tmp_path / "recipe.yaml", tree)
        command = [sys.executable, "-m", "dreamfleet.cluster.cli", "train", str(recipe)]
        done = subprocess.run(command, env=installed, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stderr
        lines = (Path(tree["output_dir"]) / "metrics.jsonl").read_text().splitlines()
        figures.append([line["loss"] for line in map(json.loads, lines) if "loss" in line])
    assert figures[1] == pytest.approx(figures[0], rel=1e-4)
