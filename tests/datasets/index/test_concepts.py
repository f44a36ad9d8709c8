"""Test the `data:` section, its aliases from other projects, and the folder layouts it describes."""

import json
from pathlib import Path

import pytest
from image_files import image, put
from pydantic import ValidationError

from dreamfleet.datasets.config import Concept, DataConfig
from dreamfleet.datasets.errors import DataError
from dreamfleet.datasets.index.concepts import load_concepts
from dreamfleet.datasets.index.sets import ClassSet, load_sets
from dreamfleet.datasets.path_field import resolve_paths


@pytest.mark.parametrize(
    ("given", "field", "value"),
    [
        ({"image_dir": "a"}, "instance_data_dir", "a"),
        ({"instance_data_dir": "a", "class_tokens": "sks dog"}, "instance_prompt", "sks dog"),
        ({"train_data_dir": "a", "reg_data_dir": "b"}, "class_data_dir", "b"),
        ({"image_dir": "a", "shuffle_caption": True}, "shuffle_tags", True),
        ({"image_dir": "a", "keep_tokens": 2}, "keep_tokens", 2),
        ({"image_dir": "a", "caption_dropout_rate": 0.1}, "caption_dropout", 0.1),
        ({"image_dir": "a", "proportion_empty_prompts": 0.1}, "caption_dropout", 0.1),
        ({"image_dir": "a", "caption_tag_dropout_rate": 0.2}, "tag_dropout", 0.2),
        ({"image_dir": "a", "caption_extension": ".cap"}, "caption_extension", [".cap"]),
        ({"image_dir": "a", "caption_extension": [".a", ".b"]}, "caption_extension", [".a", ".b"]),
        ({"image_dir": "a", "flip_aug": True}, "random_flip", True),
        ({"image_dir": "a", "num_repeats": 10}, "repeats", 10),
        ({"image_dir": "a", "latent_sampling_method": "once"}, "latent_sampling", "once"),
    ],
)
def test_names_of_other_projects_are_accepted(given, field, value):
    assert getattr(DataConfig(**given), field) == value


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "exactly one of instance_data_dir"),
        (
            {"instance_data_dir": "a", "train_data_dir": "b"},
            "instance_data_dir and train_data_dir",
        ),
        ({"instance_data_dir": "a", "class_data_dir": "b"}, "class_data_dir 'b' without class_prompt"),
        ({"concepts_list": []}, "concepts_list"),
        ({"concepts_list": "x.json", "instance_prompt": "p"}, "instance_prompt together with concepts_list"),
        (
            {"instance_data_dir": "a", "caption_extension": "txt"},
            "caption_extension 'txt'",
        ),
        ({"instance_data_dir": "a", "caption_extension": []}, "caption_extension"),
        ({"instance_data_dir": "a", "resolution": "large"}, "valid integer"),
        ({"instance_data_dir": "a", "resolution": 0}, "greater than or equal to 8"),
        ({"instance_data_dir": "a", "tag_dropout": 1.5}, "less than or equal to 1"),
        ({"instance_data_dir": "a", "tag_dropout": float("nan")}, "finite number"),
        ({"instance_data_dir": "a", "repeats": 0}, "greater than or equal to 1"),
        ({"instance_data_dir": "a", "latent_sampling": "never"}, "'random', 'once' or 'deterministic'"),
        ({"instance_data_dir": "a", "instance_dir": "b"}, "Extra inputs are not permitted"),
        ({"concepts_list": [{"instance_data_dir": "a", "class_data_dir": "b"}]}, "without class_prompt"),
    ],
)
def test_bad_sections_are_refused(given, message):
    with pytest.raises(ValidationError) as caught:
        DataConfig(**given)
    assert message in str(caught.value)


def test_section_is_frozen_and_keeps_its_values():
    config = DataConfig(instance_data_dir="a", resolution=64, caption_extension=[".txt"])
    with pytest.raises(ValidationError):
        config.resolution = 65
    assert DataConfig(**config.model_dump()) == config
    assert DataConfig.model_validate_json(config.model_dump_json()) == config


def test_paths_start_at_the_recipe(tmp_path):
    config = DataConfig(concepts_list=[{"instance_data_dir": "cat"}, {"instance_data_dir": "s3://b/dog"}])
    made = resolve_paths(config, str(tmp_path))
    assert [concept.instance_data_dir for concept in made.concepts_list] == [f"{tmp_path}/cat", "s3://b/dog"]
    config = DataConfig(instance_data_dir="../cat", class_data_dir="/abs", class_prompt="c")
    made = resolve_paths(config, "/recipes/here")
    assert (made.instance_data_dir, made.class_data_dir) == ("/recipes/cat", "/abs")
    assert resolve_paths(DataConfig(instance_data_dir="cat"), "s3://b/r").instance_data_dir == "s3://b/r/cat"
    assert resolve_paths(DataConfig(concepts_list="c.json"), "/r").concepts_list == "/r/c.json"


def test_a_section_with_one_subject(tmp_path):
    for seed in range(3):
        put(tmp_path, f"{seed}.png", image(seed))
    put(tmp_path, "1.txt", "its own words")
    put(tmp_path, "class/other.png", image(9))  # class images inside the folder are not subject images
    sets = load_sets(
        DataConfig(
            instance_data_dir=str(tmp_path),
            instance_prompt="sks cat",
            class_data_dir=str(tmp_path / "class"),
            class_prompt="cat",
            repeats=2,
        )
    )
    assert len(sets.instances) == 3
    assert sets.instances.column("repeats") == [2, 2, 2]
    assert sorted(filter(None, sets.instances.column("caption"))) == ["its own words"]
    assert sets.class_sets == [ClassSet(0, str(tmp_path / "class"), "cat")]
    assert sets.concepts[0].instance_prompt == "sks cat"


def test_without_a_class_prompt_there_is_no_class_set(tmp_path):
    put(tmp_path, "a.png", image(0))
    assert load_sets(DataConfig(instance_data_dir=str(tmp_path))).class_sets == []
    with_prompt = DataConfig(instance_data_dir=str(tmp_path), class_prompt="cat")
    assert load_sets(with_prompt).class_sets == [ClassSet(0, None, "cat")]


def test_concepts_inline_and_from_a_file(tmp_path):
    put(tmp_path, "cat/a.png", image(0))
    put(tmp_path, "dog/a.png", image(0))
    put(tmp_path, "dog/b.png", image(1))
    entries = [
        {"instance_data_dir": "cat", "instance_prompt": "sks cat", "class_prompt": "cat"},
        {
            "instance_data_dir": "dog",
            "instance_prompt": "zwx dog",
            "class_prompt": "dog",
            "class_data_dir": "dogs",
        },
    ]
    path = put(tmp_path, "concepts_list.json", json.dumps(entries))
    inline = resolve_paths(DataConfig(concepts_list=entries), str(tmp_path))
    for config in (inline, DataConfig(concepts_list=str(path))):
        sets = load_sets(config)
        assert [concept.instance_prompt for concept in sets.concepts] == ["sks cat", "zwx dog"]
        assert sorted(sets.instances.column("concept")) == [0, 1, 1]
        assert len(set(sets.instances.column("id"))) == 3
        assert sets.class_sets == [ClassSet(0, None, "cat"), ClassSet(1, str(tmp_path / "dogs"), "dog")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", r"c\.json, line 1, column 2: .*JSON"),
        ("{}", "list of objects"),
        ("[]", "list of objects"),
        ('[{"instance_prompt": "x"}]', r"concept 0: instance_data_dir: Field required"),
        ('[{"instance_data_dir": "x", "prompt": "y"}]', r"concept 0: prompt: Extra inputs"),
        (b"\xff[]", "not UTF-8"),
    ],
)
def test_bad_concepts_file(tmp_path, text, message):
    path = put(tmp_path, "c.json", text)
    with pytest.raises(DataError, match=message):
        load_concepts(DataConfig(concepts_list=str(path)))
    with pytest.raises(DataError, match="does not exist"):
        load_concepts(DataConfig(concepts_list=str(tmp_path / "none.json")))


def kohya(tmp_path: Path, *names: str) -> str:
    for seed, name in enumerate(names):
        put(tmp_path / "train", f"{name}/a.png", image(seed))
    return str(tmp_path / "train")


def test_kohya_folders(tmp_path, caplog):
    train = kohya(tmp_path, "10_sks dog", "3_zwx tabby cat", "logs")
    put(tmp_path, "reg/1_dog/r.png", image(7))
    put(tmp_path, "reg/1_cat/r.png", image(8))
    put(tmp_path, "train/10_sks dog/a.txt", "sks dog on a sofa")
    sets = load_sets(DataConfig(train_data_dir=train, reg_data_dir=str(tmp_path / "reg"), repeats=2))
    assert sets.concepts == [
        Concept(
            instance_data_dir=f"{train}/10_sks dog",
            instance_prompt="sks dog",
            class_data_dir=f"{tmp_path}/reg/1_dog",
            class_prompt="dog",
            repeats=10,
        ),
        Concept(
            instance_data_dir=f"{train}/3_zwx tabby cat",
            instance_prompt="zwx tabby cat",
            class_data_dir=f"{tmp_path}/reg/1_cat",
            class_prompt="cat",
            repeats=3,
        ),
    ]
    rows = {row.concept: row for row in sets.instances.rows()}
    assert (rows[0].repeats, rows[1].repeats) == (20, 6)
    assert (rows[0].caption, rows[1].caption) == ("sks dog on a sofa", None)
    assert [(item.concept, item.prompt) for item in sets.class_sets] == [(0, "dog"), (1, "cat")]
    assert "left out: logs" in caplog.text


def test_kohya_class_images_without_subfolders(tmp_path):
    train = kohya(tmp_path, "10_sks dog")
    put(tmp_path, "reg/r.png", image(7))
    given = {"train_data_dir": train, "class_data_dir": str(tmp_path / "reg")}
    assert load_sets(DataConfig(class_prompt="dog", **given)).class_sets == [
        ClassSet(0, str(tmp_path / "reg"), "dog")
    ]
    with pytest.raises(DataError, match=r"'1_dog'"):
        load_sets(DataConfig(**given))


def test_kohya_class_folder_without_instance_folder(tmp_path):
    train = kohya(tmp_path, "10_sks dog", "1_sks cat")
    for name in ("1_dog", "1_house"):
        put(tmp_path, f"reg/{name}/r.png", image(7))
    with pytest.raises(DataError, match=r"1_house.*sks dog, sks cat"):
        load_concepts(DataConfig(train_data_dir=train, reg_data_dir=str(tmp_path / "reg")))


def test_kohya_zero_repeats(tmp_path):
    with pytest.raises(DataError, match=r"0_sks dog"):
        load_concepts(DataConfig(train_data_dir=kohya(tmp_path, "0_sks dog")))


def test_train_data_dir_of_captioned_images(tmp_path):
    put(tmp_path, "a.png", image(0))
    put(tmp_path, "metadata.jsonl", '{"file_name": "a.png", "text": "red"}')
    sets = load_sets(DataConfig(train_data_dir=str(tmp_path)))
    assert sets.instances.column("caption") == ["red"]
    assert len(sets.concepts) == 1


def test_missing_folder_of_one_concept(tmp_path):
    put(tmp_path, "cat/a.png", image(0))
    config = DataConfig(
        concepts_list=[{"instance_data_dir": f"{tmp_path}/cat"}, {"instance_data_dir": f"{tmp_path}/dgo"}]
    )
    with pytest.raises(DataError, match=r"/dgo does not exist"):
        load_sets(config)
