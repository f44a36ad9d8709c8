"""Test CLIP preprocessing, both folder layouts and features, and DINO's class token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from tiny_models import tiny_text_encoder, tiny_tokenizer

from dreamfleet.datasets.errors import ModelError
from dreamfleet.trainers.models.vision.clip import load_clip, read_preprocessing
from dreamfleet.trainers.models.vision.dino import load_dino


def tiny_vision() -> Any:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=24,
        patch_size=8,
        projection_dim=16,
    )
    return CLIPVisionModelWithProjection(config)


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder in the pocket model's layout, with a CLIP of random weights."""
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    tiny_vision().save_pretrained(folder / "image_encoder")
    tiny_text_encoder().save_pretrained(folder / "text_encoder")
    tiny_tokenizer().save_pretrained(folder / "tokenizer")
    extra = {"text_projection.weight": torch.randn(16, 32), "logit_scale": torch.tensor(2.0)}
    save_file(extra, folder / "text_projection.safetensors")
    config = {
        "do_resize": True,
        "size": {"shortest_edge": 24},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": 24, "width": 24},
        "image_mean": [0.6, 0.5, 0.4],
        "image_std": [0.3, 0.2, 0.25],
    }
    (folder / "image_encoder" / "preprocessor_config.json").write_text(json.dumps(config))
    return folder


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_preprocessing_equals_the_image_processor(towers: Path) -> None:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    theirs = CLIPImageProcessorPil.from_pretrained(towers / "image_encoder")
    ours = read_preprocessing(towers / "image_encoder", image_size=24)
    for size in ((24, 24), (64, 64), (50, 31), (31, 77), (10, 12), (24, 25)):
        image = photo(*size)
        expected = theirs(image, return_tensors="pt").pixel_values
        assert torch.allclose(ours([image]), expected, atol=1e-5), size
    grey = ours([Image.new("L", (30, 30), 128)])
    assert grey.shape == (1, 3, 24, 24)


def test_towers_and_a_full_clip_give_the_same_features(towers: Path, tmp_path: Path) -> None:
    from transformers import CLIPConfig, CLIPModel, CLIPTextModel, CLIPVisionModelWithProjection

    clip = load_clip(towers)
    vision = CLIPVisionModelWithProjection.from_pretrained(towers / "image_encoder")
    text = CLIPTextModel.from_pretrained(towers / "text_encoder")
    projection = {"text_projection.weight": clip._text_projection_PD}
    config = CLIPConfig(
        text_config=text.config.to_dict(), vision_config=vision.config.to_dict(), projection_dim=16
    )
    whole = CLIPModel(config)
    state = {f"vision_model.{k.removeprefix('vision_model.')}": v for k, v in vision.state_dict().items()}
    state["visual_projection.weight"] = state.pop("vision_model.visual_projection.weight")
    state |= {f"text_model.{k.removeprefix('text_model.')}": v for k, v in text.state_dict().items()}
    whole.load_state_dict({**state, **projection, "logit_scale": torch.tensor(2.0)})
    whole.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        (towers / "image_encoder/preprocessor_config.json").read_text()
    )
    other = load_clip(tmp_path)
    images, texts = [photo(40, 30, seed) for seed in range(3)], ["a cat", "a dog on the beach"]
    assert torch.allclose(clip.image_features(images), other.image_features(images), atol=1e-5)
    assert torch.allclose(clip.text_features(texts), other.text_features(texts), atol=1e-5)
    assert clip.logit_scale == pytest.approx(np.exp(2.0)) == pytest.approx(other.logit_scale)
    expected = whole.eval()(
        input_ids=tiny_tokenizer()(texts, padding="max_length", max_length=77, return_tensors="pt").input_ids,
        pixel_values=clip.preprocessing(images),
    )
    assert torch.allclose(
        expected.logits_per_image,
        np.exp(2.0) * (other.image_features(images) @ other.text_features(texts).T),
        atol=1e-4,
    )


def test_features_are_unit_and_do_not_depend_on_the_batch(
    towers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = load_clip(towers)
    images, texts = [photo(30, 30, seed) for seed in range(5)], ["a", "b c", "d" * 200, ""]
    image_features, text_features = clip.image_features(images), clip.text_features(texts)
    assert torch.allclose(image_features.norm(dim=1), torch.ones(5))
    assert torch.allclose(text_features.norm(dim=1), torch.ones(4))
    monkeypatch.setattr("dreamfleet.trainers.models.vision.clip.BATCH", 2)
    assert torch.allclose(clip.image_features(images), image_features, atol=1e-6)
    assert torch.allclose(clip.text_features(texts), text_features, atol=1e-6)


def test_dino_features_are_the_class_token(tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=24,
        intermediate_size=30,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    model = ViTModel(config, add_pooling_layer=False).eval()
    model.save_pretrained(tmp_path)
    sizes = {
        "size": 16,
        "resample": 2,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "do_center_crop": False,
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(sizes))
    images = [photo(32, 20), photo(16, 16, 1)]
    resized = np.stack([np.asarray(p.resize((16, 16), Image.Resampling.BILINEAR)) for p in images])
    pixels = torch.from_numpy(resized).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        expected = F.normalize(model(pixels).last_hidden_state[:, 0], dim=-1)
    assert torch.allclose(load_dino(tmp_path).image_features(images), expected, atol=1e-5)


def test_a_folder_without_a_model_is_an_error(tmp_path: Path, towers: Path) -> None:
    with pytest.raises(ModelError, match="no such CLIP"):
        load_clip(tmp_path / "gone")
    with pytest.raises(ModelError, match="not a CLIP"):
        load_clip(tmp_path)
    with pytest.raises(ModelError, match="no DINO"):
        load_dino(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="not a ViT"):
        load_dino(tmp_path)
    (tmp_path / "text_projection.safetensors").write_bytes(b"cut")
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_clip(tmp_path)
