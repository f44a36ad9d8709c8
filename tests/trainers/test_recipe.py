"""Tests of recipes: unknown keys, error messages, aliases, overrides, and paths relative to the recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml

from dreamfleet.datasets.errors import RecipeError
from dreamfleet.datasets.path_field import absolute_path
from dreamfleet.trainers.recipe import build_recipe, load_recipe

MINIMAL: dict[str, Any] = {
    "method": {"name": "dreambooth"},
    "data": {"instance_data_dir": "pictures", "instance_prompt": "a sks cat"},
    "output_dir": "runs/x",
}


def names_remedy(message: str, fault: str, remedy: str) -> bool:
    """Return whether one line of ``message`` contains ``fault`` and, after it, ``remedy``."""
    return any(fault in line and remedy in line.partition(fault)[2] for line in message.splitlines())


def test_all_errors_are_reported_at_once_with_the_nearest_key(tmp_path: Path) -> None:
    tree = {
        **MINIMAL,
        "method": {"name": "dreambooth", "train_text_encodr": True},
        "optimizer": {"learning_rte": 1, "lr_warmup_steps": "many"},
        "train": {"max_train_steps": -1},
        "trian": {},
    }
    path = tiny.write_recipe(tmp_path / "r.yaml", tree)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    message = str(caught.value)
    assert str(path) in message and "5 errors" in message
    assert names_remedy(message, "method.train_text_encodr: unknown", "'train_text_encoder'")
    assert names_remedy(message, "optimizer.learning_rte: unknown", "'learning_rate'")
    assert "optimizer.lr_warmup_steps:" in message and "'many'" in message
    assert "train.max_train_steps:" in message and "(got -1)" in message
    assert names_remedy(message, "trian: unknown", "'train'")


def test_an_unknown_method_names_the_known_ones_and_other_errors_are_reported() -> None:
    with pytest.raises(RecipeError) as caught:
        build_recipe({**MINIMAL, "method": {"name": "dreamboth"}, "nonsense": 1})
    message = str(caught.value)
    assert names_remedy(message, "'dreamboth'", "'dreambooth'") and "nonsense: unknown" in message


def test_a_key_of_another_section_or_program_is_reported_where_it_belongs(tmp_path: Path) -> None:
    tree = {
        **MINIMAL,
        "max_train_steps": 4,
        "train": {"learning_rate": 1, "use_8bit_adam": True, "output_dir": "x"},
        "optimizer": {"learning_rate": 1, "unet_lr": 2},
    }
    with pytest.raises(RecipeError) as caught:
        build_recipe(tree)
    message = str(caught.value)
    assert names_remedy(message, "max_train_steps: unknown", "train:")
    assert names_remedy(message, "train.learning_rate: unknown", "optimizer:")
    assert names_remedy(message, "train.output_dir: unknown", "outside the sections")
    assert names_remedy(message, "train.use_8bit_adam: unknown", "optimizer.name: adamw8bit")
    assert names_remedy(message, "optimizer.unet_lr: ", "'learning_rate'")
    with pytest.raises(RecipeError, match=r"write method: \{name: dreambooth\}"):
        build_recipe({**MINIMAL, "method": "dreambooth"})
    path = tiny.write_recipe(tmp_path / "r.yaml", MINIMAL)
    with pytest.raises(RecipeError, match="quotes"):
        load_recipe(path, ["data.instance_prompt=a cat: asleep"])


def test_a_duplicate_key_is_refused(tmp_path: Path) -> None:
    path = tiny.write_recipe(tmp_path / "r.yaml", MINIMAL)
    path.write_text(path.read_text() + "output_dir: elsewhere\n")
    with pytest.raises(RecipeError, match=r"'output_dir' .*twice"):
        load_recipe(path)
    path.write_text("base: &base {a: 1, b: 2}\nmine: {<<: *base, a: 3}\n")
    with pytest.raises(RecipeError, match="base: unknown key"):  # merged keys may be set again
        load_recipe(path)


def test_an_override_has_priority_under_any_alias_of_a_key(tmp_path: Path) -> None:
    tree = {
        **MINIMAL,
        "method": {"name": "textual_inversion", "placeholder_token": "x", "num_vectors": 2},
        "optimizer": {"learning_rate": 1e-3},
    }
    path = tiny.write_recipe(tmp_path / "r.yaml", tree)
    recipe = load_recipe(path, ["optimizer.unet_lr=1e-4", "method.num_vectors_per_token=5"])
    assert (recipe.optimizer.learning_rate, recipe.method.model_dump()["num_vectors"]) == (1e-4, 5)


def test_one_text_is_read_as_a_list() -> None:
    changed = {"validation": {"validation_prompt": "a sks cat"}, "log_with": "tensorboard"}
    recipe = build_recipe({**MINIMAL, **changed, "optimizer": {"optimizer_type": "AdamW8bit"}})
    assert (recipe.validation.prompts, recipe.report_to) == (["a sks cat"], ["tensorboard"])
    assert recipe.optimizer.name == "adamw8bit"


def test_an_unquoted_no_is_a_precision_and_not_false(tmp_path: Path) -> None:
    path = tiny.write_recipe(tmp_path / "r.yaml", MINIMAL)
    path.write_text(path.read_text() + "\ntrain: {mixed_precision: no}\n")
    assert load_recipe(path).train.mixed_precision == "no"
    assert load_recipe(path, ["train.mixed_precision=no"]).train.mixed_precision == "no"


def test_key_names_of_kohya_are_accepted() -> None:
    recipe = build_recipe(
        {
            **MINIMAL,
            "method": {
                "name": "textual_inversion",
                "token_string": "<x>",
                "init_word": "cat",
                "num_vectors_per_token": 3,
            },
            "train": {
                "min_snr_gamma": 5,
                "max_train_epochs": 2,
                "offset_noise": 0.1,
                "save_every_n_steps": 7,
            },
            "data": {"image_dir": "pictures", "shuffle_caption": True, "caption_dropout_rate": 0.1},
            "validation": {"sample_every_n_steps": 9},
        }
    )
    assert (recipe.method.placeholder_token, recipe.method.initializer_token, recipe.method.num_vectors) == (
        "<x>",
        "cat",
        3,
    )
    assert (recipe.train.snr_gamma, recipe.train.num_train_epochs, recipe.train.checkpointing_steps) == (
        5,
        2,
        7,
    )
    assert recipe.data.shuffle_tags and recipe.data.caption_dropout == 0.1 and recipe.validation.steps == 9


def test_overrides_have_priority_and_may_create_sections(tmp_path: Path) -> None:
    path = tiny.write_recipe(tmp_path / "r.yaml", MINIMAL)
    recipe = load_recipe(
        path,
        [
            "optimizer.learning_rate=1e-5",
            "train.max_train_steps=12",
            'optimizer.lr_scheduler="cosine"',
            "report_to=[]",
        ],
    )
    assert recipe.optimizer.learning_rate == 1e-5 and recipe.train.max_train_steps == 12
    assert recipe.optimizer.lr_scheduler == "cosine" and recipe.report_to == []
    with pytest.raises(RecipeError, match=r"key\.path=value"):
        load_recipe(path, ["learning_rate"])
    with pytest.raises(RecipeError, match="output_dir"):
        load_recipe(path, ["output_dir.x=1"])
    with pytest.raises(RecipeError, match=r"optimizer\.learning_rate"):
        load_recipe(path, ["optimizer.learning_rate=fast"])


def test_relative_paths_are_resolved_from_the_folder_of_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "recipes" / "model").mkdir(parents=True)
    tree = {
        **MINIMAL,
        "model": {"pretrained_model_name_or_path": "model"},
        "validation": {"holdout": "../holdout"},
        "output_dir": "../runs/my-cat",
    }
    path = tiny.write_recipe(tmp_path / "recipes" / "r.yaml", tree)
    monkeypatch.chdir("/")
    recipe = load_recipe(path)
    assert recipe.data.instance_data_dir == str(tmp_path / "recipes" / "pictures")
    assert recipe.model.pretrained_model_name_or_path == str(tmp_path / "recipes" / "model")
    assert recipe.validation.holdout == str(tmp_path / "holdout")
    assert recipe.output_dir == str(tmp_path / "runs" / "my-cat") and recipe.run_name == "my-cat"
    hub = load_recipe(
        path, ["model.pretrained_model_name_or_path=stable-diffusion-v1-5/stable-diffusion-v1-5"]
    )
    assert hub.model.pretrained_model_name_or_path == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    bucket = load_recipe(path, ["output_dir=s3://bucket/runs/x"])
    assert bucket.output_dir == "s3://bucket/runs/x"


def test_the_resolved_recipe_round_trips(tmp_path: Path) -> None:
    recipe = load_recipe(tiny.write_recipe(tmp_path / "r.yaml", MINIMAL))
    assert build_recipe(yaml.safe_load(recipe.to_yaml())) == recipe


def test_every_shipped_recipe_is_valid(root: Path) -> None:
    recipes = sorted((root / "recipes").rglob("*.yaml"))
    assert recipes
    for path in recipes:
        load_recipe(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("method: [", "not YAML"),
        ("just words", "mapping"),
        ("", "mapping"),
        ("method: !!python/object/apply:os.system ['true']", "not YAML"),
    ],
)
def test_a_file_that_is_not_a_recipe_is_reported(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=message):
        load_recipe(path)


def test_a_recipe_that_is_missing_or_not_text_is_reported(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no such"):
        load_recipe(tmp_path / "missing.yaml")
    (tmp_path / "r.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="read"):
        load_recipe(tmp_path / "r.yaml")


def test_conflicting_settings_are_reported() -> None:
    for change, message in [
        ({"optimizer": {"learning_rate": "0.1:10,0.2", "lr_scheduler": "cosine"}}, "lr_scheduler: constant"),
        ({"optimizer": {"learning_rate": "0.1:10,0.2:5"}}, "grow"),
        ({"optimizer": {"learning_rate": -1}}, "negative"),
        ({"optimizer": {"lr_scheduler": "piecewise_constant", "lr_rules": "x"}}, "lr_rules"),
        ({"data": {}}, "instance_data_dir"),
        (
            {"data": {"instance_data_dir": "x", "instance_prompt": ["filewords"]}},
            r"quotes .*'\[filewords\]'",
        ),
    ]:
        with pytest.raises(RecipeError, match=message):
            build_recipe({**MINIMAL, **change})


@pytest.mark.parametrize(
    ("path", "folder", "whole"),
    [
        ("a/b", "/here", "/here/a/b"),
        ("../a", "/here/deep", "/here/a"),
        ("/a/./b", "/here", "/a/b"),
        ("s3://bucket/a", "/here", "s3://bucket/a"),
        ("a/b", "s3://bucket/runs", "s3://bucket/runs/a/b"),
        ("../a", "s3://bucket/runs", "s3://bucket/a"),
        ("/a", "s3://bucket/runs", "/a"),
    ],
)
def test_the_base_folder_of_a_relative_path(path: str, folder: str, whole: str) -> None:
    assert absolute_path(path, folder) == whole
