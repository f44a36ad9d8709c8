"""Test that sets of every kind, on disk and in a bucket, are inspected, prepared, edited and trained alike."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from servers import S3Server
from servers import s3_server as s3_server
from source_sets import COUNT, WRITERS, photos, write_sources
from typer.testing import CliRunner

from dreamfleet.cluster.cli import program
from dreamfleet.datasets.config import DataConfig
from dreamfleet.datasets.index.edits import Edit, EditTable, edit_name
from dreamfleet.datasets.index.sets import load_sets
from dreamfleet.datasets.index.sources import read_image_file

PLACES = ("disk", "bucket")


@pytest.fixture(scope="module")
def sets(
    s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, dict[str, str]]]:
    """The addresses of a set of each kind, by place and kind."""
    with pytest.MonkeyPatch.context() as patch:
        s3_server.set_environment(patch)
        patch.setenv("DREAMFLEET_CACHE", str(tmp_path_factory.mktemp("cache")))
        places = {"disk": str(tmp_path_factory.mktemp("sets")), "bucket": s3_server.new_folder()}
        yield {name: write_sources(place) for name, place in places.items()}


def run(*words: Any) -> Any:
    done = CliRunner().invoke(program.app, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def captions(data: DataConfig) -> list[str]:
    return sorted(str(row.caption) for row in load_sets(data).instances.rows())


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", WRITERS)
def test_a_set_is_inspected_prepared_measured_and_edited(
    sets: dict[str, dict[str, str]], kind: str, place: str, tmp_path: Path
) -> None:
    url, expected = sets[place][kind], photos(list(WRITERS).index(kind))
    found = run("data", "inspect", url, "--resolution", 32, "--json")
    assert (found["pictures"], found["captioned"], found["bad"]) == (COUNT, COUNT, {})
    assert (found["width"], found["height"]) == ([48] * 3, [40] * 3)
    made = run("data", "prepare", url, tmp_path / "out", "--size", 16, "--workers", 1, "--json")
    assert len(made["pictures"]) == COUNT
    texts = {path.read_text().strip() for path in (tmp_path / "out").rglob("*.txt")}
    assert texts == {caption for _, caption in expected.values()}
    measured = run("data", "measure", url, "--json")
    assert measured["new"] == COUNT and f"{os.sep}.dreamfleet{os.sep}" in measured["table"]
    least = measured["columns"]["blur"]["0%"]
    data = DataConfig(instance_data_dir=url, resolution=32, where=f"blur > {least}")
    assert len(load_sets(data).instances) == COUNT - 1
    whole = data.model_copy(update={"where": None})
    uris = [row.uri for row in load_sets(whole).instances.rows()]
    table = EditTable(url)
    edits = [
        Edit(excluded=True),
        Edit(width=48, height=40, crop=(0.0, 0.0, 0.5, 0.5)),
        Edit(caption="by hand"),
    ]
    table.save({edit_name(uri, url): edit for uri, edit in zip(uris, edits, strict=True)})
    rows = load_sets(whole).instances.rows()
    assert sorted((row.width, row.height) for row in rows) == [(24, 20), (48, 40)]
    assert [row.caption for row in rows if row.width == 48] == ["by hand"]
    assert all(read_image_file(row.uri) for row in rows)
    table.save({edit_name(uri, url): Edit() for uri in uris})
    assert captions(whole) == sorted(caption for _, caption in expected.values())


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model."""
    folder = tmp_path_factory.mktemp("home")
    tiny.make_tiny_model(folder / "model")
    return folder


def write_recipe(home: Path, folder: Path, urls: list[str]) -> Path:
    tree = tiny.make_recipe(
        home,
        output_dir=str(folder / "run"),
        train__max_train_steps=2,
        train__train_batch_size=len(urls) * COUNT,
        method={"name": "textual_inversion", "placeholder_token": "<cat>", "initializer_token": "cat"},
        data={"sets": [{"source": url, "prompt": "a photo"} for url in urls], "resolution": tiny.RESOLUTION},
    )
    return tiny.write_recipe(folder / "recipe.yaml", tree)


@pytest.mark.parametrize("place", PLACES)
def test_one_run_trains_on_sets_of_every_kind(
    sets: dict[str, dict[str, str]], home: Path, place: str, tmp_path: Path
) -> None:
    """A batch holds as many images as all sets together, so that each is trained once in both of the steps."""
    recipe = write_recipe(home, tmp_path, [*sets[place].values()])
    run("train", recipe, "--json")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == 2 and summary["images_seen"] == 2 * len(WRITERS) * COUNT


def test_a_streamed_set_without_ray_names_the_remedy(
    sets: dict[str, dict[str, str]], home: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(home, tmp_path, [sets["disk"]["tar"]])
    done = CliRunner().invoke(program.app, ["train", str(recipe), "data.source=stream"])
    assert done.exit_code == 2 and "scaling.num_workers: 0" in done.stderr
