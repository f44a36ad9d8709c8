"""Tests that a path field needs no code besides its annotation, also in a method of another package."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import pytest
import tiny
from pydantic import Field

from dreamfleet.cluster.jobs.package import pack
from dreamfleet.datasets.config_base import Section
from dreamfleet.datasets.errors import RecipeError
from dreamfleet.datasets.path_field import PathField, by_key
from dreamfleet.trainers.config.method import METHODS, MethodConfig
from dreamfleet.trainers.config.model import HUB_MODEL
from dreamfleet.trainers.driver.preflight import check_inputs
from dreamfleet.trainers.driver.shared_paths import shared_paths
from dreamfleet.trainers.recipe import Recipe, load_recipe


class Source(Section):
    """A section nested in the method's section."""

    notes: Annotated[str, PathField("file")]


class ToyConfig(MethodConfig):
    """A method with every form of path field."""

    implementation: ClassVar[str] = "nowhere:Toy"  # not imported
    summary: ClassVar[str] = "Trains nothing."
    artifacts: ClassVar[tuple[str, ...]] = ("embedding",)
    name: Literal["toy"] = "toy"
    words: Annotated[str | None, PathField("file", names=("builtin",))] = "builtin"
    teacher: Annotated[str, HUB_MODEL] | None = None
    sources: list[Source] = Field([])
    extra: list[Annotated[str, PathField("file")]] = Field([])
    scratch: Annotated[
        str | None, PathField("folder", must_exist=False, per_machine=True, compared=False)
    ] = None
    start: Annotated[str | None, PathField("file", is_start=True)] = None
    title: str = "/not a path"


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    METHODS.register("toy")(ToyConfig)
    yield
    METHODS.unregister("toy")


def toy_recipe(folder: Path, **method: object) -> Recipe:
    tree = tiny.make_recipe(folder, method={"name": "toy", **method})
    return load_recipe(tiny.write_recipe(folder / "recipe.yaml", tree))


def test_paths_are_relative_to_the_recipe_and_hub_names_are_unchanged(tmp_path: Path) -> None:
    (tmp_path / "local-model").mkdir()
    given = {
        "sources": [{"notes": "a.txt"}],
        "extra": ["../b.txt", "s3://bucket/c.txt"],
        "scratch": "/scratch",
    }
    method = toy_recipe(tmp_path, teacher="owner/model", **given).method
    assert isinstance(method, ToyConfig)
    assert (method.words, method.teacher, method.title) == ("builtin", "owner/model", "/not a path")
    assert method.sources == [Source(notes=f"{tmp_path}/a.txt")]
    assert method.extra == [f"{tmp_path.parent}/b.txt", "s3://bucket/c.txt"]
    for name in ("local-model", "./other", "weights.safetensors"):
        local = toy_recipe(tmp_path, teacher=name, words="w.txt").method
        assert isinstance(local, ToyConfig)
        assert local.teacher == str(tmp_path / name) and local.words == str(tmp_path / "w.txt")


def test_a_missing_file_is_reported_with_its_key_before_workers_start(tmp_path: Path) -> None:
    recipe = toy_recipe(tmp_path, sources=[{"notes": "absent.txt"}])
    with pytest.raises(RecipeError, match=r"method\.sources\.notes: .*absent\.txt"):
        check_inputs(recipe)
    (tmp_path / "absent.txt").touch()
    check_inputs(recipe)
    continued = toy_recipe(tmp_path, start="gone.pt")
    check_inputs(continued, begun=True)
    with pytest.raises(RecipeError, match=r"method\.start"):
        check_inputs(continued)


def test_a_path_is_checked_on_machines_and_ranks(tmp_path: Path) -> None:
    recipe = toy_recipe(tmp_path, extra=["a.txt", "b.txt"], scratch="/scratch")
    wanted = [str(tmp_path / name) for name in ("a.txt", "b.txt")]
    assert shared_paths(recipe)["method.extra"] == wanted
    assert by_key(named for named in recipe.paths if named.field.compared)["method.extra"] == wanted
    assert "method.scratch" not in shared_paths(recipe)


def test_a_submitted_job_packages_the_file(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("a.txt", "deep/a.txt"):
        (tmp_path / name).write_text(name)
    recipe = toy_recipe(
        tmp_path, sources=[{"notes": "a.txt"}], extra=["deep/a.txt"], scratch="/scratch", start="gone.pt"
    )
    packed = pack(recipe.model_copy(update={"output_dir": "s3://bucket/run"}), resume=True)
    method = packed.recipe.method
    assert isinstance(method, ToyConfig)
    assert method.sources == [Source(notes="./inputs/a.txt")] and method.extra == ["./inputs/2-a.txt"]
    assert packed.files["inputs/a.txt"] == str(tmp_path / "a.txt")
    assert packed.files["inputs/2-a.txt"] == str(tmp_path / "deep" / "a.txt")
    assert (method.scratch, method.start) == ("/scratch", str(tmp_path / "gone.pt"))
    with pytest.raises(RecipeError, match=r"method\.start"):
        pack(recipe.model_copy(update={"output_dir": "s3://bucket/run"}))
