"""Test learning rates by block and layer against kohya's numbering, LoRA+ ratios, and frozen layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from small_runs import assert_same, final_state, recipe_tree

from dreamfleet.datasets.errors import ModelError, RecipeError
from dreamfleet.trainers.config.layer_rates import expand_factors
from dreamfleet.trainers.distributed.context import DistributedContext
from dreamfleet.trainers.models.formats.ldm_names import SD1_CONFIGS, SDXL_CONFIGS, unet_key
from dreamfleet.trainers.models.stable_diffusion.unet_blocks import block_of, count_blocks
from dreamfleet.trainers.recipe import build_recipe
from dreamfleet.trainers.run.build import Parts, assemble
from dreamfleet.trainers.run.run import run_worker

RATE = 2e-3


def parts_of(folder: Path, method: dict[str, Any], **changes: Any) -> Parts:
    tree = tiny.make_recipe(
        folder, method={"name": "native", **method}, optimizer__learning_rate=RATE, **changes
    )
    return assemble(build_recipe(tree), DistributedContext())


def rates_of(parts: Parts) -> dict[str, float]:
    """Return the learning rate of each trained parameter at the first step."""
    return {name: parts.rates[group.name](0) for group in parts.engine.groups for name in group.params}


@pytest.mark.parametrize(("is_sdxl", "configs"), [(False, SD1_CONFIGS), (True, SDXL_CONFIGS)])
def test_blocks_are_numbered_as_in_stabilitys_code(is_sdxl: bool, configs: dict[str, Any]) -> None:
    # kohya's scripts number blocks by the names input_blocks.N, middle_block.N and output_blocks.N of Stability's code.
    config = configs["unet"]
    counts = count_blocks(config, is_sdxl=is_sdxl)
    assert counts == {"embed": 1, "down": 9, "mid": 3, "up": 9, "out": 1} if is_sdxl else {
        "embed": 1, "down": 12, "mid": 1, "up": 12, "out": 1
    }  # fmt: skip
    blocks = len(config["down_block_types"])
    layers = ["conv_in", "conv_out", "time_embedding.linear_1", "mid_block.resnets.0.conv1"]
    layers += ["mid_block.attentions.0.proj_in", "mid_block.resnets.1.conv2"]
    layers += [f"down_blocks.{i}.resnets.{j}.conv1" for i in range(blocks) for j in range(2)]
    layers += [f"down_blocks.{i}.downsamplers.0.conv" for i in range(blocks - 1)]
    layers += [f"up_blocks.{i}.resnets.{j}.conv2" for i in range(blocks) for j in range(3)]
    layers += [f"up_blocks.{i}.upsamplers.0.conv" for i in range(blocks - 1)]
    for layer in layers:
        top, number = unet_key(f"{layer}.weight", config).split(".")[:2]
        expected = {
            "input_blocks": ("down", int(number)),
            "middle_block": ("mid", int(number) if is_sdxl else 0),
            "output_blocks": ("up", int(number)),
            "time_embed": ("embed", 0),
            "out": ("out", 0),
        }[top]
        assert block_of(layer, config, is_sdxl=is_sdxl) == expected, layer


def test_curves_equal_those_of_kohyas_scripts() -> None:
    # kohya-ss/sd-scripts, networks/lora.py, get_block_lr_weight, by hand for 3 blocks.
    assert expand_factors("sine+0.25", 3) == pytest.approx([0.25, 0.25 + 0.5**0.5, 1.25])
    assert expand_factors("cosine", 3) == pytest.approx([1, 0.5**0.5, 0])
    assert expand_factors("reverse_linear", 3) == pytest.approx([1, 0.5, 0])
    assert expand_factors("zeros+0.1", 2) == [0.1, 0.1]
    assert expand_factors([1.0, 2.0], 3) is None


def test_block_factors_multiply_the_rate_and_zero_leaves_out_the_lora(tmp_path: Path) -> None:
    # The tiny U-Net has 2 blocks of one layer each: input_blocks 0 to 3 (1 + 2 * 2 - 1), output_blocks 0 to 3.
    method = {
        "lora_rank": 2,
        "down_lr_weight": "1,1,,0.5",
        "mid_lr_weight": 2,
        "up_lr_weight": [0.1, 1, 1, 1],
    }
    rates = rates_of(parts_of(tmp_path, method))
    for name, rate in rates.items():
        factor = {"down_blocks.1": 0.5, "mid_block": 2.0, "up_blocks.0": 0.1}
        expected = next((value for key, value in factor.items() if f"unet.{key}." in name), None)
        if "up_blocks.0.attentions.1" in name:
            expected = 1.0
        assert expected is not None and rate == pytest.approx(expected * RATE), name
    everything = rates_of(parts_of(tmp_path, {"lora_rank": 2}))
    assert rates.keys() == everything.keys() and set(everything.values()) == {RATE}
    some = rates_of(parts_of(tmp_path, {"lora_rank": 2, "down_lr_weight": 0}))
    assert some.keys() == {name for name in everything if "down_blocks" not in name}


def test_block_rates_replace_the_learning_rate(tmp_path: Path) -> None:
    rates = [1e-3, *[2e-3] * 4, 3e-3, *[0.0] * 4, 5e-3]  # embed, 4 input blocks, middle, 4 output blocks, out
    parts = parts_of(tmp_path, {"block_lr": rates, "train_text_encoder": True})
    found = rates_of(parts)
    places = {"time_embedding": 1e-3, "conv_in": 2e-3, "down_blocks": 2e-3, "mid_block": 3e-3}
    places |= {"conv_norm_out": 5e-3, "conv_out": 5e-3}
    for name, rate in found.items():
        part, _, layer = name.partition(".")
        expected = RATE if part == "text_encoder" else places[layer.partition(".")[0]]
        assert rate == pytest.approx(expected, rel=1e-12), name
    unet = parts.model.modules()["unet"]
    assert not any(p.requires_grad for p in unet.get_submodule("up_blocks").parameters())


def test_lora_plus_trains_the_up_matrices_faster(tmp_path: Path) -> None:
    # Hayou et al. 2024 (arXiv 2402.12354): the rate of B is lambda times that of A.
    method = {
        "lora_rank": 2,
        "train_text_encoder": True,
        "loraplus_lr_ratio": 4,
        "loraplus_unet_lr_ratio": 16,
    }
    for name, rate in rates_of(parts_of(tmp_path, method)).items():
        ratio = 1 if "lora_A" in name else 16 if name.startswith("unet") else 4
        assert rate == pytest.approx(ratio * RATE), name


def test_the_last_matching_pattern_counts_and_frozen_layers_do_not_change(tmp_path: Path) -> None:
    method = {
        "lr_factors": {"*.attn2.*": 0.5, "unet.mid_block": 0.25},
        "freeze_layers": "unet.up_blocks, *.norm*",
        "train_text_encoder": True,
    }
    parts = parts_of(tmp_path, method)
    rates = rates_of(parts)
    assert not any("up_blocks" in name or ".norm" in name for name in rates)
    for name, rate in rates.items():
        expected = 0.25 if "unet.mid_block" in name else 0.5 if ".attn2." in name else 1.0
        assert rate == pytest.approx(expected * RATE), name
    before = {name: p.detach().clone() for name, p in parts.method.named_parameters()}
    parts.engine.backward(parts.prepare(parts.feed.batch(0)))
    parts.engine.step({name: rate(0) for name, rate in parts.rates.items()}, 1)
    moved = {
        n.removeprefix("learning.")
        for n, p in parts.method.named_parameters()
        if not torch.equal(p, before[n])
    }
    assert moved <= rates.keys() and len(moved) > 0.9 * len(rates)


@pytest.mark.parametrize(
    ("method", "error", "message"),
    [
        ({"freeze_layers": "unet.nothing"}, RecipeError, r"freeze_layers.*unet\.nothing.*called unet\."),
        ({"freeze_layers": "*"}, RecipeError, "no layer to train"),
        ({"down_lr_weight": [1, 2]}, RecipeError, r"down_lr_weight: 2 values.*4"),
        ({"block_lr": [1e-4] * 23}, RecipeError, r"block_lr: 23 values.*11 blocks.*4 down"),
        ({"loraplus_lr_ratio": 16}, RecipeError, "loraplus_lr_ratio needs lora_rank"),
        ({"down_lr_weight": "steep"}, RecipeError, "steep.*cosine"),
        ({"lr_factors": {"*": -1}}, RecipeError, "lr_factors"),
    ],
)
def test_wrong_rates_are_an_error(
    tmp_path: Path, method: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        parts_of(tmp_path, method)


def test_a_family_without_blocks_names_the_keys() -> None:
    from dreamfleet.trainers.models.family import DiffusionModel

    class Flow(DiffusionModel):
        title = "Flow"  # type: ignore[assignment]

    Flow.__abstractmethods__ = frozenset()
    with pytest.raises(ModelError, match=r"Flow.*block_lr.*lr_factors"):
        Flow().count_blocks()  # type: ignore[abstract]


def test_a_stopped_run_with_rates_by_layer_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    method = {
        "name": "dreambooth",
        "lora_rank": 4,
        "loraplus_lr_ratio": 8,
        "up_lr_weight": "sine",
        "freeze_layers": "unet.mid_block",
        "rank_dropout": 0.3,
        "module_dropout": 0.2,
        "neuron_dropout": 0.1,
        "scale_weight_norms": 0.01,
    }
    straight, broken = (recipe_tree(tmp_path, name, method=method) for name in ("straight", "broken"))
    run_worker(build_recipe(straight))
    first = run_worker(build_recipe(broken), should_stop=tiny.Stop(2))
    assert first.exit_reason == "interrupted" and 0 < first.steps < 6
    run_worker(build_recipe(broken), resume=True)
    assert_same(final_state(straight), final_state(broken))


def test_zero_trains_the_groups_as_plain_torch_does(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    method = {
        "lora_rank": 4,
        "loraplus_lr_ratio": 8,
        "up_lr_weight": "sine",
        "freeze_layers": "unet.mid_block",
        "rank_dropout": 0.3,
    }
    losses = []
    for engine in ({}, {"zero_stage": 2}):
        parts = parts_of(tmp_path, method, engine=engine)
        for step in range(3):
            torch.manual_seed(step)
            loss = parts.engine.backward(parts.prepare(parts.engine.to_device(parts.feed.batch(step))))
            parts.engine.step({name: 10 * rate(step) for name, rate in parts.rates.items()}, step + 1)
        losses.append(float(loss.total))
        parts.engine.close()
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
