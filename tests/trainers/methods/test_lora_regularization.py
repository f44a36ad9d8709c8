"""Test the dropouts and the norm limit of LoRAs against the formulas of kohya's scripts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import nn

from dreamfleet.datasets.errors import RecipeError
from dreamfleet.trainers.config.packing import find_unpackable
from dreamfleet.trainers.distributed.context import DistributedContext
from dreamfleet.trainers.methods.lora_regularization import HiddenDropout
from dreamfleet.trainers.models.adapters import adapted
from dreamfleet.trainers.models.lora import TRAINED
from dreamfleet.trainers.recipe import Recipe, build_recipe
from dreamfleet.trainers.run.build import Parts, assemble


def recipe_of(folder: Path, method: dict[str, Any], **changes: Any) -> Recipe:
    tree = tiny.make_recipe(folder, method={"name": "native", "lora_rank": 4, **method}, **changes)
    return build_recipe(tree)


def layers_of(parts: Parts) -> list[Any]:
    return [layer for part in parts.model.modules().values() for _, layer in adapted(part)]


def fill(layers: list[Any], *, size: float = 0.3) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in layers:
            for matrices in (layer.lora_A, layer.lora_B):
                weight = matrices[TRAINED].weight
                weight.copy_(size * torch.randn(weight.shape, generator=generator))


@pytest.mark.parametrize("is_conv", [False, True])
@pytest.mark.parametrize(
    "drop", [{"rank": 0.5}, {"neuron": 0.4}, {"module": 0.5}, {"neuron": 0.2, "rank": 0.3, "module": 0.2}]
)
def test_dropouts_equal_the_forward_pass_of_kohyas_lora(is_conv: bool, drop: dict[str, float]) -> None:
    # kohya-ss/sd-scripts, networks/lora.py, LoRAModule.forward, between lora_down and lora_up.
    options = {"neuron": 0.0, "rank": 0.0, "module": 0.0, **drop}
    down: nn.Module = nn.Conv2d(6, 4, 3, padding=1, bias=False) if is_conv else nn.Linear(6, 4, bias=False)
    inputs = torch.randn(3, 6, 5, 5) if is_conv else torch.randn(3, 7, 6)
    plain = down(inputs)
    down.register_forward_hook(HiddenDropout(**options))
    for seed in range(20):
        torch.manual_seed(seed)
        found = down.train()(inputs)
        torch.manual_seed(seed)
        expected = plain.clone()
        if options["module"] and torch.rand(1) < options["module"]:
            expected = torch.zeros_like(plain)
        else:
            if options["neuron"]:
                expected = torch.nn.functional.dropout(expected, p=options["neuron"])
            if options["rank"]:
                mask = (torch.rand((3, 1, 4) if not is_conv else (3, 4, 1, 1)) > options["rank"]).float()
                expected = expected * mask * (1.0 / (1.0 - options["rank"]))
        assert torch.allclose(found, expected, atol=1e-6), seed
    assert torch.equal(down.eval()(inputs), plain)


def test_dropouts_act_in_training_and_repeat_with_the_seed(tmp_path: Path) -> None:
    parts = assemble(recipe_of(tmp_path, {"rank_dropout": 0.5, "module_dropout": 0.3}), DistributedContext())
    fill(layers_of(parts))
    batch = parts.prepare(parts.feed.batch(0))

    def loss(seed: int) -> float:
        torch.manual_seed(seed)
        return float(parts.method(batch).total.detach())

    assert loss(1) == loss(1) and len({loss(seed) for seed in range(6)}) > 3
    for layer in layers_of(parts):
        layer.eval()
    assert loss(1) == loss(2)


@pytest.mark.parametrize("targets", [None, "locon"])
def test_norms_are_limited_as_in_kohyas_scripts(tmp_path: Path, targets: str | None) -> None:
    method = {"scale_weight_norms": 0.8, "lora_alpha": 2.0, "lora_target_modules": targets}
    parts = assemble(recipe_of(tmp_path, method), DistributedContext())
    layers = layers_of(parts)
    fill(layers)
    layers[0].lora_B[TRAINED].weight.data *= 1e-3  # one that is within the limit
    before = [
        (la.lora_A[TRAINED].weight.detach().clone(), la.lora_B[TRAINED].weight.detach().clone())
        for la in layers
    ]
    parts.method.after_step()
    changed = 0
    for layer, (down, up) in zip(layers, before, strict=True):
        # kohya-ss/sd-scripts, networks/lora.py, apply_max_norm_regularization, for every shape of the matrices
        updown = (2.0 / 4) * (up.flatten(1) @ down.flatten(1))
        ratio = min(1.0, 0.8 / float(updown.norm()))
        changed += ratio < 1
        assert torch.allclose(layer.lora_A[TRAINED].weight, down * ratio**0.5, rtol=1e-4)
        assert torch.allclose(layer.lora_B[TRAINED].weight, up * ratio**0.5, rtol=1e-4)
        merged = layer.get_delta_weight(TRAINED).detach()
        assert float(merged.norm()) <= 0.8 * 1.0001
    assert 0 < changed < len(layers)


def test_the_limit_holds_after_every_step_and_in_the_average(tmp_path: Path) -> None:
    recipe = recipe_of(
        tmp_path,
        {"scale_weight_norms": 0.02},
        optimizer__learning_rate=0.05,
        engine={"use_ema": True, "ema_decay": 0.5},
    )
    parts = assemble(recipe, DistributedContext())
    for step in range(3):
        parts.engine.backward(parts.prepare(parts.feed.batch(step)))
        parts.engine.step({name: rate(step) for name, rate in parts.rates.items()}, step + 1)
        norms = [float(layer.get_delta_weight(TRAINED).detach().norm()) for layer in layers_of(parts)]
        assert max(norms) == pytest.approx(0.02, rel=1e-3)


def test_what_cannot_be_combined_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"rank_dropout needs lora_rank"):
        recipe_of(tmp_path, {"lora_rank": None, "rank_dropout": 0.1})
    with pytest.raises(RecipeError, match=r"scale_weight_norms.*zero_stage: 2.*shards"):
        recipe_of(tmp_path, {"scale_weight_norms": 1.0}, engine={"zero_stage": 2})
    assert "module_dropout" in (find_unpackable(recipe_of(tmp_path, {"module_dropout": 0.1})) or "")
    assert find_unpackable(recipe_of(tmp_path, {"scale_weight_norms": 1.0, "loraplus_lr_ratio": 4})) is None
