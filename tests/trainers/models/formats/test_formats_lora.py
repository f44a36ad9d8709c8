"""Test LoRA files: round trips of both layouts, equal images in diffusers, old forms, malicious files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from drawing import generate
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from stock_models import load, stock_pipeline
from tiny_models import tiny_family, tiny_model
from torch import Tensor
from typer.testing import CliRunner

from dreamfleet.cluster.cli import program
from dreamfleet.datasets.errors import FormatError, ModelError, UserError
from dreamfleet.trainers.config.methods.dreambooth import DreamBoothConfig
from dreamfleet.trainers.methods.export_request import Export
from dreamfleet.trainers.methods.whole_model import LORA_FORMATS, export_tuned, learning_parts
from dreamfleet.trainers.models.embeddings import install_embedding, remove_embeddings, spliced_table
from dreamfleet.trainers.models.family import DiffusionModel
from dreamfleet.trainers.models.formats.embedding import Embedding, write_embedding
from dreamfleet.trainers.models.formats.file_names import DIFFUSERS_LORA
from dreamfleet.trainers.models.formats.lora import (
    LoraFile,
    Matrices,
    holds_lora,
    read_lora,
    write_diffusers_lora,
    write_kohya_lora,
)
from dreamfleet.trainers.models.formats.lora_names import kohya_name, layer_of_key
from dreamfleet.trainers.models.formats.tensor_files import read_safetensors, write_safetensors
from dreamfleet.trainers.models.lora import add_adapters, merged, set_loras, trained_layers
from dreamfleet.trainers.models.pretrained import pocket_folder

QUERY = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"


def tuned(model: DiffusionModel, *, targets: Any = None, rank: int = 4, alpha: float = 6.0) -> LoraFile:
    """Add random adapters that change a model's images; return them as a LoRA file."""
    parts = [part for part in model.modules() if part != "vae"]
    learning = add_adapters(model, model.lora_layers(targets, parts=parts), rank=rank, alpha=alpha)
    torch.manual_seed(1)
    with torch.no_grad():
        for param in learning.parameters():
            param.add_(0.1 * torch.randn_like(param))
    return LoraFile("look", trained_layers(model), {"dreamfleet_step": "7", "dreamfleet_base_model": "tiny"})


def write_both(file: LoraFile, folder: Path, model: DiffusionModel, **options: Any) -> list[Path]:
    config = dict(model.denoiser.config)
    family: Any = "sdxl" if model.uses_time_ids else None
    return [
        write_diffusers_lora(file, folder / DIFFUSERS_LORA, **options),
        write_kohya_lora(file, folder / "look.safetensors", family=family, unet_config=config, **options),  # type: ignore[arg-type]  # it is a family
    ]


def pixels(images: list[Any]) -> Tensor:
    return torch.stack([torch.frombuffer(bytearray(p.tobytes()), dtype=torch.uint8).float() for p in images])


def draw(model: DiffusionModel) -> Tensor:
    options = {"seeds": [3], "steps": 4, "guidance_scale": 3.0, "negative_prompt": "b"}
    return pixels(generate(model, ["a cat"], **options))  # type: ignore[arg-type]


def draw_stock(pipeline: Any) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    found = pipeline(
        "a cat", negative_prompt="b", num_inference_steps=4, guidance_scale=3.0, generator=generator
    )
    return pixels(found.images)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "targets"), [("sd1", "locon"), ("sd2", None), ("sdxl", "locon")])
def test_stock_diffusers_generates_equal_images_from_both_layouts(
    tmp_path: Path, family: str, targets: Any
) -> None:
    tiny_family(family).save_folder(tmp_path / "model")
    model = load(tmp_path / "model")
    base = draw(model)
    file = tuned(model, targets=targets)
    expected = draw(model)
    assert (expected - base).abs().mean() > 1  # otherwise the comparison below proves nothing
    with merged(model):
        assert (draw(model) - expected).abs().max() <= 1
    layers = model.denoiser.config.layers_per_block
    for path in write_both(file, tmp_path, model):
        assert holds_lora(path)
        found = read_lora(path, layers_per_block=layers)
        assert found.layers.keys() == file.layers.keys()
        other = load(tmp_path / "model")
        set_loras(other, [(found, 1.0)])
        assert (draw(other) - expected).abs().max() <= 1, path
        set_loras(other, [(found, 0.25), (found, 0.75)])
        assert (draw(other) - expected).abs().max() <= 1, path
        set_loras(other, [])
        assert torch.equal(draw(other), base)
        pipeline = stock_pipeline(tmp_path / "model", family)
        pipeline.load_lora_weights(tmp_path, weight_name=path.name)
        assert (draw_stock(pipeline) - expected).abs().max() <= 1, path


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_layers_outside_the_blocks_are_read(tmp_path: Path, family: str) -> None:
    model = tiny_family(family)
    file = tuned(model, targets=["conv_in", "conv_out", "linear_1", "linear_2", "to_q"])
    ends = {"unet.conv_in", "unet.conv_out", "unet.time_embedding.linear_1"}
    assert file.layers.keys() >= ends | ({"unet.add_embedding.linear_2"} if family == "sdxl" else set())
    expected, layers = draw(model), model.denoiser.config.layers_per_block
    for path in write_both(file, tmp_path, model):
        other = tiny_family(family)
        set_loras(other, [(read_lora(path, layers_per_block=layers), 1.0)])
        assert (draw(other) - expected).abs().max() <= 1, path


def test_kohya_layout_and_header_entries(tmp_path: Path) -> None:
    file = tuned(tiny_model())
    path = write_kohya_lora(file, tmp_path / "look.safetensors", dtype=torch.float16)
    tensors, header = read_safetensors(path)
    name = "lora_unet_" + QUERY.replace(".", "_")
    assert tensors[f"{name}.alpha"] == 6 and tensors[f"{name}.alpha"].dtype == torch.float32
    assert tensors[f"{name}.lora_down.weight"].shape == (4, 32)
    assert tensors[f"{name}.lora_up.weight"].dtype == torch.float16
    assert "lora_te_text_model_encoder_layers_2_self_attn_out_proj.lora_up.weight" in tensors
    assert len(tensors) == 3 * len(file.layers)
    wanted = {
        "ss_network_module": "networks.lora", "ss_network_dim": "4", "ss_network_alpha": "6.0", "ss_steps": "7",
        "ss_base_model_version": "sd_v1", "ss_v2": "False", "ss_output_name": "look", "ss_sd_model_name": "tiny",
        "modelspec.architecture": "stable-diffusion-v1/lora", "dreamfleet_step": "7",
    }  # fmt: skip
    assert wanted.items() <= header.items()
    assert len(header["sshs_model_hash"]) == 64
    import hashlib

    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    assert hashlib.sha256(content[start:]).hexdigest() == header["sshs_model_hash"]


@pytest.mark.parametrize(
    ("family", "version", "architecture", "prediction"),
    [
        ("sd1", "sd_v1", "stable-diffusion-v1/lora", "epsilon"),
        ("sd2", "sd_v2", "stable-diffusion-v2-512/lora", "epsilon"),
        ("sd2-v", "sd_v2_v", "stable-diffusion-v2-768-v/lora", "v"),
        ("sdxl", "sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora", "epsilon"),
    ],
)
def test_an_export_names_its_base_model_as_kohya_does(
    family: str, version: str, architecture: str, prediction: str, tmp_path: Path
) -> None:
    model = tiny_family(family)
    config: Any = DreamBoothConfig.model_validate(
        {"name": "dreambooth", "lora_rank": 2, "lora_target_modules": ["q_proj"], "train_text_encoder": True}
    )
    learning_parts(model, config)
    paths = export_tuned(config, model, Export(tmp_path, "look", formats=LORA_FORMATS))
    assert [read_safetensors(path)[1]["modelspec.prediction_type"] for path in paths] == [prediction] * 2
    entries = read_safetensors(paths[1])[1]
    assert (entries["ss_base_model_version"], entries["modelspec.architecture"]) == (version, architecture)
    # Also after conversion to diffusers' layout, and with kohya's header entries only.
    theirs = write_diffusers_lora(read_lora(paths[1]), tmp_path / DIFFUSERS_LORA)
    again = write_kohya_lora(read_lora(theirs), tmp_path / "again.safetensors", family=model.family)
    assert read_safetensors(again)[1]["ss_base_model_version"] == version
    bare = replace(read_lora(paths[1]), metadata={"ss_base_model_version": version})
    again = write_kohya_lora(bare, tmp_path / "again.safetensors", family=model.family)
    assert read_safetensors(again)[1]["modelspec.architecture"] == architecture


BUNDLES: dict[str, dict[str, Tensor]] = {
    "sd1": {
        "bundle_emb.zq.string_to_param.*": torch.ones(2, 32),
        "bundle_emb.zq.string_to_token.*": torch.tensor([265]),
        "bundle_emb.old.emb_params": torch.ones(32),
    },
    "sdxl": {"bundle_emb.zq.clip_l": torch.ones(2, 32), "bundle_emb.zq.clip_g": torch.ones(2, 40)},
}


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_bundled_embeddings_are_words_while_the_lora_is_applied(family: str, tmp_path: Path) -> None:
    model = tiny_family(family)
    file = tuned(model, targets=["q_proj"])
    path = write_kohya_lora(file, tmp_path / "look.safetensors", family=model.family)
    tensors, header = read_safetensors(path)
    write_safetensors({**tensors, **BUNDLES[family]}, path, header=header)
    assert holds_lora(path)
    found = read_lora(path)
    assert found.layers.keys() == file.layers.keys()
    names = {"zq", "old"} if family == "sd1" else {"zq"}
    assert {embedding.name for embedding in found.embeddings} == names
    plain = tiny_family(family)
    base = plain.tokenize(["a zq b"])
    install_embedding(plain, "old", torch.zeros(1, 32), torch.zeros(1, 40) if plain.uses_time_ids else None)
    set_loras(plain, [(found, 1.0)])
    ids, table = plain.tokenize(["a zq b"]), spliced_table(plain.text_encoders[0])
    assert int((ids >= 90).sum()) == (4 if plain.uses_time_ids else 2)
    assert torch.equal(table.words["zq"], torch.ones(2, 32))
    assert torch.equal(table.words["old"], torch.zeros(1, 32))  # the user's embedding is unchanged
    assert torch.isfinite(plain.encode_tokens(ids).context).all()
    set_loras(plain, [])
    assert list(table.words) == ["old"]
    remove_embeddings(plain)
    assert torch.equal(plain.tokenize(["a zq b"]), base)


def test_a_bundled_embedding_equals_its_own_file_in_prompts_that_name_the_lora(
    tmp_path: Path,
) -> None:
    layer = "lora_unet_mid_block_attentions_0_proj_in"
    width = load(pocket_folder()).unet.mid_block.attentions[0].proj_in.weight.shape[0]
    nothing = {"lora_down.weight": torch.zeros(1, width, 1, 1), "lora_up.weight": torch.zeros(width, 1, 1, 1)}
    vectors = torch.randn(2, 160, generator=torch.Generator().manual_seed(0))
    tensors = {f"{layer}.{end}": tensor for end, tensor in nothing.items()}
    tensors["bundle_emb.zq.emb_params"] = vectors
    write_safetensors(tensors, tmp_path / "look.safetensors")
    write_embedding(Embedding("zq", vectors), tmp_path / "zq.pt")

    def sample(*options: str) -> list[bytes]:
        folder = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        arguments = ["sample", "--model", "pocket", "--steps", "1", "--num-images", "1", *options]
        places = ["--out", str(tmp_path / "grid.png"), "--out-dir", str(folder)]
        result = CliRunner().invoke(program.app, [*arguments, *places])
        assert result.exit_code == 0, result.output
        return [Image.open(path).tobytes() for path in sorted(folder.iterdir())]

    plain, tagged = "a zq cat", "a zq cat <lora:look:1>"
    [word] = sample("--embedding", str(tmp_path / "zq.pt"), "--prompt", plain)
    [bundled] = sample("--lora", str(tmp_path / "look.safetensors"), "--prompt", plain)
    first, second, third = sample(
        "--lora-dir", str(tmp_path), "--prompt", plain, "--prompt", tagged, "--prompt", plain
    )
    assert bundled == word == second
    assert first == third != word


def test_bundled_embeddings_are_kept_in_kohya_layout_and_dropped_with_a_warning_in_diffusers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    word = Embedding("zq", torch.ones(2, 32))
    file = replace(tuned(tiny_model()), embeddings=(word,))
    found = read_lora(write_kohya_lora(file, tmp_path / "look.safetensors"))
    assert torch.equal(found.embeddings[0].vectors, word.vectors)
    assert not read_lora(write_diffusers_lora(found, tmp_path / DIFFUSERS_LORA)).embeddings
    assert "zq" in caplog.text


@pytest.mark.parametrize(
    "bundle",
    [
        {"bundle_emb.zq.clip_l": torch.ones(2, 32), "bundle_emb.zq.other": torch.ones(2)},
        {"bundle_emb.zq": torch.ones(2, 32), "bundle_emb.zq.b.c": torch.ones(2, 32)},
        {"bundle_emb.zq.emb_params": torch.full((2, 32), torch.nan)},
        {"bundle_emb..emb_params": torch.ones(2, 32)},
    ],
)
def test_a_broken_bundled_embedding_is_an_error(bundle: dict[str, Tensor], tmp_path: Path) -> None:
    path = write_kohya_lora(tuned(tiny_model()), tmp_path / "look.safetensors")
    write_safetensors({**read_safetensors(path)[0], **bundle}, path)
    with pytest.raises(FormatError, match=r"look\.safetensors.*embedding"):
        read_lora(path)


def test_conversion_between_layouts_keeps_alpha_and_entries(tmp_path: Path) -> None:
    file = tuned(tiny_model())
    kohya = read_lora(write_kohya_lora(file, tmp_path / "look.safetensors"))
    theirs = read_lora(write_diffusers_lora(kohya, tmp_path / DIFFUSERS_LORA))
    again = read_lora(write_kohya_lora(theirs, tmp_path / "again.safetensors"))
    for layer, (down, up, alpha, _) in file.layers.items():
        assert torch.equal(kohya.layers[layer].down, down) and kohya.layers[layer].alpha == alpha
        assert again.layers[layer].alpha == 4
        assert torch.allclose(again.layers[layer].up / 4 * 4, up * alpha / 4, atol=1e-6)
    assert theirs.metadata["dreamfleet_step"] == "7"


def matrices(rank: int = 2, width: int = 32) -> dict[str, Tensor]:
    return {"down": torch.ones(rank, width), "up": torch.ones(width, rank)}


def test_old_and_new_names_refer_to_the_same_layer() -> None:
    out = QUERY.replace("to_q", "to_out.0")
    text = "text_encoder.text_model.encoder.layers.1.self_attn.q_proj"
    for key, layer, which in [
        (f"unet.{QUERY}.lora_A.weight", f"unet.{QUERY}", "down"),
        (f"unet.{QUERY}.lora.up.weight", f"unet.{QUERY}", "up"),
        (f"{QUERY.replace('.to_q', '.processor.to_q_lora')}.down.weight", f"unet.{QUERY}", "down"),
        (f"unet.{out.replace('.to_out.0', '.processor.to_out_lora')}.up.weight", f"unet.{out}", "up"),
        (f"{text}.lora_linear_layer.up.weight", text, "up"),
        ("text_encoder.encoder.layers.1.self_attn.q_proj.lora_B.weight", text, "up"),
        ("lora_te1_text_model_encoder_layers_1_self_attn_q_proj.alpha", text, "alpha"),
        ("lora_unet_conv_in.lora_up.weight", "unet.conv_in", "up"),
        ("lora_unet_input_blocks_0_0.lora_up.weight", "unet.conv_in", "up"),
        (
            "lora_unet_input_blocks_4_1_transformer_blocks_0_ff_net_0_proj.lora_down.weight",
            "unet.down_blocks.1.attentions.0.transformer_blocks.0.ff.net.0.proj",
            "down",
        ),
        (
            "lora_unet_output_blocks_2_1_proj_in.lora_down.weight",
            "unet.up_blocks.0.attentions.2.proj_in",
            "down",
        ),
        ("lora_unet_output_blocks_2_2_conv.lora_up.weight", "unet.up_blocks.0.upsamplers.0.conv", "up"),
        ("lora_unet_input_blocks_3_0_op.lora_up.weight", "unet.down_blocks.0.downsamplers.0.conv", "up"),
        (
            "lora_unet_middle_block_2_in_layers_2.lora_up.weight",
            "unet.mid_block.resnets.1.conv1",
            "up",
        ),
        (
            "lora_unet_up_blocks_1_resnets_0_conv_shortcut.alpha",
            "unet.up_blocks.1.resnets.0.conv_shortcut",
            "alpha",
        ),
    ]:
        assert layer_of_key(key) == (layer, which), key
    assert layer_of_key("lora_unet_x.oft_blocks") is None and layer_of_key("model.diffusion_model.x") is None
    sdxl = kohya_name("unet.down_blocks.1.attentions.0.proj_in", sdxl=True)
    assert sdxl == "lora_unet_input_blocks_4_1_proj_in"
    assert kohya_name(text, sdxl=True) == "lora_te1_" + text.removeprefix("text_encoder.").replace(".", "_")
    with pytest.raises(FormatError, match="no name"):
        kohya_name("vae.conv_in", sdxl=False)


def test_alpha_is_read_from_diffusers_header(tmp_path: Path) -> None:
    pair = matrices()
    state = {f"unet.{QUERY}.lora_A.weight": pair["down"], f"unet.{QUERY}.lora_B.weight": pair["up"]}
    for entries, alpha in [
        ({}, 2.0),
        ({"unet.lora_alpha": 8}, 8.0),
        ({"unet.lora_alpha": 8, "unet.alpha_pattern": {f"^{QUERY}": 3}}, 3.0),
        ({"unet.lora_alpha": 8, "unet.use_rslora": True}, 8 * 2**0.5),
    ]:
        header = {"lora_adapter_metadata": json.dumps(entries)}
        write_safetensors(state, tmp_path / "a.safetensors", header=header)
        assert read_lora(tmp_path / "a.safetensors").layers[f"unet.{QUERY}"].alpha == pytest.approx(alpha)


def test_other_files_and_loras_of_another_model_are_rejected(tmp_path: Path) -> None:
    name, pair = "lora_unet_" + QUERY.replace(".", "_"), matrices()
    fine = {f"{name}.lora_{which}.weight": tensor for which, tensor in pair.items()}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"a": torch.ones(2)}, "holds no LoRA"),
        ({f"{name}.alpha": torch.ones(())}, "holds no LoRA"),
        (fine | {f"{name}.lokr_w1": torch.ones(2, 2)}, "mixes.*lokr_w1"),
        (fine | {f"{name}.dora_scale": torch.ones(1, 32)}, "lengths of a DoRA.*wd_on_output"),
        (fine | {f"{name}.dora_scale": torch.ones(2)}, "lengths of a DoRA"),
        (fine | {f"{name}.dora_scale": torch.full((32, 1), torch.nan)}, "training failed"),
        (fine | {f"unet.{QUERY}.lora_A.weight": pair["down"]}, "name a layer twice"),
        ({f"{name}.lora_up.weight": pair["up"]}, "has only up"),
        (fine | {f"{name}.lora_down.weight": torch.ones(3, 32)}, "do not match"),
        (fine | {f"{name}.lora_down.weight": torch.ones(0, 32)}, "do not match"),
        (fine | {f"{name}.lora_down.weight": torch.full((2, 32), torch.nan)}, "training failed"),
        (fine | {f"{name}.lora_down.weight": torch.ones(2, 32, dtype=torch.int64)}, "not a tensor"),
        (fine | {f"{name}.alpha": torch.tensor(torch.inf)}, "alpha that is not a number"),
    ]
    for number, (state, message) in enumerate(cases):
        for suffix in (".safetensors", ".pt"):
            path = tmp_path / f"{number}{suffix}"
            if suffix == ".pt":
                torch.save(state, path)
            else:
                write_safetensors(state, path)
            with pytest.raises(FormatError, match=message) as raised:
                read_lora(path)
            assert str(path) in str(raised.value)
    torch.save(fine | {f"{name}.lora_down.weight": torch.zeros(1).expand(2**15, 2**15)}, tmp_path / "bomb.pt")
    with pytest.raises(FormatError, match="file has"):
        read_lora(tmp_path / "bomb.pt")
    for layer, pair_ in [("unet.nothing", matrices()), (f"unet.{QUERY}", matrices(width=31))]:
        other = LoraFile("other", {layer: Matrices(pair_["down"], pair_["up"], 2.0)})
        with pytest.raises(ModelError, match=f"other .*1 .*{layer}.*another family"):
            set_loras(tiny_model(), [(other, 1.0)])
    broken = {f"unet.{QUERY}": Matrices(pair["down"] * torch.inf, pair["up"], 2.0)}
    with pytest.raises(FormatError, match="failed"):
        write_kohya_lora(LoraFile("x", broken), tmp_path / "x.safetensors")


def can_read(content: bytes, path: Path) -> bool:
    """Return whether a file is read as a LoRA; an error other than UserError fails the test."""
    path.write_bytes(content)
    try:
        holds_lora(path)
        found = read_lora(path)
    except UserError:
        return False
    return all(up.shape[1] == down.shape[0] for down, up, *_ in found.layers.values())


KEYS = st.sampled_from(
    ["lora_unet_conv_in.lora_down.weight", "lora_unet_conv_in.lora_up.weight", "lora_unet_conv_in.alpha",
     "unet.conv_in.lora_A.weight", "unet.conv_in.lora_B.weight", "lora_unet_.alpha", "lora_te_x.lora_mid.weight"]
)  # fmt: skip
SHAPES = st.lists(st.sampled_from([0, 1, 2, 3]), max_size=4)
TENSORS = st.builds(
    lambda shape, dtype: torch.ones(shape, dtype=dtype),
    SHAPES,
    st.sampled_from([torch.float32, torch.float16, torch.int64, torch.bool, torch.complex64]),
)
VALUES = TENSORS | st.none() | st.text(max_size=3) | st.lists(st.integers(), max_size=2)
PAIR = {
    "lora_unet_conv_in.lora_down.weight": torch.ones(2, 3),
    "lora_unet_conv_in.lora_up.weight": torch.ones(3, 2),
}


def test_fuzzed_and_damaged_files_raise_our_errors(tmp_path: Path) -> None:
    outcomes = []
    whole = write_kohya_lora(
        LoraFile("a", {"unet.conv_in": Matrices(torch.ones(2, 3), torch.ones(3, 2), 1.0)}),
        tmp_path / "a.safetensors",
    ).read_bytes()

    @settings(max_examples=100, deadline=2000, derandomize=True)
    @given(st.dictionaries(KEYS | st.text(max_size=4), VALUES, max_size=3))
    def read_objects(changes: dict[str, Any]) -> None:
        torch.save(PAIR | changes, tmp_path / "fuzz.pt")
        outcomes.append(can_read((tmp_path / "fuzz.pt").read_bytes(), tmp_path / "fuzz.pt"))

    @settings(max_examples=100, deadline=2000, derandomize=True)
    @given(st.lists(st.tuples(st.integers(0, len(whole) - 1), st.binary(min_size=1, max_size=5)), max_size=3))
    def read_damaged(changes: list[tuple[int, bytes]]) -> None:
        content = bytearray(whole)
        for place, patch in changes:
            content[place : place + len(patch)] = patch
        outcomes.append(can_read(bytes(content), tmp_path / "fuzz.safetensors"))

    for read in (read_objects, read_damaged):
        outcomes.clear()
        read()
        assert any(outcomes) and not all(outcomes)
