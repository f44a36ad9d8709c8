"""Test hypernetworks: the webui's formulas, every attention processor, and diffusers pipelines."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor, SlicedAttnProcessor
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from tiny_models import WIDTH, tiny_model
from torch import Tensor

from dreamfleet.datasets.errors import ModelError
from dreamfleet.trainers.config.hypernetwork_structure import ACTIVATIONS, Structure, derived_dropout
from dreamfleet.trainers.models.formats.hypernetwork import write_hypernetwork
from dreamfleet.trainers.models.formats.ldm_names import SD1_CONFIGS
from dreamfleet.trainers.models.stable_diffusion.hypernetwork import (
    Hypernetwork,
    HypernetworkModule,
    applied_hypernetworks,
    context_widths,
    load_hypernetwork,
    set_hypernetworks,
    unload_hypernetworks,
)

FUNCTIONS: dict[str, Any] = {
    "relu": F.relu, "leakyrelu": F.leaky_relu, "elu": F.elu, "swish": F.hardswish, "tanh": torch.tanh,
    "sigmoid": torch.sigmoid, "celu": F.celu, "gelu": F.gelu, "hardshrink": F.hardshrink,
    "hardsigmoid": F.hardsigmoid, "hardswish": F.hardswish, "hardtanh": F.hardtanh, "logsigmoid": F.logsigmoid,
    "mish": F.mish, "relu6": F.relu6, "rrelu": F.rrelu, "selu": F.selu, "silu": F.silu, "softplus": F.softplus,
    "softshrink": F.softshrink, "softsign": F.softsign, "tanhshrink": F.tanhshrink, "softmax": F.softmax,
    "softmin": F.softmin, "logsoftmax": F.log_softmax, "softmax2d": lambda x: F.softmax(x, -3),
}  # fmt: skip


def webui_forward(x: Tensor, weights: dict[str, Tensor], options: dict[str, Any]) -> Tensor:
    """Compute the webui's formula over the numbered layers of a module; the result has the shape of ``x``."""
    factors, name = options["layer_structure"], options["activation_func"]
    index, out = 0, x
    for i in range(len(factors) - 1):
        out = out @ weights[f"linear.{index}.weight"].T + weights[f"linear.{index}.bias"]
        index += 1
        if name != "linear" and (i < len(factors) - 2 or options["activate_output"]):
            slope = weights.get(f"linear.{index}.weight")
            out = F.prelu(out, slope) if name == "prelu" else FUNCTIONS[name](out)
            index += 1
        if options["add_layer_norm"]:
            mean, var = out.mean(-1, keepdim=True), out.var(-1, keepdim=True, correction=0)
            out = (out - mean) / (var + 1e-5).sqrt()
            out = out * weights[f"linear.{index}.weight"] + weights[f"linear.{index}.bias"]
            index += 1
        if options["dropout_structure"][i + 1] > 0:
            index += 1
    return x + out * 0.7


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_every_activation_computes_the_formula_of_the_webui(name: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 5, 8)
    for norm, activated, structure, dropout in [
        (False, False, (1, 2, 1), (0, 0, 0)),
        (True, True, (1, 2, 0.5, 1), (0, 0.3, 0, 0)),
    ]:
        options: dict[str, Any] = {
            "layer_structure": structure,
            "activation_func": name,
            "add_layer_norm": norm,
            "activate_output": activated,
            "dropout_structure": dropout,
        }
        module = HypernetworkModule(8, Structure(weight_init="XavierUniform", **options)).eval()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # softmax without a dimension, as in the webui
            expected = webui_forward(x, dict(module.state_dict()), options)
        assert torch.allclose(module(x, 0.7), expected, atol=1e-5)
        assert module(x.bfloat16()).dtype == torch.bfloat16


def test_activations_are_those_of_the_webui() -> None:
    listed = {
        name.lower()
        for name, found in vars(torch.nn.modules.activation).items()
        if isinstance(found, type) and found.__module__ == "torch.nn.modules.activation"
    }
    assert set(ACTIVATIONS) == {"linear", "swish", *listed} - {"glu", "multiheadattention", "threshold"}
    assert set(ACTIVATIONS) - {"linear", "prelu"} == set(FUNCTIONS)


@pytest.mark.parametrize(
    ("init", "activation", "std", "shape"),
    [
        ("Normal", "relu", 0.01, "normal"),
        ("XavierUniform", "relu", math.sqrt(2 / (200 + 400)), "uniform"),
        ("XavierNormal", "relu", math.sqrt(2 / (200 + 400)), "normal"),
        ("KaimingUniform", "relu", math.sqrt(2 / 200), "uniform"),
        ("KaimingNormal", "leakyrelu", math.sqrt(2 / 200), "normal"),
    ],
)
def test_layers_are_initialised_as_in_the_webui(init: Any, activation: str, std: float, shape: str) -> None:
    torch.manual_seed(0)
    layers = HypernetworkModule(200, Structure((1, 2, 1), activation, init, add_layer_norm=True)).linear
    first, norm = layers[0], layers[2]
    assert first.weight.std().item() == pytest.approx(std, rel=0.02)
    assert not first.bias.any() and not norm.bias.any()
    assert norm.weight.std().item() == pytest.approx(0.01, rel=0.2) and norm.weight.mean().abs() < 0.002
    edge = first.weight.abs().max().item() / std
    assert edge == pytest.approx(math.sqrt(3), rel=0.01) if shape == "uniform" else edge > 3.5


def test_derived_dropout_is_that_of_the_webui() -> None:
    assert derived_dropout(3) == (0, 0, 0)
    assert derived_dropout(4) == (0, 0.3, 0, 0)
    assert derived_dropout(4, last_layer=True) == (0, 0.3, 0.3, 0)
    assert derived_dropout(2, last_layer=True) == (0, 0.3)


def test_widths_are_found_in_the_model() -> None:
    with torch.device("meta"):
        sd1 = UNet2DConditionModel.from_config(SD1_CONFIGS["unet"])
        sd2 = UNet2DConditionModel.from_config({**SD1_CONFIGS["unet"], "cross_attention_dim": 1024})
        network = Hypernetwork(context_widths(sd1), Structure())
    assert context_widths(sd1) == [320, 640, 768, 1280]
    assert context_widths(sd2) == [320, 640, 1024, 1280]
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(21.9e6, rel=0.01)
    assert context_widths(tiny_model().unet) == [WIDTH]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write `one.pt` and `two.pt` for the tiny model, `other.pt` for another model; return their folder."""
    folder = tmp_path_factory.mktemp("hypernetworks")
    for seed, (name, width) in enumerate([("one", WIDTH), ("two", WIDTH), ("other", 48)]):
        torch.manual_seed(seed)
        network = Hypernetwork([width], Structure((1, 2, 1), "relu", "XavierNormal"))
        write_hypernetwork(network.to_file(name), folder / f"{name}.pt")
    return folder


@pytest.fixture
def pipe() -> Any:
    model = tiny_model()
    pipeline = StableDiffusionPipeline(
        **model.modules(),
        tokenizer=model.tokenizer,
        scheduler=DDIMScheduler.from_config(model.scheduler.config),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample(pipe: Any) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    found = pipe("a cat", num_inference_steps=2, generator=generator, output_type="pt")
    return found.images


def test_a_hypernetwork_is_applied_to_a_diffusers_pipeline_and_removed(pipe: Any, files: Path) -> None:
    plain, own = sample(pipe), {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    network = load_hypernetwork(pipe, files / "one.pt", multiplier=0)
    assert torch.equal(sample(pipe), plain)
    unload_hypernetworks(pipe)
    load_hypernetwork(pipe, str(files / "one.pt"))
    changed = sample(pipe)
    assert (changed - plain).abs().max() > 0.01
    assert pipe.unet.state_dict().keys() == own.keys()
    assert all(torch.equal(tensor, own[name]) for name, tensor in pipe.unet.state_dict().items())
    pipe.to(torch.bfloat16)
    assert torch.isfinite(sample(pipe)).all() and next(network.parameters()).dtype == torch.float32
    pipe.to(torch.float32)
    unload_hypernetworks(pipe)
    assert applied_hypernetworks(pipe.unet) == []
    with pytest.raises(ModelError, match=r"\[48\].*\[32\]"):
        load_hypernetwork(pipe, files / "other.pt")


def test_several_hypernetworks_act_in_order_each_with_its_strength(pipe: Any, files: Path) -> None:
    one, two = load_hypernetwork(pipe, files / "one.pt", 0.5), load_hypernetwork(pipe, files / "two.pt")
    assert applied_hypernetworks(pipe.unet) == [(one, 0.5), (two, 1.0)]
    attn = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2
    hidden, context = torch.randn(2, 4, attn.to_q.in_features), torch.randn(2, 7, WIDTH)
    keys = two.keys(one.keys(context, 0.5))
    values = two.values(one.values(context, 0.5))
    heads = [
        part.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        for part in (attn.to_q(hidden), attn.to_k(keys), attn.to_v(values))
    ]
    expected = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
    assert torch.allclose(attn(hidden, context), attn.to_out[0](expected), atol=1e-5)
    forwards = sample(pipe)
    set_hypernetworks(pipe.unet, [(two, 1.0), (one, 0.5)])
    assert (sample(pipe) - forwards).abs().max() > 1e-4


@pytest.mark.parametrize("processor", [AttnProcessor(), SlicedAttnProcessor(slice_size=1)])
def test_every_attention_processor_is_wrapped(processor: Any, pipe: Any, files: Path) -> None:
    load_hypernetwork(pipe, files / "one.pt")
    expected = sample(pipe)
    unload_hypernetworks(pipe)
    pipe.unet.set_attn_processor(processor)
    load_hypernetwork(pipe, files / "one.pt")
    assert torch.allclose(sample(pipe), expected, atol=1e-3)
    unload_hypernetworks(pipe)
    assert set(pipe.unet.attn_processors.values()) == {processor}


def test_incompatible_attention_is_refused(pipe: Any, files: Path) -> None:
    pipe.unet.fuse_qkv_projections()
    with pytest.raises(ModelError, match="unfuse_qkv_projections"):
        load_hypernetwork(pipe, files / "one.pt")
