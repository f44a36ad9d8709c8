"""Test diffusers folders that both transformers 4 and 5 load: names, files and config entries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import tiny_family, tiny_tokenizer

from dreamfleet.trainers.config.model import ModelConfig
from dreamfleet.trainers.models.family import load_model
from dreamfleet.trainers.models.pretrained import pocket_folder, save_part, save_tokenizer
from dreamfleet.trainers.models.vision.discriminator import make_network, save_network

TEXTS = ["a cat, 12 it's", "Äpfel <|endoftext|>", "", "x" * 90]


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text("utf-8"))


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_text_encoders_have_version_4_names_and_load_bit_equal_in_5(
    family: str, dtype: torch.dtype | None, tmp_path: Path
) -> None:
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    model = tiny_family(family)
    model.save_folder(tmp_path, dtype=dtype)
    for name, kind in (("text_encoder", CLIPTextModel), ("text_encoder_2", CLIPTextModelWithProjection)):
        if (part := getattr(model, name, None)) is None:
            continue
        written = load_file(tmp_path / name / "model.safetensors")
        top = {key.partition(".")[0] for key in written}
        assert top == {"text_model"} | ({"text_projection"} if name == "text_encoder_2" else set())
        assert "text_model.encoder.layers.0.self_attn.q_proj.weight" in written
        config = read(tmp_path / name / "config.json")
        assert (config["torch_dtype"], config["architectures"]) == ("float32", [kind.__name__])
        assert "dtype" not in config  # unknown to transformers 4
        back, loading_info = kind.from_pretrained(tmp_path / name, output_loading_info=True)
        assert not (loading_info["missing_keys"] or loading_info["unexpected_keys"])
        wanted = {key: t.to(dtype or t.dtype).float() for key, t in part.state_dict().items()}
        assert {k: t.dtype for k, t in back.state_dict().items()} == {k: t.dtype for k, t in wanted.items()}
        assert all(torch.equal(back.state_dict()[key], tensor) for key, tensor in wanted.items())


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_half_precision_folder_generates_with_stock_diffusers_without_a_dtype(
    family: str, tmp_path: Path
) -> None:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    tiny_family(family).save_folder(tmp_path, dtype=torch.float16)
    more = {} if family == "sdxl" else {"safety_checker": None}
    pipeline = DiffusionPipeline.from_pretrained(tmp_path, **more)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("a cat", num_inference_steps=1, output_type="np", height=32, width=32).images
    assert image.shape == (1, 32, 32, 3)


@pytest.mark.parametrize("pad", ["!", "<|endoftext|>"])
def test_a_tokenizer_is_written_in_both_forms_with_equal_results(pad: str, tmp_path: Path) -> None:
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(pocket_folder() / "tokenizer", pad_token=pad)
    save_tokenizer(tokenizer, tmp_path)
    config = read(tmp_path / "tokenizer_config.json")
    assert (config["pad_token"], config["tokenizer_class"]) == (pad, "CLIPTokenizer")
    assert not {"backend", "is_local", "local_files_only"} & set(config)
    (tmp_path / "tokenizer.json").unlink()  # CLIPTokenizer of transformers 4 does not read this file
    assert (tmp_path / "merges.txt").read_text("utf-8").startswith("#version: 0.2\n")
    older = CLIPTokenizer.from_pretrained(tmp_path)
    assert older(TEXTS).input_ids == tokenizer(TEXTS).input_ids
    both = [json.loads(one.backend_tokenizer.to_str())["model"] for one in (older, tokenizer)]
    assert (both[0]["vocab"], both[0]["merges"]) == (both[1]["vocab"], both[1]["merges"])
    assert (older.pad_token_id, older.model_max_length) == (tokenizer.pad_token_id, 77)


def test_added_tokens_are_written_in_the_form_of_version_4(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<toy>"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<x>"]})
    save_tokenizer(tokenizer, tmp_path)
    assert read(tmp_path / "added_tokens.json") == {"<toy>": 90, "<x>": 91}
    config = read(tmp_path / "tokenizer_config.json")
    assert config["additional_special_tokens"] == ["<x>"]
    assert "extra_special_tokens" not in config  # transformers 4 fails if this is a list
    again = type(tokenizer).from_pretrained(tmp_path)
    assert again("a <toy> <x>").input_ids == tokenizer("a <toy> <x>").input_ids


def test_a_folder_does_not_contain_the_path_of_its_base_model(tmp_path: Path) -> None:
    tiny_family("sdxl").save_folder(tmp_path / "base")
    model = load_model(ModelConfig(pretrained_model_name_or_path=str(tmp_path / "base")))
    model.save_folder(tmp_path / "out")
    texts = [path.read_text("utf-8") for path in (tmp_path / "out").rglob("*.json")]
    assert len(texts) >= 10
    assert not [text for text in texts if str(tmp_path) in text or "_name_or_path" in text]


def test_the_pocket_model_has_this_folder_format() -> None:
    folder = pocket_folder()
    assert all(key.startswith("text_model.") for key in load_file(folder / "text_encoder/model.safetensors"))
    for part in ("text_encoder", "image_encoder"):
        config = read(folder / part / "config.json")
        assert config["torch_dtype"] == "float32"
        assert "dtype" not in config
    assert {"vocab.json", "merges.txt"} <= {path.name for path in (folder / "tokenizer").iterdir()}
    assert "is_local" not in read(folder / "tokenizer/tokenizer_config.json")


def test_a_vision_model_without_projection_has_version_4_names(tmp_path: Path) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=16
    )
    save_part(CLIPVisionModel(config), tmp_path)
    assert all(key.startswith("vision_model.") for key in load_file(tmp_path / "model.safetensors"))
    _, loading_info = CLIPVisionModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not (loading_info["missing_keys"] or loading_info["unexpected_keys"])


def test_a_half_precision_classifier_accepts_its_processors_output(tmp_path: Path) -> None:
    from transformers import ConvNextForImageClassification

    network = make_network(depths=[1, 1], hidden_sizes=[8, 16], classes=["a", "b"], drop_path=0.0)
    save_network(network, tmp_path, size=32, dtype=torch.float16, metadata={"who": "we"})
    assert load_file(tmp_path / "model.safetensors")["classifier.weight"].dtype == torch.float16
    config = read(tmp_path / "config.json")
    assert (config["torch_dtype"], config["image_size"], config["id2label"]["1"]) == ("float32", 32, "b")
    theirs = ConvNextForImageClassification.from_pretrained(tmp_path)
    assert theirs(torch.zeros(1, 3, 32, 32)).logits.shape == (1, 2)
