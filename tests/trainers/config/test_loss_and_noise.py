"""Test the keys of losses, noise and layers: other projects' names, searches, and methods that have none of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny

from dreamfleet.datasets.errors import RecipeError
from dreamfleet.trainers.recipe import Recipe, build_recipe

LORA = {"name": "native", "lora_rank": 4}
UNIFORM = {"distribution": "uniform", "lower": 0.01, "upper": 0.5}
SPACES: dict[str, dict[str, Any]] = {
    "train.loss_type": {"distribution": "choice", "values": ["l2", "l1", "huber", "smooth_l1"]},
    "train.huber_schedule": {"distribution": "choice", "values": ["snr", "constant", "exponential"]},
    "train.huber_c": UNIFORM,
    "train.debiased_estimation_loss": {"distribution": "choice", "values": [True, False]},
    "train.v_pred_like_loss": UNIFORM,
    "train.noise_offset": UNIFORM,
    "train.noise_offset_random_strength": {"distribution": "choice", "values": [True, False]},
    "train.multires_noise_iterations": {"distribution": "randint", "lower": 0, "upper": 10},
    "train.multires_noise_discount": UNIFORM,
    "train.ip_noise_gamma": UNIFORM,
    "train.min_timestep": {"distribution": "randint", "lower": 0, "upper": 500},
    "train.max_timestep": {"distribution": "randint", "lower": 600, "upper": 1000},
    "train.timestep_sampling": {"distribution": "choice", "values": ["uniform", "cosmap", "later"]},
    "train.logit_mean": {"distribution": "uniform", "lower": -1, "upper": 1},
    "train.timestep_bias_multiplier": {"distribution": "loguniform", "lower": 1, "upper": 10},
    "method.down_lr_weight": UNIFORM,
    "method.mid_lr_weight": UNIFORM,
    "method.up_lr_weight": {"distribution": "choice", "values": ["sine", "cosine+0.25", 1.0]},
    "method.loraplus_lr_ratio": {"distribution": "loguniform", "lower": 1, "upper": 16},
    "method.neuron_dropout": UNIFORM,
    "method.rank_dropout": UNIFORM,
    "method.module_dropout": UNIFORM,
    "method.scale_weight_norms": UNIFORM,
}


def recipe(folder: Path, **changes: Any) -> Recipe:
    return build_recipe(tiny.make_recipe(folder, **changes))


@pytest.mark.parametrize("key", SPACES)
def test_every_key_can_be_searched(tmp_path: Path, key: str) -> None:
    search = {"num_trials": 2, "metric": "view_loss", "space": {key: SPACES[key]}}
    made = recipe(tmp_path, method=LORA, search=search, validation={"metrics": ["view_loss"]})
    assert made.search is not None and list(made.search.space) == [key]


def test_names_of_kohya_and_diffusers_are_accepted(tmp_path: Path) -> None:
    train = {
        "loss_type": "MSE",
        "min_snr_gamma": 5,
        "offset_noise": 0.1,
        "input_perturbation": 0.2,
        "timestep_bias_strategy": "none",
    }
    method = {
        **LORA,
        "dora_wd": True,
        "down_lr_weight": "0,,0.5,1",
        "freeze_layers": "unet.mid_block, *.ff.*",
    }
    made = recipe(tmp_path, method=method, train=train)
    got = made.train
    assert (got.loss_type, got.snr_gamma, got.noise_offset, got.ip_noise_gamma) == ("l2", 5, 0.1, 0.2)
    assert got.timestep_sampling == "uniform" and not got.chooses_timesteps
    tuned: Any = made.method
    assert tuned.use_dora and tuned.down_lr_weight == [0, 0, 0.5, 1]
    assert tuned.freeze_layers == ("unet.mid_block", "*.ff.*")
    assert build_recipe(made.model_dump(mode="json")) == made


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train__min_timestep": 500, "train__max_timestep": 500}, "min_timestep: 500.*max_timestep: 500"),
        ({"train__loss_type": "hubr"}, r"loss_type.*did you mean 'huber'"),
        ({"train__timestep_sampling": "gauss"}, r"timestep_sampling.*logit_normal"),
        ({"train__huber_c": 0}, "huber_c"),
    ],
)
def test_wrong_values_are_an_error(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe(tmp_path, **changes)


@pytest.mark.parametrize(
    "method", [{"name": "aesthetic_gradients"}, tiny.DISCRIMINATOR], ids=lambda method: method["name"]
)
def test_methods_without_noise_refuse_its_keys(tmp_path: Path, method: dict[str, Any]) -> None:
    for key, value in (("loss_type", "l1"), ("ip_noise_gamma", 0.1), ("min_timestep", 10)):
        with pytest.raises(RecipeError, match=f"train.{key}.*which adds no noise"):
            recipe(tmp_path, method=method, train={key: value})
