"""Test the dataset files of kohya's scripts, OneTrainer, SimpleTuner and EveryDream2, and reported differences."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from image_files import image, put

from dreamfleet.datasets.config import Concept, DataConfig
from dreamfleet.datasets.errors import DataError
from dreamfleet.datasets.index.concepts import load_concepts
from dreamfleet.datasets.index.index import build_index
from dreamfleet.datasets.index.sets import load_sets
from dreamfleet.datasets.index.sources import ScanOptions, find_source


def concepts(file: Path, **data: Any) -> list[Concept]:
    return load_concepts(DataConfig.model_validate({"sets": [{"source": str(file)}], **data}))


KOHYA = """
[general]
shuffle_caption = true
[[datasets]]
resolution = 768
batch_size = 4
keep_tokens = 2
  [[datasets.subsets]]
  image_dir = "a"
  class_tokens = "sks girl"
  num_repeats = 5
  [[datasets.subsets]]
  image_dir = 'b'
  class_tokens = "zwx girl"
  keep_tokens = 3
  caption_dropout_rate = 0.25
  [[datasets.subsets]]
  is_reg = true
  image_dir = 'reg'
  class_tokens = 'girl'
"""
REG = "  [[datasets.subsets]]\n  is_reg = true\n  image_dir = 'x'\n  class_tokens = 'girl'\n"


def test_kohya_subsets_inherit_options_and_share_class_images(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = put(tmp_path, "d.toml", KOHYA)
    with caplog.at_level(logging.WARNING):
        first, second = concepts(file)
    assert (first.instance_data_dir, first.repeats, first.keep_tokens) == (str(tmp_path / "a"), 5, 2)
    assert (second.repeats, second.keep_tokens, second.caption_dropout) == (1, 3, 0.25)
    assert first.shuffle_tags and not first.recursive and first.instance_prompt == "sks girl"
    assert {one.class_data_dir for one in (first, second)} == {str(tmp_path / "reg")}
    assert "resolution: 768" in caplog.text and "batch_size: 4" in caplog.text
    caplog.clear()
    other = put(tmp_path, "e.toml", KOHYA.replace("batch_size = 4", ""))
    concepts(other, resolution=768)
    assert "resolution" not in caplog.text


def test_kohya_images_get_their_repeats_and_not_those_of_subfolders(tmp_path: Path) -> None:
    for name in ("a/1.png", "a/sub/2.png", "b/3.png"):
        put(tmp_path, name, image(len(name)))
    index = load_sets(DataConfig(train_data_dir=str(put(tmp_path, "d.toml", KOHYA)))).instances
    found = {Path(row.uri).name: row.repeats for row in index.rows()}
    assert found == {"1.png": 5, "3.png": 1}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("num_repeats = 5", "num_repeats = 0"), r"subsets\[0\].*repeats"),
        (("class_tokens = 'girl'", ""), "is_reg without class_tokens"),
        (('image_dir = "a"', ""), "image_dir"),
        (
            (
                "class_tokens = 'girl'",
                f"class_tokens = 'dog'\n{REG}",
            ),
            "match no set",
        ),
    ],
)
def test_invalid_kohya_files_name_the_subset(tmp_path: Path, change: tuple[str, str], reason: str) -> None:
    file = put(tmp_path, "d.toml", KOHYA.replace(*change))
    with pytest.raises(DataError, match=reason):
        concepts(file)


def test_onetrainer_concepts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = {
        "prompt_source": "filename",
        "enable_tag_shuffling": True,
        "tag_delimiter": ",",
        "keep_tags_count": 2,
    }
    put(tmp_path, "prompts.txt", "a photo of sks\nanother\n")
    entries = [
        {"name": "one", "path": "a", "balancing": 2.4, "image": {"enable_random_rotate": True}, "text": text},
        {
            "name": "two",
            "path": "b",
            "image": {},
            "text": {"prompt_source": "concept", "prompt_path": "prompts.txt"},
        },
        {"name": "off", "path": "c", "enabled": False, "image": {}, "text": {}},
        {"name": "held", "path": "d", "type": "VALIDATION", "image": {}, "text": {}},
    ]
    file = put(tmp_path, "concepts.json", json.dumps(entries))
    assert find_source(str(file)).name == "onetrainer"
    with caplog.at_level(logging.WARNING):
        one, two = concepts(file)
    assert (one.repeats, one.keep_tokens, one.caption_from_filename, one.use_captions) == (2, 2, True, False)
    assert two.instance_prompt == "a photo of sks" and two.use_captions is False
    for part in ("2.4", "enable_random_rotate", "VALIDATION", "2 prompts"):
        assert part in caplog.text


def test_simpletuner_backends_with_filters_and_without_secrets_in_logs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    entries: list[dict[str, Any]] = [
        {
            "id": "l", "type": "local", "instance_data_dir": "a", "repeats": 4, "resolution": 1024,
            "resolution_type": "pixel", "minimum_image_size": 512, "maximum_aspect_ratio": 2.0,
            "caption_strategy": "instanceprompt", "instance_prompt": "cats", "some_token": "SECRET",
        },
        {"id": "t", "type": "local", "dataset_type": "text_embeds"},
        {"id": "s", "type": "aws", "aws_bucket_name": "b", "aws_data_prefix": "x/", "caption_strategy": "textfile",
         "aws_secret_access_key": "SECRET"},
    ]  # fmt: skip
    file = put(tmp_path, "backends.json", json.dumps(entries))
    assert find_source(str(file)).name == "simpletuner"
    with caplog.at_level(logging.WARNING):
        local, bucket = concepts(file)
    assert local.repeats == 5 and local.where == "shorter_side >= 512 and aspect <= 2.0"
    assert local.instance_prompt == "cats" and bucket.instance_data_dir == "s3://b/x"
    assert "some_token" in caplog.text and "1024" in caplog.text and "SECRET" not in caplog.text
    put(tmp_path, "backends.json", json.dumps([{**entries[0], "type": "huggingface"}]))
    with pytest.raises(DataError, match="huggingface"):
        concepts(file)


def test_a_dataset_file_as_one_plain_source_keeps_column_and_condition(tmp_path: Path) -> None:
    for name, side in (("a/small.png", 20), ("a/large.png", 60), ("b/other.png", 20)):
        put(tmp_path, name, image(side, size=(side, side)))
    lines = [{"file_name": name, "text": "no", "words": f"of {name}"} for name in ("small.png", "large.png")]
    put(tmp_path, "a/metadata.jsonl", "\n".join(json.dumps(line) for line in lines))
    entries = [
        {"id": "a", "type": "local", "instance_data_dir": "a", "resolution_type": "pixel",
         "minimum_image_size": 50, "caption_strategy": "textfile"},
        {"id": "b", "type": "local", "instance_data_dir": "b", "caption_strategy": "textfile"},
    ]  # fmt: skip
    file = put(tmp_path, "backends.json", json.dumps(entries))
    rows = build_index(str(file), ScanOptions(caption_column="words"))
    assert {Path(row.uri).name: row.caption for row in rows.rows()} == {
        "large.png": "of large.png",
        "other.png": None,
    }
    assert [(one.place, one.files) for one in rows.skipped] == [(str(tmp_path / "a"), 1)]
    data = DataConfig.model_validate({"sets": [{"source": str(file), "where": "aspect < 2"}]})
    assert [one.where for one in load_concepts(data)] == [
        "(aspect < 2) and (shorter_side >= 50)",
        "aspect < 2",
    ]
    assert len(load_sets(data).instances) == 2


def test_everydream_folders_with_yaml_captions(tmp_path: Path) -> None:
    put(tmp_path, "global.yaml", "multiply: 3\ncond_dropout: 0.1\n")
    put(tmp_path, "sub/local.yaml", "multiply: 2\n")
    for number, name in enumerate(("a red cat_1.png", "sub/x.png", "sub/y.png", "sub/z.png")):
        put(tmp_path, name, image(number))
    put(
        tmp_path,
        "sub/x.yaml",
        "main_prompt: [a cat, a dog]\ntags: [{tag: b, weight: 0.2}, {tag: a, weight: 2}]\n",
    )
    put(tmp_path, "sub/y.txt", "from text")
    put(tmp_path, "sub/z.yaml", "tags: {a: [")
    assert find_source(str(tmp_path)).name == "everydream"
    sets = load_sets(DataConfig(train_data_dir=str(tmp_path)))
    found = {Path(row.uri).name: (row.caption, row.repeats) for row in sets.instances.rows()}
    assert found == {
        "a red cat_1.png": ("a red cat", 3),
        "x.png": ("a cat, a, b\na dog, a, b", 2),
        "y.png": ("from text", 2),
    }
    assert {one.caption_dropout for one in sets.concepts} == {0.1}
    assert "not YAML" in sets.instances.bad[0].reason


def test_an_unrelated_json_file_is_no_dataset(tmp_path: Path) -> None:
    file = put(
        tmp_path, "concepts_list.json", json.dumps([{"instance_data_dir": "a", "instance_prompt": "x"}])
    )
    assert find_source(str(file)).name == "folder"
    assert load_concepts(DataConfig(concepts_list=str(file)))[0].instance_data_dir == str(tmp_path / "a")
