"""Test that a fleet generates the images of a class once."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from dreamfleet.tune.fleet.class_images import ClassLeaders, share_class_images

TREE: dict[str, Any] = {
    "method": {
        "with_prior_preservation": True,
        "num_class_images": 4,
        "prior_generation_steps": 2,
        "prior_generation_guidance": 3.0,
    },
    "model": {"name": "m"},
    "data": {"class_prompt": "a Cat!", "resolution": 64, "class_data_dir": None, "cache_dir": None},
    "train": {"seed": 0},
}


def folder_of(**changes: Any) -> str | None:
    tree = copy.deepcopy(TREE)
    for path, value in changes.items():
        section, _, key = path.partition("__")
        tree[section][key] = value
    name = share_class_images(tree, "/fleet")
    return None if name is None else tree["data"]["class_data_dir"]


def test_what_shapes_the_images_names_their_folder() -> None:
    folder = folder_of()
    assert folder is not None and folder.startswith("/fleet/classes/a-cat-")
    assert folder_of(train__seed=1) == folder_of(method__num_class_images=9) == folder
    for changes in (
        {"data__class_prompt": "a dog"},
        {"data__resolution": 32},
        {"model__name": "n"},
        {"method__prior_generation_steps": 3},
    ):
        assert folder_of(**changes) != folder
    assert folder_of(data__class_data_dir="/own") == "/own"
    assert folder_of(method__with_prior_preservation=False) is None
    assert folder_of(data__class_prompt=None) is None


def test_others_wait_until_the_first_has_begun(tmp_path: Path) -> None:
    now = [0.0]
    leaders = ClassLeaders(clock=lambda: now[0])
    run = tmp_path / "one"
    run.mkdir()
    assert leaders.may_start("cat")
    leaders.start("cat", str(run))
    assert not leaders.may_start("cat") and leaders.may_start("dog")
    assert leaders.look() == []
    (run / "recipe.yaml").write_text("")
    assert leaders.look() == []  # asked too soon
    now[0] = 10.0
    assert leaders.look() == ["cat"]
    assert leaders.may_start("cat")


def test_another_follows_a_first_that_failed(tmp_path: Path) -> None:
    leaders = ClassLeaders()
    leaders.start("cat", str(tmp_path / "one"))
    assert not leaders.end("cat", str(tmp_path / "other"), completed=True)
    assert leaders.end("cat", str(tmp_path / "one"), completed=False)
    leaders.start("cat", str(tmp_path / "two"))
    assert not leaders.may_start("cat")
    assert leaders.end("cat", str(tmp_path / "two"), completed=True)
    assert leaders.may_start("cat")
