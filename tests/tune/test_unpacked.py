"""Test that a search says which values of its space keep trials from being packed."""

from __future__ import annotations

from typing import Any

import pytest
from searches import make_tree

from dreamfleet.trainers.recipe import Recipe, build_recipe
from dreamfleet.tune.unpacked import describe_unpacked

DROPOUT = {"method.neuron_dropout": {"distribution": "choice", "values": [0.0, 0.1]}}
CHECKPOINTING = {"train.gradient_checkpointing": {"distribution": "choice", "values": [False, True]}}
RATES = {"optimizer.learning_rate": {"distribution": "loguniform", "lower": 1e-4, "upper": 1e-1}}


def make(space: dict[str, Any], method: dict[str, Any] | None = None, **section: Any) -> Recipe:
    tree = make_tree(**section)
    tree["method"] = {"name": "dreambooth", "lora_rank": 2, **(method or {})}
    tree["data"]["instance_prompt"] = "a sks cat"
    tree["scaling"] = {"num_workers": 0}
    tree["search"]["space"] = space
    return build_recipe(tree)


def test_values_that_cannot_be_packed_are_named() -> None:
    (line,) = describe_unpacked(make({**DROPOUT, **RATES}))
    assert "run alone" in line and "neuron_dropout" in line
    (line,) = describe_unpacked(make({**RATES, **CHECKPOINTING}))
    assert line.startswith("trials with different train.gradient_checkpointing are not packed together")
    assert len(describe_unpacked(make({**DROPOUT, **CHECKPOINTING}))) == 2


@pytest.mark.parametrize(
    "recipe",
    [
        make(RATES),
        make(DROPOUT, max_concurrent_trials=1),
        make(CHECKPOINTING, {"lora_rank": None}),
    ],
    ids=["all can", "one at a time", "none can"],
)
def test_nothing_is_said_where_values_do_not_matter(recipe: Recipe) -> None:
    assert describe_unpacked(recipe) == []
