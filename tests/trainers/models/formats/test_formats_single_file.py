"""Test single files: SD1's key names against diffusers' converter, round trips of unusual shapes, errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model
from webui_safety import assert_webui_safe

from dreamfleet.datasets.errors import FormatError, ModelError, StorageError
from dreamfleet.trainers.models.formats.layout import empty_part, from_single_file, to_single_file
from dreamfleet.trainers.models.formats.ldm_names import SD1_CONFIGS, file_place
from dreamfleet.trainers.models.formats.pickle_writer import save_pickle
from dreamfleet.trainers.models.formats.single_file import load_single_file_parts
from dreamfleet.trainers.models.stable_diffusion.single_file import load_single_file


def sd1_on_meta() -> dict[str, dict[str, torch.Tensor]]:
    parts = ("unet", "vae", "text_encoder")
    return {part: dict(empty_part(part, SD1_CONFIGS[part]).state_dict()) for part in parts}


def test_sd15_names_equal_those_that_diffusers_reads() -> None:
    from diffusers.loaders import single_file_utils as theirs

    states = sd1_on_meta()
    file = to_single_file(states, SD1_CONFIGS)
    counts = [
        sum(key.startswith(prefix) for key in file)
        for prefix in (
            "model.diffusion_model.",
            "first_stage_model.",
            "cond_stage_model.transformer.text_model.",
        )
    ]
    assert counts == [686, 248, 196]
    assert len(file) == 686 + 248 + 196
    for part, convert in (
        ("unet", theirs.convert_ldm_unet_checkpoint),
        ("vae", theirs.convert_ldm_vae_checkpoint),
    ):
        back = convert(dict(file), SD1_CONFIGS[part])
        assert {key: tensor.shape for key, tensor in back.items()} == {
            key: tensor.shape for key, tensor in states[part].items()
        }
    text = theirs.convert_ldm_clip_checkpoint(file)
    assert {key.removeprefix("text_model.") for key in text} == set(states["text_encoder"])


def test_known_names_of_the_ldm_layout() -> None:
    file = to_single_file(sd1_on_meta(), SD1_CONFIGS)
    shapes = {
        "model.diffusion_model.input_blocks.3.0.op.weight": [320, 320, 3, 3],
        "model.diffusion_model.input_blocks.4.0.skip_connection.weight": [640, 320, 1, 1],
        "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight": [1280, 768],
        "model.diffusion_model.output_blocks.2.1.conv.weight": [1280, 1280, 3, 3],
        "model.diffusion_model.output_blocks.5.2.conv.weight": [1280, 1280, 3, 3],
        "model.diffusion_model.output_blocks.11.1.proj_out.weight": [320, 320, 1, 1],
        "model.diffusion_model.out.2.weight": [4, 320, 3, 3],
        "first_stage_model.encoder.mid.attn_1.q.weight": [512, 512, 1, 1],
        "first_stage_model.encoder.mid.attn_1.norm.weight": [512],
        "first_stage_model.decoder.up.3.upsample.conv.weight": [512, 512, 3, 3],
        "first_stage_model.decoder.up.0.block.0.nin_shortcut.weight": [128, 256, 1, 1],
        "first_stage_model.decoder.norm_out.weight": [128],
        "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": [49408, 768],
        "cond_stage_model.transformer.text_model.final_layer_norm.bias": [768],
    }
    assert {key: list(file[key].shape) for key in shapes} == shapes


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("attention", [(0, 1, 1), (1, 1, 0, 1), (1, 0)])
def test_any_number_of_blocks_converts_as_in_diffusers(layers: int, attention: tuple[int, ...]) -> None:
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint

    blocks = len(attention)
    config: dict[str, Any] = {
        "block_out_channels": [8] * blocks,
        "layers_per_block": layers,
        "down_block_types": ["CrossAttnDownBlock2D" if on else "DownBlock2D" for on in attention],
        "up_block_types": ["CrossAttnUpBlock2D" if on else "UpBlock2D" for on in reversed(attention)],
        "cross_attention_dim": 8,
        "attention_head_dim": 2,
        "norm_num_groups": 2,
    }
    vae_config: dict[str, Any] = {
        "block_out_channels": [8] * blocks,
        "layers_per_block": layers,
        "down_block_types": ["DownEncoderBlock2D"] * blocks,
        "up_block_types": ["UpDecoderBlock2D"] * blocks,
        "norm_num_groups": 2,
    }
    configs = {"unet": config, "vae": vae_config}
    for part, convert in (("unet", convert_ldm_unet_checkpoint), ("vae", convert_ldm_vae_checkpoint)):
        state = dict(empty_part(part, configs[part]).state_dict())
        file = to_single_file({part: state}, configs)
        assert len(file) == len(state)
        assert {key: tensor.shape for key, tensor in convert(file, configs[part]).items()} == {
            key: tensor.shape for key, tensor in state.items()
        }


def equal_states(one: torch.nn.Module, two: torch.nn.Module) -> bool:
    a, b = one.state_dict(), two.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_an_unusual_model_round_trips(suffix: str, tmp_path: Path) -> None:
    model = tiny_model("v_prediction")
    path = model.save_file(tmp_path / f"cat{suffix}", metadata={"recipe": "x: 1"})
    if suffix == ".ckpt":
        assert_webui_safe(path)
    read = load_single_file(path, name="cat")
    for part, module in model.modules().items():
        assert equal_states(module, read.modules()[part])
    assert (read.prediction_type, read.resolution, read.vae_factor) == ("v_prediction", 32, 4)
    ids = model.tokenize(["a cat, on the beach"])
    assert torch.equal(read.tokenize(["a cat, on the beach"]), ids)
    assert torch.equal(read.encode_text(ids), model.encode_text(ids))
    latents, time = torch.randn(1, 4, 8, 8), torch.tensor([7])
    context = model.encode_text(ids)
    assert torch.equal(read.unet(latents, time, context)[0], model.unet(latents, time, context)[0])
    assert torch.equal(read.decode(latents), model.decode(latents))
    assert load_single_file_parts(path, needs=["vae"]).states.keys() == {"vae"}


def test_half_precision_and_header(tmp_path: Path) -> None:
    model = tiny_model()
    path = model.save_file(tmp_path / "cat.safetensors", dtype=torch.float16, metadata={"steps": "5"})
    tensors = load_file(path)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    weight = model.unet.conv_in.weight
    assert torch.equal(tensors["model.diffusion_model.input_blocks.0.0.weight"], weight.half())
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    assert header["steps"] == "5"
    assert header["modelspec.title"] == "cat"
    assert header["modelspec.resolution"] == "32x32"
    assert json.loads(header["dreamfleet.unet_config"])["layers_per_block"] == 1
    assert not any("/" in value for key, value in header.items() if key.endswith("_config"))
    assert load_single_file(path).unet.dtype == torch.float32
    assert (
        path.stat().st_size
        < 2.2 * sum(p.numel() for m in model.modules().values() for p in m.parameters()) + 80_000
    )


def test_learned_words_are_not_written(tmp_path: Path) -> None:
    from dreamfleet.trainers.models.embeddings import install_embedding

    model = tiny_model()
    plain = load_file(model.save_file(tmp_path / "a.safetensors"))
    install_embedding(model, "qzx", torch.ones(2, 32))
    assert load_file(model.save_file(tmp_path / "b.safetensors")).keys() == plain.keys()


def test_text_encoder_keys_without_text_model_are_accepted(tmp_path: Path) -> None:
    model = tiny_model()
    path = model.save_file(tmp_path / "a.safetensors")
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    state = {
        key.replace("transformer.text_model.", "transformer."): value
        for key, value in load_file(path).items()
    }
    save_file({**state, "model_ema.decay": torch.ones(1)}, tmp_path / "b.safetensors", metadata=header)
    assert equal_states(load_single_file(tmp_path / "b.safetensors").text_encoder, model.text_encoder)


def test_other_models_are_rejected(tmp_path: Path) -> None:
    conv = "model.diffusion_model.input_blocks.0.0.weight"
    cases: list[tuple[dict[str, torch.Tensor], str]] = [
        ({"conditioner.embedders.0.model.ln_final.weight": torch.ones(2)}, "refiner"),
        ({conv: torch.ones(320, 9, 3, 3)}, "inpainting"),
        ({conv: torch.ones(320, 8, 3, 3)}, "InstructPix2Pix"),
        ({"edm_mean": torch.ones(4)}, "Playground"),
        ({conv: torch.ones(8, 4, 3, 3)}, "has shape|lacks"),
        ({"lora_unet.weight": torch.ones(2)}, "no unet"),
    ]
    for state, message in cases:
        save_file(state, tmp_path / "x.safetensors")
        with pytest.raises(FormatError, match=rf"x\.safetensors: .*({message})"):
            load_single_file(tmp_path / "x.safetensors")
        with pytest.raises(FormatError, match=rf"x\.ckpt: .*({message})"):
            load_single_file(save_pickle({"state_dict": state}, tmp_path / "x.ckpt"))
    with pytest.raises(FormatError, match="no model"):
        load_single_file(save_pickle([1], tmp_path / "x.ckpt"))
    good = tiny_model().save_file(tmp_path / "good.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(good.read_bytes()[:-100])
    with pytest.raises(FormatError, match="safetensors"):
        load_single_file(tmp_path / "cut.safetensors")
    with pytest.raises(StorageError, match="gone"):
        load_single_file(tmp_path / "gone.safetensors")
    state = load_file(good)
    with safe_open(good, framework="pt") as file:
        whole = file.metadata()
    for header in (
        {"dreamfleet.unet_config": "{"},
        {"dreamfleet.unet_config": '{"block_out_channels": 3}'},
        {**whole, "dreamfleet.tokenizer": '{"..": "", "vocab.json": "{}"}'},
        {**whole, "dreamfleet.tokenizer": "[]"},
    ):
        save_file(state, tmp_path / "x.safetensors", metadata=header)
        with pytest.raises(FormatError, match=r"x\.safetensors: .*(damaged|no model|tokenizer)"):
            load_single_file(tmp_path / "x.safetensors")


def test_an_incomplete_model_is_not_saved(tmp_path: Path) -> None:
    model = tiny_model()
    model.vae = None
    with pytest.raises(ModelError, match="vae"):
        model.save_file(tmp_path / "a.safetensors")
    with pytest.raises(FormatError, match="no name"):
        file_place("unet", "class_embedding.linear_1.weight", SD1_CONFIGS["unet"], "sd1")
    with pytest.raises(FormatError, match="no name"):
        file_place("text_encoder", "text_projection.weight", {}, "sd1")
    with pytest.raises(FormatError, match="OpenCLIP"):
        file_place("text_encoder_2", "encoder.layers.0.rotary.weight", {}, "sdxl")


def test_plain_sd1_without_our_header_uses_sd1_configs() -> None:
    states = sd1_on_meta()
    file = to_single_file(states, SD1_CONFIGS)
    back = from_single_file(file, SD1_CONFIGS)
    assert {part: list(state) for part, state in back.items()} == {
        part: list(s) for part, s in states.items()
    }
