"""Test that `data measure` adds columns to a set, by which a recipe chooses its images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from image_files import image, put
from PIL import Image
from typer.testing import CliRunner

from dreamfleet.cluster.cli import program
from dreamfleet.datasets.config import DataConfig
from dreamfleet.datasets.errors import DataError
from dreamfleet.datasets.index import set_store
from dreamfleet.datasets.index.edits import Edit, EditTable
from dreamfleet.datasets.index.set_store import open_set
from dreamfleet.datasets.index.sets import load_sets
from dreamfleet.datasets.tools.measure import refuse_names


def run(*words: Any) -> Any:
    return CliRunner().invoke(program.app, ["data", *(str(word) for word in words)])


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a sharp and a flat image."""
    monkeypatch.setenv("DREAMFLEET_CACHE", str(tmp_path / "machine"))
    put(tmp_path / "set", "sharp.png", image(1, size=(64, 64)))
    Image.new("RGB", (64, 64), (9, 9, 9)).save(tmp_path / "set" / "flat.png")
    return tmp_path / "set"


def used(folder: Path, **keys: Any) -> set[str]:
    data = DataConfig.model_validate({"instance_data_dir": str(folder), **keys})
    return {uri.rpartition("/")[2] for uri in load_sets(data).instances.column("uri")}


def test_columns_of_a_set_filter_it_with_any_cache(photos: Path, tmp_path: Path) -> None:
    done = run("measure", photos, "--json")
    assert done.exit_code == 0, done.output
    made = json.loads(done.stdout)
    assert made["table"] == str(photos / ".dreamfleet" / "columns" / "measured.parquet")
    assert made["new"] == 2 and not (photos / ".in-progress").exists()
    assert used(photos, where="blur > 100") == {"sharp.png"}
    assert used(photos, where="blur < 100", cache_dir=str(tmp_path / "cache")) == {"flat.png"}
    assert used(photos) == {"sharp.png", "flat.png"}
    assert "url" not in open_set(str(photos)).table.column_names
    assert json.loads(run("measure", photos, "--json").stdout)["new"] == 0


def test_a_cropped_image_has_the_values_of_the_whole(photos: Path) -> None:
    assert run("measure", photos).exit_code == 0
    EditTable(str(photos)).save({"sharp.png": Edit(width=64, height=64, crop=(0.0, 0.0, 0.5, 0.5))})
    assert used(photos, where="blur > 100") == {"sharp.png"}
    index = load_sets(DataConfig(instance_data_dir=str(photos), where="blur > 100")).instances
    assert list(index.sizes()) == [(32, 32)]


def test_a_set_that_cannot_be_written_has_its_columns_in_the_cache(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(set_store, "probe_storage", lambda url: {"error": "read-only"})
    done = run("measure", photos, "--json")
    table = Path(json.loads(done.stdout)["table"])
    assert table.is_relative_to(tmp_path / "machine") and "read-only" in done.stderr
    assert pq.read_table(table).num_rows == 2 and not (photos / ".dreamfleet").exists()
    assert used(photos, where="blur > 100", cache_dir=str(tmp_path / "cache")) == {"sharp.png"}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["blur", "faces", "faces"], "'faces' is measured twice"),
        (["caption"], "'caption': every set has"),
        (["aspect"], "'aspect': every set has"),
        (["a-b"], "letters"),
    ],
)
def test_names_of_columns_are_unique(names: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        refuse_names(names)


def test_two_models_of_one_name_are_refused(photos: Path, tmp_path: Path) -> None:
    one, two = f"a={tmp_path / 'x'}:dog", f"a={tmp_path / 'y'}:cat"
    done = run("measure", photos, "--classifier", one, "--detector", two)
    assert done.exit_code == 2 and "measured twice" in done.stderr
    done = run("measure", photos, "--classifier", f"blur={tmp_path / 'x'}")
    assert done.exit_code == 2 and "measured twice" in done.stderr
    done = run(
        "caption", photos, "--in-place", "--model", tmp_path / "a/blip", "--model", tmp_path / "b/blip"
    )
    assert done.exit_code == 2 and "two models are named blip" in done.stderr
