"""Tests of a recipe's ``search:`` section: its errors are reported when the recipe is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
from method_cases import SECTIONS
from searches import RATES, VECTORS, make_recipe, make_tree

from dreamfleet.datasets.errors import RecipeError
from dreamfleet.trainers.config.method import METHODS
from dreamfleet.trainers.config.search import put_point
from dreamfleet.trainers.recipe import build_recipe, load_recipe


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"space": {"optimizer.learning_rte": RATES}}, "did you mean 'optimizer.learning_rate'?"),
        ({"space": {"optimizer.lr": RATES}}, "'optimizer.learning_rate'"),
        ({"space": {"output_dir": VECTORS}}, "folder"),
        ({"space": {"data.resolution": VECTORS}}, "compared"),
        ({"space": {"validation.steps": VECTORS}}, "compared"),
        ({"space": {"scaling.num_workers": VECTORS}}, "workers_per_trial"),
        ({"space": {"optimizer.name": {**VECTORS, "values": ["adamw", "lyon"]}}}, "did you mean 'lion'?"),
        ({"space": {"optimizer.options": VECTORS}}, "search its keys: optimizer.options.weight_decay"),
        ({"space": {"optimizer.options.d_coef": RATES}}, "optimizer.options.d_coef: no key of this recipe"),
        ({"space": {}}, "search.space"),
        ({"space": {"method.num_vectors": {**VECTORS, "values": [1, 76]}}}, "less than or equal to 75 (got 76)"),
        (
            {"space": {"optimizer.adam_beta2": {"distribution": "uniform", "lower": 0.5, "upper": 1.5}}},
            "search.space.optimizer.adam_beta2: Input should be less than 1 (got 1.5)",
        ),
        (
            {"space": {"method.num_vectors": {"distribution": "uniform", "lower": 1, "upper": 5}}},
            "valid integer",
        ),
        ({"space": {"optimizer.learning_rate": {**RATES, "upper": 1e-4}}}, "must be above lower 0.0001"),
        ({"space": {"optimizer.learning_rate": {**RATES, "lower": 0}}}, "needs a lower above 0"),
        ({"space": {"optimizer.learning_rate": {**RATES, "lowr": 1}}}, "did you mean 'lower'?"),
        ({"space": {"method.num_vectors": {**VECTORS, "values": [2, 2]}}}, "twice"),
        ({"space": {"method.num_vectors": {**VECTORS, "lower": 1}}}, "choice takes values"),
        ({"space": {"method.num_vectors": {"distribution": "randint", "lower": 1, "upper": 2.5}}}, "whole number"),
        ({"num_trials": None}, "search.num_trials"),
        ({"num_trials": None, "patience": None}, "max_gpu_hours (only a grid"),
        ({"metric": ["holdout_loss", "holdout_los"]}, "did you mean 'holdout_loss'?"),
        ({"metric": ["holdout_loss", "holdout_loss"]}, "twice"),
        ({"metric": []}, "search.metric"),
        ({"mode": ["min", "max"]}, "2 values for 1 metrics"),
        ({"keep_best": 0}, "search.keep_best"),
        ({"patience": 0}, "search.patience"),
        ({"max_hours": 0}, "search.max_hours"),
        ({"workers_per_trial": 0}, "search.workers_per_trial"),
        ({"num_trals": 3}, "did you mean 'num_trials'?"),
        ({"algorithm": "grid"}, "a grid needs num"),
        ({"metric": "holdout_los"}, "did you mean 'holdout_loss'?"),
        ({"metric": "clip_i"}, "validation.metrics"),
        ({"grace_period": 101}, "train.max_train_steps 100"),
        ({"resources_per_trial": {"GPU": 1.5}}, "0 to 1"),
        ({"points_to_evaluate": [{"method.num_vectors": 1}]}, "one value"),
        (
            {"points_to_evaluate": [{"method.num_vectors": 3, "optimizer.learning_rate": 1}]},
            "method.num_vectors 3 is outside",
        ),
        (
            {
                "space": {
                    "optimizer.learning_rate": {"distribution": "choice", "values": [1e-3, "0.1:10,0.01"]},
                    "optimizer.lr_scheduler": {"distribution": "choice", "values": ["constant", "cosine"]},
                }
            },
            "cannot be combined",
        ),
    ],
)  # fmt: skip
def test_errors_are_reported_when_the_recipe_is_read(section: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        make_recipe(**section)
    assert message in str(caught.value) and "search." in str(caught.value)


def test_all_errors_of_the_section_are_reported_together() -> None:
    tree = make_tree(
        space={"optimizer.learning_rte": RATES, "method.num_vectors": {**VECTORS, "values": [1, 99]}},
        metric=["holdout_los", "clip_i"],
        mode="min",
        max_gpu_hours=1,
        grace_period=500,
        resources_per_trial={"GPU": 1.5},
        points_to_evaluate=[{"method.num_vectors": 7}],
    )
    tree["scaling"]["use_gpu"] = False
    with pytest.raises(RecipeError) as caught:
        build_recipe(tree)
    parts = (
        "learning_rate", "less than or equal to 75", "'holdout_los'", "'clip_i'", "search.mode", "max_gpu_hours",
        "grace_period", "0 to 1", "one value", "num_vectors 7 is outside",
    )  # fmt: skip
    assert [part for part in parts if part not in str(caught.value)] == []
    assert "recipe has 10 errors" in str(caught.value)


def test_values_that_cannot_be_combined_are_reported_with_other_errors() -> None:
    space = {
        "optimizer.learning_rate": {"distribution": "choice", "values": [1e-3, "0.1:10,0.01"]},
        "optimizer.lr_scheduler": {"distribution": "choice", "values": ["constant", "cosine"]},
    }
    with pytest.raises(RecipeError) as caught:
        make_recipe(space=space, grace_period=500)
    assert "cannot be combined" in str(caught.value) and "grace_period" in str(caught.value)


def test_an_error_of_the_recipe_itself_is_reported_once() -> None:
    tree = make_tree()
    tree["validation"]["metrics"] = ["dino"]
    with pytest.raises(RecipeError, match=r"recipe has 1 error:\n  validation\.metrics"):
        build_recipe(tree)


def test_a_search_needs_no_number_of_trials_if_something_else_ends_it() -> None:
    finite = {
        "optimizer.learning_rate": {"distribution": "choice", "values": [1e-3, 1e-2]},
        "method.num_vectors": VECTORS,
    }
    section = make_recipe(space=finite, num_trials=None).search
    assert section is not None and section.size == 6
    for limit in ("patience", "max_hours", "max_gpu_hours"):
        section = make_recipe(num_trials=None, **{limit: 2}).search
        assert section is not None and section.size is None


@pytest.mark.parametrize("name", METHODS.names())
def test_every_method_has_valid_default_spaces(name: str) -> None:
    method = SECTIONS[name]
    for options in ({}, {"lora_rank": 4}):
        tree = make_tree()
        if options and "lora_rank" not in METHODS.get(name).model_fields:
            continue
        tree["method"] = {**method, **options}
        if name == "discriminator":
            del tree["validation"]
        del tree["search"]["space"]
        recipe = build_recipe(tree)
        assert recipe.search is not None
        assert set(recipe.search.space) == set(recipe.method.search_space)
        assert ("method.lora_rank" in recipe.search.space) == bool(options)
        assert build_recipe(recipe.model_dump(mode="json")) == recipe


def test_a_method_without_a_default_space_needs_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(METHODS.get("textual_inversion"), "search_spaces", {})
    tree = make_tree()
    del tree["search"]["space"]
    with pytest.raises(RecipeError, match=r"search\.space: missing"):
        build_recipe(tree)


def test_several_metrics_have_a_direction_each() -> None:
    tree = make_tree(metric=["clip_i", "holdout_loss"])
    tree["validation"] |= {"prompts": ["a <x>"], "metrics": ["clip_i"]}
    section = build_recipe(tree).search
    assert section is not None and section.objective == "clip_i" and section.maximise
    assert not section.maximises("holdout_loss")
    tree["search"]["mode"] = ["min", "max"]
    section = build_recipe(tree).search
    assert section is not None and not section.maximise and section.maximises("holdout_loss")


def test_a_search_by_held_out_loss_needs_held_out_images() -> None:
    tree = make_tree()
    del tree["validation"]
    with pytest.raises(RecipeError, match=r"search\.metric: .*validation\.holdout"):
        build_recipe(tree)


def test_scores_are_maximised_and_losses_minimised() -> None:
    tree = make_tree(metric="clip_i")
    tree["validation"] |= {"prompts": ["a <x>"], "metrics": ["clip_i"]}
    by_score = build_recipe(tree).search
    by_loss = make_recipe().search
    assert by_score and by_score.maximise and by_loss and not by_loss.maximise


def test_the_space_can_be_nested_and_changed_from_the_command_line(tmp_path: Path) -> None:
    path = tiny.write_recipe(tmp_path / "r.yaml", make_tree())
    changes = [
        "search.space.optimizer.learning_rate.lower=1e-5",
        "search.space.optimizer.adam_beta1={distribution: uniform, lower: 0.5, upper: 0.9}",
        "search.space.optimizer.adam_epsilon={distribution: choice, values: [1e-8, 1e-7]}",
    ]
    section = load_recipe(path, changes).search
    assert section is not None
    space = section.space
    assert space["optimizer.learning_rate"].lower == 1e-5
    assert space["optimizer.adam_beta1"].upper == 0.9
    assert space["optimizer.adam_epsilon"].values == [1e-8, 1e-7]


def test_optimizers_and_their_options_can_be_searched(tmp_path: Path) -> None:
    names = {"distribution": "choice", "values": ["adamw", "lion", "came"]}
    recipe = build_recipe(
        make_tree(tmp_path, space={"optimizer.name": names, "optimizer.learning_rate": RATES})
    )
    assert recipe.search is not None and recipe.search.space["optimizer.name"].values == names["values"]
    tree = make_tree(tmp_path, space={"optimizer.options.d_coef": {**RATES, "lower": 0.3, "upper": 3.0}})
    tree["optimizer"] = {"name": "prodigy", "learning_rate": 1.0}
    assert list(build_recipe(tree).search.space) == ["optimizer.options.d_coef"]  # type: ignore[union-attr]
    changed = put_point(build_recipe(tree).model_dump(mode="json"), {"optimizer.options.d_coef": 2.0})
    assert build_recipe(changed).optimizer.options == {"d_coef": 2.0}
