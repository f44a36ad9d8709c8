"""Test `data caption` with a tiny ONNX model in the WD tagger's format: its input, and written captions."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny_tagger import SIDE, TAGS, write_tagger
from typer.testing import CliRunner

from dreamfleet.cluster.cli import program
from dreamfleet.datasets.errors import DataError, ModelError
from dreamfleet.datasets.tools.caption_set import caption_set
from dreamfleet.datasets.tools.captions import Composition
from dreamfleet.trainers.models.vision.wd_tagger import (
    Tag,
    Tagger,
    Tagging,
    choose_tags,
    read_tags,
    square_of,
    tagger_of,
)


def run(*words: Any) -> Any:
    return CliRunner().invoke(program.app, ["data", "caption", *(str(word) for word in words)])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tagger(tmp_path_factory.mktemp("tagger") / "wd")


def write_set(folder: Path) -> Path:
    folder.mkdir()
    for name, colour in (("blue", (0, 0, 255)), ("red", (255, 0, 0)), ("yellow", (200, 200, 0))):
        Image.new("RGB", (SIDE, SIDE), colour).save(folder / f"{name}.png")
    return folder


def test_images_are_padded_to_a_white_square_in_bgr() -> None:
    square = square_of(Image.new("RGB", (8, 4), (10, 20, 30)), SIDE)  # smaller than the side, so not enlarged
    assert square.shape == (SIDE, SIDE, 3) and square.dtype == np.float32
    assert square[8, 8].tolist() == [30, 20, 10] and square[0, 0].tolist() == [255, 255, 255]
    assert (square[:, :, 0] == 30).sum() == 32
    wide = square_of(Image.new("RGB", (64, 32)), SIDE)
    assert (wide[:, :, 0] == 0).sum() == SIDE * SIDE // 2


@pytest.mark.parametrize("batch", ["N", 1])
def test_outputs_are_used_as_probabilities(tmp_path: Path, batch: int | str) -> None:
    tagger = Tagger(str(write_tagger(tmp_path / "wd", batch=batch) / "model.onnx"))
    images = [Image.new("RGB", (32, 32), colour) for colour in ((255, 0, 51), (0, 102, 0))]
    found = tagger.probabilities(images)
    assert np.allclose(found, [[0, 1, 0.2, 0, 1, 1], [0.4, 0, 0, 0.4, 0, 0]], atol=1e-6)


# Models: names of input and output and batch axis, as tf2onnx (version 2) and torch (version 3) export them, and the
# header of selected_tags.csv. The input of all is [batch, 448, 448, 3], float32, BGR, 0 to 255; here it is smaller.
VERSIONS = {
    "wd-v1-4-vit-tagger-v2": ("input_1:0", "predictions_sigmoid", "unk__1", "tag_id,name,category,count"),
    "wd-v1-4-convnext-tagger-v2": (
        "input_1:0",
        "predictions_sigmoid",
        "unk__1",
        "tag_id,name,category,count",
    ),
    "wd-v1-4-convnextv2-tagger-v2": (
        "input_1:0",
        "predictions_sigmoid",
        "unk__1",
        "tag_id,name,category,count",
    ),
    "wd-v1-4-swinv2-tagger-v2": ("input_1:0", "predictions_sigmoid", 1, "tag_id,name,category,count"),
    "wd-v1-4-moat-tagger-v2": ("input_1:0", "predictions_sigmoid", "unk__1", "tag_id,name,category,count"),
    "wd-vit-tagger-v3": ("input", "output", "batch_size", "tag_id,name,category,count"),
    "wd-vit-large-tagger-v3": ("input", "output", "batch_size", "tag_id,name,category,count"),
    "wd-convnext-tagger-v3": ("input", "output", "batch_size", "tag_id,name,category,count"),
    "wd-swinv2-tagger-v3": ("input", "output", "batch_size", "tag_id,name,category,count"),
    "wd-eva02-large-tagger-v3": ("input", "output", "batch_size", "tag_id,name,category,count"),
    "wd-v1-4-vit-tagger": ("input_1:0", "predictions_sigmoid", None, "tag_id,name,category"),
}


@pytest.mark.parametrize("name", VERSIONS)
def test_every_version_has_the_same_contract(tmp_path: Path, name: str) -> None:
    given, made, batch, header = VERSIONS[name]
    folder = write_tagger(tmp_path / name, batch=batch, ends=(given, made), header=header)
    tagger = Tagger(str(folder))
    assert tagger.side == SIDE and [tag.category for tag in tagger.tags] == [row[1] for row in TAGS]
    images = [Image.new("RGB", (40, 30), colour) for colour in ((255, 0, 0), (0, 0, 255), (0, 255, 0))]
    tags = tagger_of(str(folder), Tagging(general_threshold=0.7))(images)
    # 30 of 40 rows are the image, the rest is white: a pure colour has 1, other channels a quarter.
    assert tags == ["hero (show), red hat", "blue sky", ">_<"]


@pytest.mark.parametrize(
    ("how", "tags"),
    [
        ({}, ["red hat", "blue sky"]),
        ({"character_threshold": 0.7}, ["red hat", "hero (show)", "blue sky"]),
        ({"general_threshold": 0.3, "sort": True}, [">_<", "blue sky", "red hat"]),
        ({"exclude": ("red_hat",), "spaces": False}, ["blue_sky"]),
        ({"exclude": ("red hat",)}, ["red hat", "blue sky"]),  # names as in the model
        ({"rating": True}, ["general", "red hat", "blue sky"]),
        ({"add": ("hero_(show)",), "escape": True}, [r"hero \(show\)", "red hat", "blue sky"]),
        ({"confidence": True}, ["(red hat:0.800)", "(blue sky:0.500)"]),
    ],
)
def test_selection_and_format_of_tags(how: dict[str, Any], tags: list[str]) -> None:
    probabilities = np.array([0.9, 0.1, 0.5, 0.3, 0.75, 0.8], dtype=np.float32)
    names = [Tag(name, category) for name, category, _ in TAGS]
    assert choose_tags(probabilities, names, Tagging(**how)) == tags


def test_tag_lists_without_categories_start_with_ratings() -> None:
    found = read_tags(b"tag_id,name\n1,a\n2,b\n3,c\n4,d\n5,e\n", uri="x")
    assert [tag.category for tag in found] == [9, 9, 9, 9, 0]


def test_captions_are_written_and_a_second_run_continues(model: Path, tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set")
    (folder / "red.txt").write_text("mine")
    (folder / "broken.png").write_bytes(b"x")
    first = run(folder, "--tagger", model, "--in-place", "--json", "--batch-size", 2)
    assert first.exit_code == 0, first.output
    answer = json.loads(first.stdout)
    assert (
        answer["captions"] == {"blue.png": "blue sky", "yellow.png": ">_<, red hat"}
        and answer["skipped"] == 1
    )
    assert list(answer["failed"]) == ["broken.png"]
    assert (folder / "blue.txt").read_text() == "blue sky\n" and (folder / "red.txt").read_text() == "mine"
    (folder / "blue.txt").unlink()
    (folder / "broken.png").unlink()
    again = json.loads(run(folder, "--tagger", model, "--in-place", "--json").stdout)
    assert list(again["captions"]) == ["blue.png"] and again["skipped"] == 2


@pytest.mark.parametrize(
    ("existing", "text"), [("replace", "red hat"), ("append", "mine, red hat"), ("prepend", "red hat, mine")]
)
def test_existing_captions(model: Path, tmp_path: Path, existing: str, text: str) -> None:
    folder = write_set(tmp_path / "set")
    (folder / "red.txt").write_text("mine")
    makers = {"wd": functools.partial(tagger_of, str(model), Tagging(exclude=("hero_(show)",)))}
    made = caption_set(str(folder), makers, Composition(("wd",), frozenset({"wd"}), existing=existing))
    assert (folder / "red.txt").read_text() == text + "\n" and (
        folder / "blue.txt"
    ).read_text() == "blue sky\n"
    assert made.backup is not None and (Path(made.backup) / "red.txt").read_text() == "mine"


def test_captions_are_written_to_another_folder(model: Path, tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set")
    assert run(folder, "--tagger", model, "--out", tmp_path / "out").exit_code == 0
    assert not list(folder.glob("*.txt")) and (tmp_path / "out" / "blue.txt").read_text() == "blue sky\n"


def test_a_model_that_is_not_a_tagger_is_an_error(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_set(tmp_path / "set")
    assert "--in-place" in run(folder, "--tagger", model).stderr
    result = run(folder, "--tagger", folder, "--in-place")
    assert result.exit_code == 2 and "model.onnx" in result.stderr
    with pytest.raises(ModelError, match="2 tags"):
        Tagger(str(write_tagger(tmp_path / "short", names=2)))
    (tmp_path / "short" / "model.onnx").write_bytes(b"x")
    with pytest.raises(ModelError, match="ONNX"):
        Tagger(str(tmp_path / "short"))
    with pytest.raises(DataError, match="existing"):
        Composition(("wd",), existing="keep")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ModelError, match=r"dreamfleet\[tag\]"):
        Tagger(str(model))
