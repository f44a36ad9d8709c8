"""Tests of a recipe's ``search:`` section: its errors are reported when the recipe is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
from searches import RATES, VECTORS, make_recipe, make_tree

from dreamfleet.datasets.errors import RecipeError
from dreamfleet.trainers.recipe import build_recipe, load_recipe


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"space": {"optimizer.learning_rte": RATES}}, "did you mean 'optimizer.learning_rate'?"),
        ({"space": {"optimizer.lr": RATES}}, "'optimizer.learning_rate'"),
        ({"space": {"output_dir": VECTORS}}, "folder"),
        ({"space": {"data.resolution": VECTORS}}, "compared"),
        ({"space": {"validation.steps": VECTORS}}, "compared"),
        ({"space": {"scaling.num_workers": VECTORS}}, "one process"),
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
