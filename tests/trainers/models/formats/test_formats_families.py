"""Test single files of SD2 and SDXL: full sizes, round trips, diffusers' readers, v-prediction detection."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import tiny_family, tiny_model
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from dreamfleet.datasets.errors import FormatError
from dreamfleet.trainers.config.model import ModelConfig
from dreamfleet.trainers.models.family import load_model
from dreamfleet.trainers.models.formats.layout import FileState, empty_part, from_single_file, to_single_file
from dreamfleet.trainers.models.formats.ldm_names import (
    FAMILY_CONFIGS,
    SD1_CONFIGS,
    SD2_BASE_CONFIGS,
    SD2_CONFIGS,
    SDXL_CONFIGS,
    Config,
    Family,
    family_of,
    parts_of,
)
from dreamfleet.trainers.models.formats.model_header import config_of
from dreamfleet.trainers.models.formats.original_config import schedule_beside, write_original_config
from dreamfleet.trainers.models.formats.pickle_writer import load_pickle, save_pickle
from dreamfleet.trainers.models.formats.prediction import predicts_velocity
from dreamfleet.trainers.models.formats.single_file import load_single_file_parts
from dreamfleet.trainers.models.formats.tensor_files import write_safetensors
from dreamfleet.trainers.models.stable_diffusion.single_file import load_single_file

States = dict[str, dict[str, torch.Tensor]]

_SMALL = {
    "unet": {
        "sample_size": 8,
        "block_out_channels": [16, 32, 32],
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "cross_attention_dim": 32,
    },
    "vae": {"sample_size": 32, "block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4},
    "text_encoder": {"vocab_size": 90, "num_hidden_layers": 2},
    "text_encoder_2": {"vocab_size": 90, "num_hidden_layers": 2},
}
_WIDTHS = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "projection_dim": 12}


def small(family: Family) -> dict[str, Config]:
    """Return the family's configs with fewer and narrower layers."""
    configs = {part: {**config, **_SMALL.get(part, {})} for part, config in FAMILY_CONFIGS[family].items()}
    levels = ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"]
    configs["unet"] |= {"down_block_types": levels, "attention_head_dim": [2, 4, 4]}
    configs["unet"]["up_block_types"] = ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"]
    for part in ("down_block_types", "up_block_types"):
        configs["vae"][part] = configs["vae"][part][:2]
    for part in parts_of(family)[2:]:
        configs[part] |= _WIDTHS
    if family == "sdxl":
        configs["unet"] |= {
            "transformer_layers_per_block": [1, 2, 3],
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 12 + 6 * 8,
        }
    return configs


def filled(configs: dict[str, Config]) -> States:
    """Return random weights for every parameter of these configs, by part."""
    draw = torch.Generator().manual_seed(5)
    return {
        part: {
            key: torch.randn(tensor.shape, generator=draw)
            for key, tensor in empty_part(part, configs[part]).state_dict().items()
        }
        for part in parts_of(family_of(configs))
    }


def assert_equal(read: States, written: States) -> None:
    assert read.keys() == written.keys()
    for part, state in written.items():
        assert read[part].keys() == state.keys()
        assert all(torch.equal(read[part][key], state[key]) for key in state)


@pytest.mark.parametrize(
    ("configs", "tensors", "parameters"),
    [
        # Tensor counts and millions of parameters of the published files.
        (SD1_CONFIGS, {"unet": 686, "vae": 248, "text_encoder": 196}, {"unet": 859.5, "vae": 83.65}),
        (SD2_CONFIGS, {"unet": 686, "vae": 248, "text_encoder": 23 * 16 + 4}, {"unet": 865.9}),
        (SD2_BASE_CONFIGS, {"unet": 686}, {"unet": 865.9}),
        (
            SDXL_CONFIGS,
            {"unet": 1680, "vae": 248, "text_encoder": 196, "text_encoder_2": 32 * 16 + 5},
            {"unet": 2567.5, "text_encoder": 123.06, "text_encoder_2": 694.66},
        ),
    ],
)
def test_published_models_have_their_tensor_counts_and_names(
    configs: dict[str, Config], tensors: dict[str, int], parameters: dict[str, float]
) -> None:
    from diffusers.loaders import single_file_utils as theirs

    states = {
        part: dict(empty_part(part, configs[part]).state_dict()) for part in parts_of(family_of(configs))
    }
    for part, count in tensors.items():
        assert len(states[part]) == count
    for part, millions in parameters.items():
        assert sum(t.numel() for t in states[part].values()) / 1e6 == pytest.approx(millions, abs=0.06)
    file = dict(to_single_file(states, configs))
    for part, convert in (
        ("unet", theirs.convert_ldm_unet_checkpoint),
        ("vae", theirs.convert_ldm_vae_checkpoint),
    ):
        back = convert(dict(file), configs[part])
        assert {key: t.shape for key, t in back.items()} == {key: t.shape for key, t in states[part].items()}
    back = from_single_file(file, configs)
    assert {part: {key: t.shape for key, t in state.items()} for part, state in back.items()} == {
        part: {key: t.shape for key, t in state.items()} for part, state in states.items()
    }


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_a_round_trip_is_bit_equal_and_diffusers_agrees(family: Family, tmp_path: Path) -> None:
    from diffusers.loaders import single_file_utils as theirs

    configs = small(family)
    states = filled(configs)
    assert family_of(configs) == family
    path = tmp_path / "x.safetensors"
    write_safetensors(to_single_file(states, configs), path)
    file = load_file(path)
    assert_equal(load_single_file_parts(path, configs=configs).states, states)
    assert_equal(
        load_single_file_parts(
            save_pickle({"state_dict": file}, tmp_path / "x.ckpt"), configs=configs
        ).states,
        states,
    )
    converted = {
        "unet": theirs.convert_ldm_unet_checkpoint(dict(file), configs["unet"]),
        "vae": theirs.convert_ldm_vae_checkpoint(dict(file), configs["vae"]),
    }
    if family == "sd1":
        converted["text_encoder"] = theirs.convert_ldm_clip_checkpoint(dict(file))
    elif family == "sd2":
        module = empty_part("text_encoder", configs["text_encoder"])
        converted["text_encoder"] = theirs.convert_open_clip_checkpoint(module, dict(file))
    else:
        converted["text_encoder"] = theirs.convert_ldm_clip_checkpoint(dict(file))
        module = SimpleNamespace(config=SimpleNamespace(hidden_size=16))
        # diffusers splits joined tensors at the projection's width, which is the encoder's in the real model.
        square = {
            **file,
            "conditioner.embedders.1.model.text_projection": torch.zeros(16, 16),
        }
        converted["text_encoder_2"] = theirs.convert_open_clip_checkpoint(
            module, square, prefix="conditioner.embedders.1.model."
        )
        projection = file["conditioner.embedders.1.model.text_projection"]
        converted["text_encoder_2"]["text_projection.weight"] = projection.T
        assert projection.shape == (16, 12)
    for part in ("text_encoder", "text_encoder_2"):
        if part in converted:
            converted[part] = {
                key.removeprefix("text_model."): value for key, value in converted[part].items()
            }
    plain = {
        part: {key.removeprefix("text_model."): t for key, t in state.items()}
        for part, state in states.items()
    }
    assert_equal(converted, plain)


@pytest.mark.parametrize("family", ["sd2", "sd2-v", "sdxl"])
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_a_model_round_trips_through_a_single_file(family: str, suffix: str, tmp_path: Path) -> None:
    model = tiny_family(family)
    read = load_model(
        ModelConfig(pretrained_model_name_or_path=str(model.save_file(tmp_path / f"x{suffix}")))
    )
    assert read.uses_time_ids == (family == "sdxl") and read.prediction_type == model.prediction_type
    assert read.modules().keys() == model.modules().keys()
    for part, module in model.modules().items():
        assert_equal({part: read.modules()[part].state_dict()}, {part: module.state_dict()})
    ids = model.tokenize(["a cat, on the beach"])
    assert torch.equal(read.tokenize(["a cat, on the beach"]), ids)
    assert torch.equal(read.encode_tokens(ids).context, model.encode_tokens(ids).context)


def test_the_stock_sdxl_pipeline_loads_the_file(tmp_path: Path) -> None:
    from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline

    model = tiny_family("sdxl")
    # diffusers splits joined tensors at the projection's width, which is the encoder's in the real SDXL.
    config = CLIPTextConfig(
        **{**model.text_encoder_2.config.to_dict(), "projection_dim": model.text_encoder_2.config.hidden_size}
    )
    torch.manual_seed(1)
    model.text_encoder_2 = CLIPTextModelWithProjection(config).eval()
    path = model.save_file(tmp_path / "x.safetensors")
    model.save_folder(tmp_path / "folder")
    pipeline = StableDiffusionXLPipeline.from_single_file(
        str(path), config=str(tmp_path / "folder"), local_files_only=True, add_watermarker=False
    )
    for part, module in model.modules().items():
        assert_equal({part: getattr(pipeline, part).state_dict()}, {part: module.state_dict()})


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
@pytest.mark.parametrize(
    ("family", "changes", "marks"),
    [
        ("sdxl", {}, set()),
        ("sdxl", {"prediction_type": "v_prediction"}, {"v_pred"}),
        ("sdxl", {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}, {"v_pred", "ztsnr"}),
        ("sd2-v", {}, set()),
        ("sd1", {"prediction_type": "v_prediction"}, set()),
    ],
)
def test_an_sdxl_that_predicts_velocity_is_marked_for_comfyui(
    family: str, changes: dict[str, Any], marks: set[str], suffix: str, tmp_path: Path
) -> None:
    model = tiny_family(family)
    model.scheduler = type(model.scheduler).from_config(model.scheduler.config, **changes)
    path = model.save_file(tmp_path / f"x{suffix}")
    state = load_file(path) if suffix == ".safetensors" else load_pickle(path)["state_dict"]
    assert {name for name in state if "." not in name} == marks
    assert all(state[name].shape == (0,) for name in marks)
    path.with_suffix(".yaml").unlink(missing_ok=True)
    save_file(state, tmp_path / "bare.safetensors")  # without our header, only the marker keys remain
    configs = {part: config_of(module) for part, module in model.modules().items()}
    read = load_single_file_parts(tmp_path / "bare.safetensors", configs=configs).configs["scheduler"]
    assert (read.get("prediction_type") == "v_prediction") == bool(marks)
    assert read.get("rescale_betas_zero_snr", False) == ("ztsnr" in marks)


def test_an_sd2_file_has_the_projection_that_diffusers_splits_by(tmp_path: Path) -> None:
    model = tiny_family("sd2")
    state = load_file(model.save_file(tmp_path / "x.safetensors", dtype=torch.float16))
    projection = state["cond_stage_model.model.text_projection"]
    width = model.text_encoder.config.hidden_size
    assert (projection.shape, projection.dtype) == ((width, width), torch.float16)
    # The webui computes with this projection, but nothing uses the result.
    assert torch.equal(projection, torch.eye(width, dtype=torch.float16))
    joined = state["cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight"]
    queries = model.text_encoder.state_dict()["encoder.layers.0.self_attn.q_proj.weight"]
    assert torch.equal(joined[: len(projection)], queries.half())
    assert width != model.text_encoder.config.projection_dim  # used by diffusers 0.32 without the projection


def test_known_names_of_the_other_families() -> None:
    for family, shapes in {
        "sd2": {
            "cond_stage_model.model.positional_embedding": [77, 1024],
            "cond_stage_model.model.transformer.resblocks.22.attn.in_proj_weight": [3072, 1024],
            "cond_stage_model.model.transformer.resblocks.0.mlp.c_fc.bias": [4096],
            "model.diffusion_model.input_blocks.1.1.proj_in.weight": [320, 320],
            "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": [320, 1024],
        },
        "sdxl": {
            "conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight": [49408, 768],
            "conditioner.embedders.1.model.ln_final.weight": [1280],
            "conditioner.embedders.1.model.text_projection": [1280, 1280],
            "conditioner.embedders.1.model.transformer.resblocks.31.attn.in_proj_bias": [3840],
            "model.diffusion_model.label_emb.0.0.weight": [1280, 2816],
            "model.diffusion_model.label_emb.0.2.weight": [1280, 1280],
            "model.diffusion_model.middle_block.1.transformer_blocks.9.attn2.to_k.weight": [1280, 2048],
            "model.diffusion_model.output_blocks.5.2.conv.weight": [640, 640, 3, 3],
        },
    }.items():
        configs: dict[str, Config] = FAMILY_CONFIGS[family]  # type: ignore[index]
        parts = parts_of(family)  # type: ignore[arg-type]
        states = {part: dict(empty_part(part, configs[part]).state_dict()) for part in parts}
        file = to_single_file(states, configs)
        assert {key: list(file[key].shape) for key in shapes} == shapes
        assert not any("text_projection.weight" in key for key in file)


def test_additional_tensors_of_original_files_are_ignored(tmp_path: Path) -> None:
    configs = small("sd2")
    states = filled(configs)
    file = dict(to_single_file(states, configs))
    block = "cond_stage_model.model.transformer.resblocks"
    file |= {  # OpenCLIP's last layer and head, which SD2 does not use
        key.replace(f"{block}.1.", f"{block}.2."): tensor
        for key, tensor in file.items()
        if f"{block}.1." in key
    }
    file |= {"cond_stage_model.model.text_projection": torch.ones(16, 16)}
    file |= {"cond_stage_model.model.logit_scale": torch.tensor(4.6), "model_ema.decay": torch.tensor(1.0)}
    assert_equal(from_single_file(file, configs), states)
    assert not any(t._is_view() for t in from_single_file(file, configs)["text_encoder"].values())


def test_files_of_other_converters_are_read(tmp_path: Path) -> None:
    for family in ("sd2", "sdxl"):
        configs = small(family)  # type: ignore[arg-type]
        states = filled(configs)
        file = dict(to_single_file(states, configs))
        if family == "sd2":  # as written by a converter that treats the text encoder as SD1's
            file = {key: t for key, t in file.items() if not key.startswith("cond_stage_model")}
            file |= {f"cond_stage_model.transformer.{key}": t for key, t in states["text_encoder"].items()}
        else:
            file = {key.replace("transformer.text_model.", "transformer."): t for key, t in file.items()}
        key = "model.diffusion_model.input_blocks.3.1.proj_in.weight"
        assert file[key].ndim == 2
        file[key] = file[key][:, :, None, None]
        assert_equal(from_single_file(file, configs), states)


def test_joined_tensors_are_concatenated_one_at_a_time() -> None:
    configs = small("sdxl")
    states = filled(configs)
    file = to_single_file(states, configs)
    assert isinstance(file, FileState)
    own = {t.data_ptr() for state in states.values() for t in state.values()}
    joined = [key for key in file if file[key].data_ptr() not in own]
    assert all("in_proj" in key for key in joined) and len(joined) == 4


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_yaml_has_what_the_webui_needs(family: Family, prediction: str, tmp_path: Path) -> None:
    configs = {
        part: config_of(empty_part(part, config))
        for part, config in FAMILY_CONFIGS[family].items()
        if part != "scheduler"
    }
    scheduler = {**FAMILY_CONFIGS[family]["scheduler"], "prediction_type": prediction}
    path = tmp_path / "cat.safetensors"
    if prediction == "epsilon":
        assert write_original_config(path, configs, scheduler) is None
        assert schedule_beside(path) == {} and list(tmp_path.iterdir()) == []
        return
    scheduler["rescale_betas_zero_snr"] = True
    beside = write_original_config(path, configs, scheduler)
    assert beside == tmp_path / "cat.yaml"
    changes = schedule_beside(path)
    assert changes["prediction_type"] == "v_prediction" and changes["rescale_betas_zero_snr"] is True
    tree = yaml.safe_load(beside.read_text("utf-8"))
    params = tree["model"]["params"]
    unet = params["network_config" if family == "sdxl" else "unet_config"]["params"]
    expected: dict[str, Any] = {
        "sd1": {
            "context_dim": 768,
            "num_heads": 8,
            "attention_resolutions": [4, 2, 1],
            "channel_mult": [1, 2, 4, 4],
        },
        "sd2": {"context_dim": 1024, "num_head_channels": 64, "use_linear_in_transformer": True},
        "sdxl": {
            "context_dim": 2048,
            "num_head_channels": 64,
            "adm_in_channels": 2816,
            "transformer_depth": [1, 2, 10],
            "attention_resolutions": [4, 2],
            "channel_mult": [1, 2, 4],
        },
    }[family]
    assert {key: unet[key] for key in expected} == expected
    if family == "sdxl":
        assert params["denoiser_config"]["params"]["scaling_config"]["target"].endswith(".VScaling")
        assert len(params["conditioner_config"]["params"]["emb_models"]) == 5
    else:
        assert params["parameterization"] == "v"
        assert ("OpenCLIP" in params["cond_stage_config"]["target"]) == (family == "sd2")


def test_the_prediction_is_found_in_header_yaml_or_keys(tmp_path: Path) -> None:
    model = tiny_model("v_prediction")
    path = model.save_file(tmp_path / "cat.safetensors")
    assert (tmp_path / "cat.yaml").is_file()
    assert not tiny_model().save_file(tmp_path / "plain.safetensors").with_suffix(".yaml").exists()
    with safe_open(path, framework="pt") as file:
        header = {key: value for key, value in file.metadata().items() if "scheduler" not in key}
    state = load_file(path)

    def predicted(**more: Any) -> str | None:
        config = load_single_file_parts(tmp_path / "other.safetensors", **more).configs["scheduler"]
        return config.get("prediction_type")

    save_file(state, tmp_path / "other.safetensors", metadata=header)
    assert predicted() == "v_prediction"  # from the modelspec entry
    del header["modelspec.prediction_type"]
    save_file(state, tmp_path / "other.safetensors", metadata=header)
    assert predicted() == "epsilon"
    save_file({**state, "v_pred": torch.zeros(0)}, tmp_path / "other.safetensors", metadata=header)
    assert predicted() == "v_prediction"
    save_file(state, tmp_path / "other.safetensors", metadata=header)
    (tmp_path / "other.yaml").write_text('model: {params: {parameterization: "v"}}')
    assert predicted() == "v_prediction"
    assert load_single_file(tmp_path / "other.safetensors").prediction_type == "v_prediction"
    # Our header takes precedence over an unrelated .yaml.
    (tmp_path / "cat.yaml").write_text("model: {params: {parameterization: eps}}")
    assert load_single_file(path).prediction_type == "v_prediction"


@pytest.mark.parametrize("value", ["[v]", "{v: 1}", "3"])
def test_an_invalid_parameterization_is_ignored(value: str, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(f"model: {{params: {{parameterization: {value}}}}}")
    assert schedule_beside(tmp_path / "x.safetensors") == {}


@pytest.mark.parametrize(
    "text",
    [
        "model: [",
        "a: !!python/object/apply:os.getcwd []",
        "[" * 3000,
        "\xff\x00",
        "a: 2001-99-99",
        "!!bool x",
        "!!float ''",
        "!!timestamp x",
    ],
    ids=["cut", "code", "deep", "binary", "date", "bool", "float", "timestamp"],
)
def test_a_broken_yaml_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_bytes(text.encode("latin-1"))
    with pytest.raises(FormatError, match=r"x\.yaml: "):
        schedule_beside(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    "text", ["", "3", "model: 3", "model: {params: [1]}", "model: {params: {parameterization: []}}"]
)
def test_a_yaml_without_prediction_changes_nothing(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(text)
    assert schedule_beside(tmp_path / "x.ckpt") == {}


def test_the_prediction_of_an_undeclared_sd2_is_tested() -> None:
    class Unet:
        config = SimpleNamespace(block_out_channels=[1] * 4, in_channels=4, cross_attention_dim=1024)
        dtype = torch.float32

        def __init__(self, answer: float):
            self.answer = answer

        def __call__(self, latents: torch.Tensor, time: torch.Tensor, context: torch.Tensor, **_: Any) -> Any:
            assert (latents.shape, context.shape, int(time)) == ((1, 4, 8, 8), (1, 2, 1024), 999)
            return (torch.full_like(latents, self.answer),)

    assert predicts_velocity(Unet(-0.9))  # far below the input of 0.5, as velocity is
    assert not predicts_velocity(Unet(0.5))


def test_a_plain_sd2_file_declares_no_prediction(tmp_path: Path) -> None:
    from dreamfleet.trainers.models.formats.single_file import configs_for

    file = {"cond_stage_model.model.ln_final.weight": torch.ones(1024)}
    configs = configs_for(file, {}, tmp_path / "x.safetensors")
    assert configs["text_encoder"]["num_hidden_layers"] == 23
    assert "prediction_type" not in configs["scheduler"]
    assert SD2_CONFIGS["scheduler"]["prediction_type"] == "v_prediction"
    (tmp_path / "x.yaml").write_text("model: {params: {parameterization: eps}}")
    configs = configs_for(file, {}, tmp_path / "x.safetensors")
    assert (configs["unet"]["sample_size"], configs["scheduler"]["prediction_type"]) == (64, "epsilon")
    xl = configs_for(
        {"conditioner.embedders.1.model.ln_final.weight": torch.ones(1280)}, {}, tmp_path / "x.ckpt"
    )
    assert family_of(xl) == "sdxl" and xl["scheduler"]["prediction_type"] == "epsilon"
