"""Test a fleet whose table, images and folder are in a bucket."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
from servers import S3Server, s3_server

from dreamfleet.datasets.errors import RecipeError
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.tune.fleet.fleet import fleet
from dreamfleet.tune.fleet.records import Records

__all__ = ["s3_server"]


@pytest.mark.s3
def test_a_fleet_in_a_bucket_resumes(
    tmp_path: Path, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3_server.set_environment(monkeypatch)
    bucket = Storage(s3_server.new_folder())
    for number in range(2):
        bucket.upload(tiny.make_images(tmp_path / f"s{number}", 2, seed=number), f"images/s{number}")
    tree = tiny.make_recipe(
        tmp_path,
        method__lora_rank=2,
        train__max_train_steps=1,
        train__checkpointing_steps=1,
        output_dir=bucket.path("fleet"),
    )
    del tree["data"]["instance_data_dir"]
    recipe = tiny.write_recipe(tmp_path / "recipe.yaml", tree)
    table = 'name,images\na,images/s0\nA,"[images/s0/000.png, images/s1/001.png]"\n'
    bucket.write_text("table.csv", f"{table}x,images/none\ny,images/s0/nine.png\n")
    with pytest.raises(RecipeError) as caught:
        fleet(bucket.path("table.csv"), recipe)
    assert "row 4: images" in str(caught.value) and "nine.png does not exist" in str(caught.value)
    bucket.write_text("table.csv", table)
    result = fleet(bucket.path("table.csv"), recipe, overrides=["fleet.max_subjects=1"])
    assert (result.exit_reason, result.completed) == ("limit", 1)
    assert not bucket.exists("fleet/subjects/a/checkpoints")
    result = fleet(bucket.path("table.csv"), recipe, resume=True)
    assert [row.status for row in result.rows] == ["completed", "completed"]
    assert [line["name"] for line in Records(bucket.child("fleet"))] == ["a", "A"]
    assert bucket.exists("fleet/index.html") and bucket.exists(f"fleet/{result.rows[1].artifacts[0]}")
