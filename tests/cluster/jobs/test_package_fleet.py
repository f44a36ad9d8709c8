"""Test the package of a fleet: on the cluster it is the same fleet, with the images that the table names."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import tiny

from dreamfleet.cluster.jobs.package_fleet import SUBJECTS_FILE, pack_fleet
from dreamfleet.cluster.jobs.submit import make_entrypoint
from dreamfleet.datasets.errors import RecipeError
from dreamfleet.tune.fleet.fleet import load_base
from dreamfleet.tune.fleet.read_subjects import read_subjects
from dreamfleet.tune.fleet.subjects import Subjects
from dreamfleet.tune.fleet.table import read_table


@pytest.fixture
def place(tmp_path: Path) -> Path:
    tree = tiny.make_recipe(tmp_path, output_dir="s3://bucket/fleet")
    del tree["data"]["instance_data_dir"]
    tiny.write_recipe(tmp_path / "recipe.yaml", tree)
    for name in ("a/images", "b/images", "shared/c", "held"):
        tiny.make_images(tmp_path / name, 3, captions=True)
    (tmp_path / "table.csv").write_text(
        "name,images,validation.holdout,train.seed\n"
        '\na,a/images,held,1\nb,b/images,,2\nc,shared/c,,\nd,"[a/images/001.png, b/images/002.png]",,\n'
    )
    return tmp_path


def unpack(place: Path, folder: Path, table: str = "table.csv") -> Subjects:
    package = pack_fleet(str(place / table), str(place / "recipe.yaml"), shared=[str(place / "shared")])
    folder.mkdir(parents=True)
    with zipfile.ZipFile(package.write(folder)) as archive:
        archive.extractall(folder)
    base, has_images = load_base(folder / "recipe.yaml")
    assert not has_images
    return read_subjects(read_table(str(folder / SUBJECTS_FILE)), base, has_images=has_images)[0]


def test_the_package_holds_the_table_and_its_images(place: Path, tmp_path: Path) -> None:
    job = tmp_path / "ray/_ray_pkg_0a1b"
    a, b, c, d = unpack(place, job)
    assert [one.row for one in (a, b, c, d)] == [3, 4, 5, 6]
    folders = [Path(one.values["data.instance_data_dir"]) for one in (a, b)]
    assert folders[0] != folders[1]
    assert all(
        sorted(path.name for path in folder.iterdir())[:2] == ["000.png", "000.txt"] for folder in folders
    )
    assert (job / a.values["validation.holdout"] / "000.png").exists() and a.values["train.seed"] == 1
    assert c.values["data.instance_data_dir"] == str(place / "shared/c")
    listed = d.values["data.instance_data_dir"]
    assert listed.count(str(job)) == 2 and "001.png" in listed
    assert len(list(job.glob("inputs/*/001.txt"))) >= 3  # the caption of a listed image
    assert make_entrypoint([f"fleet {SUBJECTS_FILE}", "--resume"]).endswith(
        f"fleet {SUBJECTS_FILE} recipe.yaml --resume"
    )


def test_rows_stay_equal_in_a_package_with_more_rows(place: Path, tmp_path: Path) -> None:
    before = {one.name: one.digest for one in unpack(place, tmp_path / "one/_ray_pkg_0a1b")}
    tiny.make_images(place / "0/images", 1)
    text = (place / "table.csv").read_text().replace("\na,", "\nnew,0/images,,\na,")
    (place / "more.csv").write_text(text)
    after = {one.name: one.digest for one in unpack(place, tmp_path / "two/_ray_pkg_9c9c", "more.csv")}
    assert after.items() >= before.items() and "new" in after


def test_what_cannot_run_is_not_sent(place: Path) -> None:
    (place / "table.csv").write_text("name,images\na,nowhere\nb,a/images\n")
    with pytest.raises(RecipeError, match="row 2: images"):
        pack_fleet(str(place / "table.csv"), str(place / "recipe.yaml"))
    (place / "table.csv").write_text("name,images\nb,a/images\n")
    with pytest.raises(RecipeError, match="MiB"):
        pack_fleet(str(place / "table.csv"), str(place / "recipe.yaml"), limit=100)
    with pytest.raises(RecipeError, match="output_dir"):
        pack_fleet(str(place / "table.csv"), str(place / "recipe.yaml"), ["output_dir=here"])
