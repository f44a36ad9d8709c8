"""Test LoKr and LoHa: formulas, training and resume, files, and that they are applied beside other LoRAs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from engine_parts import make_parts
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_runs import assert_same, final_state, recipe_tree

from dreamfleet.datasets.errors import FormatError, RecipeError
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.artifacts.conversion import convert_artifact
from dreamfleet.trainers.config.model import ModelConfig
from dreamfleet.trainers.config.packing import find_unpackable
from dreamfleet.trainers.methods.export_request import Export
from dreamfleet.trainers.methods.whole_model import possible_formats
from dreamfleet.trainers.models.factor_layers import factorize
from dreamfleet.trainers.models.family import load_model
from dreamfleet.trainers.models.formats.lora import LoraFile, Matrices, read_lora
from dreamfleet.trainers.models.formats.lycoris import Factors
from dreamfleet.trainers.models.lora import add_adapters, merged, set_loras, trained_layers
from dreamfleet.trainers.recipe import build_recipe
from dreamfleet.trainers.run.run import run_worker

BASE: dict[str, Any] = {
    "name": "native",
    "train_text_encoder": True,
    "lora_rank": 2,
    "lora_alpha": 3,
    "lora_target_modules": "locon",
}
KINDS: dict[str, dict[str, Any]] = {
    "lokr": {"lora_type": "lokr", "lokr_factor": 4},
    "both": {"lora_type": "lokr", "lora_rank": 1, "lokr_decompose_both": True},
    "whole": {"lora_type": "lokr", "lokr_full_matrix": True, "lokr_factor": 4},
    "loha": {"lora_type": "loha"},
}


def predicted(unet: Any, context: torch.Tensor) -> torch.Tensor:
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return unet(latents, torch.tensor([500]), context, return_dict=False)[0]


@pytest.fixture(scope="module", params=["lokr", "loha"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a short run with every linear layer and convolution adapted."""
    folder = tmp_path_factory.mktemp(request.param)
    tree = recipe_tree(folder, "tuned", method=BASE | KINDS[request.param], optimizer__learning_rate=2e-2)
    run_worker(build_recipe(tree))
    return folder


def base_of(run: Path) -> Any:
    return load_model(ModelConfig(pretrained_model_name_or_path=str(run / "model")))


def exported(run: Path) -> Path:
    return Path(Storage(str(run / "tuned")).path("exports")) / "tuned.safetensors"


def change_of(state: dict[str, torch.Tensor], layer: str, size: torch.Size) -> torch.Tensor:
    """Return a layer's change by the papers' formulas (LyCORIS, arXiv 2309.14859, sections 3.2 and 3.3)."""
    part = {key.partition(".")[2]: value for key, value in state.items() if key.startswith(layer + ".")}
    alpha = float(part["alpha"])
    if "hada_w1_a" in part:
        product = (part["hada_w1_a"] @ part["hada_w1_b"]) * (part["hada_w2_a"] @ part["hada_w2_b"])
        return (alpha / len(part["hada_w1_b"]) * product).reshape(size)
    w1 = part["lokr_w1"] if "lokr_w1" in part else part["lokr_w1_a"] @ part["lokr_w1_b"]
    w2 = part["lokr_w2"] if "lokr_w2" in part else part["lokr_w2_a"] @ part["lokr_w2_b"]
    ranks = [len(value) for key, value in part.items() if key.endswith("_b")]
    scale = alpha / ranks[0] if ranks else 1.0
    blocks = [torch.cat([number * w2.flatten(1) for number in row], dim=1) for row in w1]
    if w2.ndim == 2 or w2.shape[2:].numel() == 1:
        return (scale * torch.cat(blocks)).reshape(size)
    a, c = w1.shape
    full = w1[:, None, :, None, None, None] * w2[None, :, None]
    return (scale * full).reshape(a * w2.shape[0], c * w2.shape[1], *w2.shape[2:])


@pytest.mark.parametrize("kind", KINDS)
def test_the_change_is_the_product_of_the_papers_and_zero_at_first(kind: str, tmp_path: Path) -> None:
    parts = make_parts(tmp_path, method=BASE | KINDS[kind])
    plain = base_of(tmp_path)
    before = {name: weight.clone() for name, weight in plain.unet.state_dict().items()}
    with merged(parts.model):
        assert all(
            torch.equal(before[name], weight) for name, weight in parts.model.unet.state_dict().items()
        )
    torch.manual_seed(1)
    with torch.no_grad():
        for param in parts.engine.params.values():
            param.add_(0.3 * torch.randn_like(param))
    context = plain.encode(["a cat"]).context
    outputs = predicted(parts.model.unet.eval(), context)
    [path] = parts.method.write(Export(tmp_path, "look", formats=("kohya_lora",)))
    state = load_file(path)
    with merged(parts.model):
        after = {name: weight.clone() for name, weight in parts.model.unet.state_dict().items()}
        assert torch.allclose(predicted(parts.model.unet, context), outputs, atol=1e-4)
    changed = 0
    for name, weight in before.items():
        layer = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
        if f"{layer}.alpha" in state:
            expected = weight + change_of(state, layer, weight.shape)
            assert torch.allclose(after[name], expected, atol=1e-5), name
            changed += not torch.allclose(after[name], weight, atol=1e-3)
    assert changed > 10
    ends = {key.partition(".")[2] for key in state}
    assert {"both": "lokr_w1_a", "whole": "lokr_w2", "lokr": "lokr_w2_a", "loha": "hada_w2_b"}[kind] in ends
    assert kind != "whole" or not any(end.endswith("_b") for end in ends)


def test_sizes_are_split_as_lycoris_does() -> None:
    # The table in LyCORIS 4.1, lycoris/functional/general.py: factorization.
    table = {127: (1, 1, 1), 128: (8, 2, 4), 250: (10, 2, 2), 360: (18, 2, 4), 1024: (32, 2, 4)}
    for size, smaller in table.items():
        for factor, first in zip((-1, 2, 4), smaller, strict=True):
            assert factorize(size, factor) == (first, size // first)
    assert factorize(32, 16) == (2, 16), "the smaller first"
    assert factorize(360, 16) == (15, 24)


def test_a_stopped_run_equals_an_uninterrupted_one(run: Path) -> None:
    method = BASE | KINDS["lokr" if run.name.startswith("lokr") else "loha"]
    broken = recipe_tree(run, "broken", method=method, optimizer__learning_rate=2e-2)
    assert run_worker(build_recipe(broken), should_stop=tiny.Stop(2)).exit_reason == "interrupted"
    run_worker(build_recipe(broken), resume=True)
    assert Storage(broken["output_dir"]).list("exports") == ["broken.safetensors"]
    straight = recipe_tree(run, "tuned", method=method)
    assert_same(final_state(straight), final_state(broken))
    assert any("lokr_w1" in name or "hada_w1_a" in name for name in final_state(straight)[0])


def test_the_export_is_applied_merged_and_converted_as_it_was_trained(run: Path, tmp_path: Path) -> None:
    path, model = exported(run), base_of(run)
    context = model.encode(["a cat"]).context
    plain = predicted(model.unet, context)
    set_loras(model, [(read_lora(path), 1.0)])
    tuned = predicted(model.unet, context)
    assert not torch.allclose(tuned, plain, atol=1e-3)
    assert not torch.allclose(model.encode(["a cat"]).context, context, atol=1e-4), "the text encoder too"
    assert not any(param.requires_grad for param in model.unet.parameters())
    with merged(model):
        assert torch.allclose(predicted(model.unet, context), tuned, atol=1e-5)
    set_loras(model, [])
    assert torch.equal(predicted(model.unet, context), plain)
    again = convert_artifact(path, tmp_path / "again.safetensors")
    assert all(torch.equal(value, load_file(again)[key]) for key, value in load_file(path).items())
    with safe_open(path, "pt") as file:
        header = file.metadata()
    assert header["ss_network_module"] == "lycoris.kohya"
    assert json.loads(header["ss_network_args"])["algo"] in ("lokr", "loha")


def test_it_is_applied_beside_a_lora_and_a_dora_and_merged_equally(run: Path) -> None:
    model = base_of(run)
    files = [read_lora(exported(run))]
    for use_dora in (False, True):
        other = base_of(run)
        add_adapters(other, other.lora_layers("locon", parts=["unet"]), rank=2, alpha=4, use_dora=use_dora)
        torch.manual_seed(2)
        layers = {
            name: Matrices(m.down, 0.3 * torch.randn_like(m.up), m.alpha, m.magnitude)
            for name, m in trained_layers(other).items()
        }
        files.append(LoraFile("dora" if use_dora else "lora", layers))
    context = model.encode(["a cat"]).context
    set_loras(model, [(files[0], 1.0)])
    alone = predicted(model.unet, context)
    for order in ([0, 1, 2], [1, 2, 0], [0, 2], [0, 0]):
        set_loras(model, [(files[n], 1.0) for n in order])
        applied = predicted(model.unet, context)
        assert not torch.allclose(applied, alone, atol=1e-3)
        with merged(model):
            assert torch.allclose(predicted(model.unet, context), applied, atol=1e-4), order


def test_the_strength_scales_the_change(run: Path) -> None:
    file = read_lora(exported(run))
    model, weights = base_of(run), []
    for strength in (0.0, 0.5, 1.0):
        set_loras(model, [(file, strength)])
        with merged(model):
            weights.append(model.unet.state_dict()["mid_block.resnets.0.conv1.weight"].clone())
    assert torch.allclose(weights[1] - weights[0], (weights[2] - weights[0]) / 2, atol=1e-6)
    assert torch.equal(weights[0], base_of(run).unet.state_dict()["mid_block.resnets.0.conv1.weight"])


def test_damaged_files_are_errors_that_name_the_layer(tmp_path: Path) -> None:
    name = "lora_unet_mid_block_attentions_0_proj_in"
    whole = {f"{name}.lokr_w1": torch.ones(2, 2), f"{name}.lokr_w2": torch.ones(16, 16)}
    for change, match in (
        ({f"{name}.lokr_w2_a": torch.ones(16, 1)}, "either the whole or both"),
        ({f"{name}.hada_w1_a": torch.ones(16, 1)}, "mixes"),
        ({f"{name}.dora_scale": torch.ones(32, 1)}, "weight decomposition"),
        ({f"{name}.lokr_w1": torch.full((2, 2), torch.nan)}, "training failed"),
        ({f"{name}.lokr_w1": torch.ones(2)}, "shape"),
        ({f"{name}.alpha": torch.tensor(torch.inf)}, "not a number"),
        ({f"{name}.oft_blocks": torch.ones(2)}, r"LoHa and LoKr\s+files can"),
    ):
        save_file(whole | change, tmp_path / "bad.safetensors")
        with pytest.raises(FormatError, match=match):
            read_lora(tmp_path / "bad.safetensors")
    save_file(whole, tmp_path / "good.safetensors")
    found = read_lora(tmp_path / "good.safetensors").factors["unet.mid_block.attentions.0.proj_in"]
    assert found.shape() == (32, 32) and found.scale == 1.0
    assert Factors("lokr", found.tensors, 7.0).scale == 1.0, "alpha counts only beside a rank"


def test_what_cannot_be_combined_is_refused(tmp_path: Path) -> None:
    def recipe(method: dict[str, Any], **changes: Any) -> Any:
        return build_recipe(tiny.make_recipe(tmp_path, method={**BASE, **KINDS["lokr"], **method}, **changes))

    with pytest.raises(RecipeError, match="needs lora_rank"):
        recipe({"lora_rank": None, "lora_alpha": None, "lora_target_modules": None, "lokr_factor": None})
    with pytest.raises(RecipeError, match="lokr_factor is an option of lora_type: lokr"):
        recipe({"lora_type": "loha"})
    with pytest.raises(RecipeError, match="lokr_factor must be -1 or at least 1"):
        recipe({"lokr_factor": 0})
    for key, value in (("use_dora", True), ("rank_dropout", 0.1), ("scale_weight_norms", 1.0)):
        with pytest.raises(RecipeError, match=f"{key}.*lora_type: lokr"):
            recipe({key: value})
    with pytest.raises(RecipeError, match=r"loraplus_lr_ratio.*lokr"):
        recipe({"loraplus_lr_ratio": 4})
    with pytest.raises(RecipeError, match=r"lokr.*zero_stage: 3"):
        recipe({}, engine={"zero_stage": 3})
    assert "diffusers_lora" not in possible_formats(recipe({}).method)
    assert "lora_type: lokr" in (find_unpackable(recipe({})) or "")


def test_kohyas_names_of_the_keys_and_rates_by_part(tmp_path: Path) -> None:
    method = {k: v for k, v in BASE.items() if k != "lora_rank"}
    theirs = {"network_dim": 2, "algo": "lokr", "factor": 4, "decompose_both": True, "module_dropout": 0.1}
    parts = make_parts(tmp_path, method=method | theirs, optimizer={"text_encoder_lr": 1e-5})
    assert parts.recipe.method.lora_type == "lokr" and parts.recipe.method.lokr_factor == 4
    rates = {group.name: list(group.params) for group in parts.method.groups()}
    assert set(rates) == {"unet", "text_encoder"}
    assert all(name.rpartition(".")[2].startswith("lokr_") for names in rates.values() for name in names)


def test_no_random_number_is_drawn_without_dropout(tmp_path: Path) -> None:
    # The plan of a run's memory traces a pass in training mode, where a drawn number has no value.
    for dropout, is_equal in ((0.0, True), (0.1, False)):
        parts = make_parts(tmp_path / str(dropout), method=BASE | KINDS["lokr"] | {"module_dropout": dropout})
        context = parts.model.encode(["a cat"]).context
        before = torch.get_rng_state()
        predicted(parts.model.unet.train(), context)
        assert torch.equal(before, torch.get_rng_state()) is is_equal
