"""Test DoRA: its formula, training and resume, and that diffusers and peft load what it exports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from engine_parts import make_parts
from safetensors.torch import load_file
from small_runs import assert_same, final_state, recipe_tree

from dreamfleet.datasets.errors import ModelError, RecipeError
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.config.model import ModelConfig
from dreamfleet.trainers.config.packing import find_unpackable
from dreamfleet.trainers.models.family import load_model
from dreamfleet.trainers.models.formats.file_names import DIFFUSERS_LORA
from dreamfleet.trainers.models.formats.lora import read_lora
from dreamfleet.trainers.models.lora import merged, set_loras, trained_layers
from dreamfleet.trainers.recipe import build_recipe
from dreamfleet.trainers.run.run import run_worker

DORA: dict[str, Any] = {
    "name": "native",
    "train_text_encoder": True,
    "lora_rank": 4,
    "lora_alpha": 6,
    "use_dora": True,
    "lora_target_modules": "locon",
}


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {
        f"{part}.{name}": tensor.detach().clone()
        for part, module in model.modules().items()
        for name, tensor in module.state_dict().items()
        if name.endswith("weight") and "lora" not in name
    }


def predicted(unet: Any, context: torch.Tensor) -> torch.Tensor:
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return unet(latents, torch.tensor([500]), context, return_dict=False)[0]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a short run with DoRA on every linear layer and convolution."""
    folder = tmp_path_factory.mktemp("dora")
    tree = recipe_tree(
        folder,
        "tuned",
        method=DORA,
        optimizer__learning_rate=2e-2,
        train__export_formats=["diffusers_lora", "kohya_lora"],
    )
    run_worker(build_recipe(tree))
    return folder


def base_of(run: Path) -> Any:
    return load_model(ModelConfig(pretrained_model_name_or_path=str(run / "model")))


def test_merged_weights_have_the_trained_lengths_and_directions(tmp_path: Path) -> None:
    # Liu et al. 2024 (arXiv 2402.09353), eq. 5, with one length for each output: W' = m (W + BA) / |W + BA|.
    parts = make_parts(tmp_path, method=DORA)
    before = weights(base_of(tmp_path))
    layers = trained_layers(parts.model)
    assert all(torch.allclose(m.magnitude, before[f"{name}.weight"].flatten(1).norm(dim=1), rtol=1e-4)
               for name, m in plain_names(layers).items()), "the model is unchanged at the start"  # fmt: skip
    torch.manual_seed(1)
    with torch.no_grad():
        for param in parts.engine.params.values():
            param.add_(0.1 * torch.randn_like(param))
    with merged(parts.model):
        after = weights(parts.model)
    for name, (down, up, alpha, lengths) in plain_names(trained_layers(parts.model)).items():
        weight = before[f"{name}.weight"]
        changed = weight.flatten(1) + alpha / 4 * up.flatten(1) @ down.flatten(1)
        expected = lengths[:, None] * changed / changed.norm(dim=1, keepdim=True)
        assert torch.allclose(after[f"{name}.weight"].flatten(1), expected, atol=1e-5), name


def plain_names(layers: dict[str, Any]) -> dict[str, Any]:
    """Return layers by the names of this version of transformers, which has no ``text_model``."""
    return {name.replace("text_encoder.text_model.", "text_encoder."): m for name, m in layers.items()}


def test_a_stopped_run_equals_an_uninterrupted_one_and_trains_lengths(run: Path) -> None:
    broken = recipe_tree(run, "broken", method=DORA, optimizer__learning_rate=2e-2)
    assert run_worker(build_recipe(broken), should_stop=tiny.Stop(2)).exit_reason == "interrupted"
    run_worker(build_recipe(broken), resume=True)
    # Other programs show other images with kohya's layout.
    assert Storage(broken["output_dir"]).list("exports") == [DIFFUSERS_LORA]
    straight = recipe_tree(run, "tuned", method=DORA)
    assert_same(final_state(straight), final_state(broken))
    assert any("magnitude" in name for name in final_state(straight)[0])


def test_both_files_apply_as_the_trained_model(run: Path) -> None:
    exports = Storage(str(run / "tuned")).path("exports")
    context = base_of(run).encode(["a cat"]).context
    plain = predicted(base_of(run).unet, context)
    found = []
    for name in (DIFFUSERS_LORA, "tuned.safetensors"):
        model = base_of(run)
        set_loras(model, [(read_lora(Path(exports) / name), 1.0)])
        found.append(predicted(model.unet, context))
        with merged(model):
            assert torch.allclose(predicted(model.unet, context), found[-1], atol=1e-5)
        with pytest.raises(ModelError, match=r"DoRA.*must be 1, not 0\.5"):
            set_loras(model, [(read_lora(Path(exports) / name), 0.5)])
    assert torch.allclose(found[0], found[1], atol=1e-5)
    assert not torch.allclose(found[0], plain, atol=1e-3)


def test_diffusers_and_peft_load_the_export(run: Path) -> None:
    exports = Path(Storage(str(run / "tuned")).path("exports"))
    ours = base_of(run)
    set_loras(ours, [(read_lora(exports / DIFFUSERS_LORA), 1.0)])
    context = ours.encode(["a cat"]).context
    pipeline = StableDiffusionPipeline.from_pretrained(str(run / "model"), safety_checker=None)
    before = pipeline.unet.state_dict()
    pipeline.load_lora_weights(str(exports))
    assert pipeline.unet.peft_config["default_0"].use_dora
    with torch.no_grad():
        ids = torch.as_tensor(ours.tokenize(["a cat"]))
        assert torch.allclose(pipeline.text_encoder(ids)[0], context, atol=1e-5)
    assert torch.allclose(predicted(pipeline.unet, context), predicted(ours.unet, context), atol=1e-5)
    pipeline.fuse_lora()  # peft's own merge
    pipeline.unload_lora_weights()
    assert before.keys() and torch.allclose(
        predicted(pipeline.unet, context), predicted(ours.unet, context), atol=1e-4
    )


def test_the_kohya_layout_has_the_keys_and_shapes_of_lycoris(run: Path) -> None:
    # LyCORIS, lycoris/modules/locon.py, with wd_on_output: dora_scale is [out, 1], of convolutions [out, 1, 1, 1].
    state = load_file(Path(Storage(str(run / "tuned")).path("exports")) / "tuned.safetensors")
    scales = {name: tensor for name, tensor in state.items() if name.endswith(".dora_scale")}
    ups = {name for name in state if name.endswith(".lora_up.weight")}
    assert {name.removesuffix(".dora_scale") for name in scales} == {
        name.removesuffix(".lora_up.weight") for name in ups
    }
    for name, scale in scales.items():
        down = state[name.replace("dora_scale", "lora_down.weight")]
        up = state[name.replace("dora_scale", "lora_up.weight")]
        assert scale.shape == (len(up), *[1] * (down.ndim - 1)), name


def test_what_cannot_be_combined_is_refused(tmp_path: Path) -> None:
    def recipe(method: dict[str, Any], **changes: Any) -> Any:
        return build_recipe(tiny.make_recipe(tmp_path, method={**DORA, **method}, **changes))

    with pytest.raises(RecipeError, match="use_dora needs lora_rank"):
        recipe({"lora_rank": None, "lora_alpha": None, "lora_target_modules": None})
    with pytest.raises(RecipeError, match=r"use_dora cannot.*rank_dropout"):
        recipe({"rank_dropout": 0.1})
    with pytest.raises(RecipeError, match=r"use_dora reads whole weights.*zero_stage: 3"):
        recipe({}, engine={"zero_stage": 3})
    assert "use_dora" in (find_unpackable(recipe({})) or "")
