"""Scores: the paper's definitions on vectors known by hand, CLIP and DINO loading, runs and folders."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from tiny_models import tiny_model, tiny_text_encoder, tiny_tokenizer

from dreamfleet.datasets.errors import DataError, ModelError, UserError
from dreamfleet.trainers.evaluation import score as score_module
from dreamfleet.trainers.evaluation.fidelity import (
    ScoredImages,
    clip_i,
    clip_t,
    dino,
    spread_of_real,
    strip_words,
)
from dreamfleet.trainers.evaluation.judge import score_images
from dreamfleet.trainers.evaluation.score import score_run, words_to_strip
from dreamfleet.trainers.models.formats.embedding import Embedding, write_embedding
from dreamfleet.trainers.models.stable_diffusion.pipeline_folder import save_pipeline
from dreamfleet.trainers.models.vision.clip import ClipScorer, load_clip, read_preprocessing
from dreamfleet.trainers.models.vision.dino import load_dino
from dreamfleet.trainers.recipe import build_recipe


class ByColour:
    """A scorer whose features are known: a picture's mean colour, a text's named colours."""

    name = "by colour"

    def image_features(self, images: Sequence[Image.Image]) -> torch.Tensor:
        means = [np.asarray(image.convert("RGB")).mean(axis=(0, 1)) for image in images]
        return F.normalize(torch.tensor(np.array(means)).float(), dim=-1)

    def text_features(self, texts: Sequence[str]) -> torch.Tensor:
        rows = [[float(colour in text.split()) for colour in ("red", "green", "blue")] for text in texts]
        return F.normalize(torch.tensor(rows), dim=-1)

    def to(self, device: object) -> ByColour:
        return self


def plain(*colours: tuple[int, int, int]) -> list[Image.Image]:
    return [Image.new("RGB", (8, 8), colour) for colour in colours]


RED, GREEN, YELLOW = (200, 0, 0), (0, 90, 0), (80, 80, 0)
HALF = 2**-0.5


def test_definitions_of_the_paper() -> None:
    clip: Any = ByColour()
    pairs = ScoredImages(plain(RED, YELLOW), real=plain(RED, GREEN), clip=clip)
    assert clip_i(pairs).tolist() == pytest.approx([(1 + 0) / 2, (HALF + HALF) / 2])
    assert dino(ScoredImages(plain(RED), real=plain(YELLOW), dino=clip)).tolist() == pytest.approx([HALF])
    prompted = ScoredImages(plain(RED, YELLOW), ["a red sks", "a green cat"], clip=clip)
    assert clip_t(prompted).tolist() == pytest.approx([1, HALF])
    assert spread_of_real(clip, plain(RED, GREEN, YELLOW)) == pytest.approx((0 + HALF + HALF) / 3)
    assert spread_of_real(clip, plain(RED)) is None


def test_scores_of_every_image_and_their_means() -> None:
    clip: Any = ByColour()
    images, real = plain(RED, YELLOW), plain(RED, GREEN)
    scores = score_images(
        images, prompts=["red qzx", "green qzx"], real=real, clip=clip, dino=clip, strip=["qzx"]
    )
    fidelity = pytest.approx((1 + 2 * HALF) / 4)
    assert scores.means == {"clip_i": fidelity, "clip_t": pytest.approx((1 + HALF) / 2), "dino": fidelity}
    assert [image["clip_t"] for image in scores.images] == [pytest.approx(1), pytest.approx(HALF)]
    assert [image["prompt"] for image in scores.images] == ["red qzx", "green qzx"]
    chosen = score_images(images, metrics=["clip_t"], prompts=["red"], real=real, clip=clip)
    assert chosen.means.keys() == {"clip_t"}


def test_only_metrics_whose_needs_are_given_are_computed() -> None:
    clip: Any = ByColour()
    assert score_images(plain(RED, GREEN), prompts=["red"], clip=clip).means == {"clip_t": pytest.approx(0.5)}
    with pytest.raises(UserError, match=r"real (picture|image)"):
        score_images(plain(RED), clip=clip)
    with pytest.raises(UserError, match=r"no (picture|image)"):
        score_images([], prompts=["a"], clip=clip)
    with pytest.raises(UserError, match=r"3 .*prompt"):
        score_images(plain(RED, RED, RED), prompts=["a", "b"], clip=clip)


@pytest.mark.parametrize(
    ("prompt", "words", "left"),
    [
        ("a sks cat on the beach", ["sks"], "a cat on the beach"),
        ("A SKS cat, sks", ["sks"], "A cat,"),
        ("a <my-cat> on the beach", {"<my-cat>": "cat"}, "a cat on the beach"),
        ("cat and cat-neg", {"cat-neg": "dog", "cat": "bird"}, "bird and dog"),
        ("a sksx cat", ["sks"], "a sksx cat"),
        ("photo of sks, sitting", ["sks"], "photo of, sitting"),
        ("as  it   is", [], "as  it   is"),
    ],
)
def test_words_clip_cannot_know_are_stripped(prompt: str, words: Any, left: str) -> None:
    assert strip_words(prompt, words) == left


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
    """A folder of the pocket's layout, with a CLIP of random weights."""
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


def test_preprocessing_is_the_image_processors(towers: Path) -> None:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    theirs = CLIPImageProcessorPil.from_pretrained(towers / "image_encoder")
    ours = read_preprocessing(towers / "image_encoder", image_size=24)
    for size in ((24, 24), (64, 64), (50, 31), (31, 77), (10, 12), (24, 25)):
        image = photo(*size)
        expected = theirs(image, return_tensors="pt").pixel_values
        assert torch.allclose(ours([image]), expected, atol=1e-5), size
    grey = ours([Image.new("L", (30, 30), 128)])
    assert grey.shape == (1, 3, 24, 24)


def test_towers_and_a_whole_clip_give_the_same_features(towers: Path, tmp_path: Path) -> None:
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
    image_features, words = clip.image_features(images), clip.text_features(texts)
    assert torch.allclose(image_features.norm(dim=1), torch.ones(5))
    assert torch.allclose(words.norm(dim=1), torch.ones(4))
    monkeypatch.setattr("dreamfleet.trainers.models.vision.clip.BATCH", 2)
    assert torch.allclose(clip.image_features(images), image_features, atol=1e-6)
    assert torch.allclose(clip.text_features(texts), words, atol=1e-6)


def test_dino_takes_the_class_token(tmp_path: Path) -> None:
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


def test_models_that_are_not_there_say_so(tmp_path: Path, towers: Path) -> None:
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


def test_the_pocket_clip_tells_subject_and_background(root: Path) -> None:
    clip = load_clip("pocket")
    cats = [Image.open(path) for path in sorted((root / "examples/cat/holdout").glob("*.png"))]
    if not cats:
        pytest.skip("no example pictures")
    assert isinstance(clip, ClipScorer)
    assert clip_i(ScoredImages(cats, real=cats, clip=clip)).mean() > 0
    assert score_run(root / "examples/cat/holdout", real=str(root / "examples/cat/train"))["num_real"] == 6


@pytest.fixture
def by_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score_module, "load_clip", lambda name: ByColour())


def save_all(folder: Path, images: list[Image.Image], captions: list[str] | None = None) -> Path:
    folder.mkdir(parents=True)
    for number, image in enumerate(images):
        image.save(folder / f"{number}.png")
        if captions:
            (folder / f"{number}.txt").write_text(captions[number])
    return folder


@pytest.mark.usefixtures("by_colour")
def test_a_folder_is_scored_with_captions_or_prompts(tmp_path: Path) -> None:
    real = save_all(tmp_path / "real", plain(RED, GREEN))
    drawn = save_all(tmp_path / "drawn", plain(RED, YELLOW), ["red cat", "green cat"])
    scores = score_run(drawn, real=str(real))
    assert (scores["kind"], scores["clip_i"]) == ("pictures", pytest.approx((1 + 2 * HALF) / 4))
    assert scores["clip_t"] == pytest.approx((1 + HALF) / 2)
    assert scores["clip_i_among_real"] == pytest.approx(0, abs=1e-6)
    assert [entry["prompt"] for entry in scores["prompts"]] == ["red cat", "green cat"]
    assert score_run(str(drawn), prompts=["blue"])["clip_t"] == pytest.approx(0)
    json.dumps(scores, allow_nan=False)
    with pytest.raises(UserError, match=r"real (picture|image)"):
        score_run(real)
    with pytest.raises(UserError, match="nothing"):
        score_run(tmp_path / "gone")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty"):
        score_run(tmp_path / "empty", real=str(real))


def recipe_of(tmp_path: Path, model: Path, real: Path, **method: Any) -> dict[str, Any]:
    return {
        "method": method,
        "model": {"pretrained_model_name_or_path": str(model)},
        "data": {
            "instance_data_dir": str(real),
            "instance_prompt": "a photo of sks cat",
            "class_prompt": "a photo of a cat",
            "resolution": 32,
        },
        "validation": {"prompts": ["red qzx", "green qzx"], "num_inference_steps": 2, "guidance_scale": 1},
        "output_dir": str(tmp_path / "my-run"),
    }


@pytest.mark.usefixtures("by_colour")
@pytest.mark.parametrize("form", ["diffusers", ".safetensors"])
def test_a_dreambooth_run_is_scored_by_its_exports(form: str, tmp_path: Path) -> None:
    from dreamfleet.trainers.models.stable_diffusion.single_file import save_single_file

    real = save_all(tmp_path / "real", plain(RED, GREEN))
    run = tmp_path / "my-run"
    (run / "exports").mkdir(parents=True)
    tree = recipe_of(tmp_path, tmp_path / "gone", real, name="dreambooth")
    (run / "recipe.yaml").write_text(json.dumps(tree))
    with pytest.raises(UserError, match="exports/"):
        score_run(run)
    if form == "diffusers":
        save_pipeline(tiny_model(), run / "exports" / "diffusers")
    else:
        save_single_file(tiny_model(), run / "exports" / f"my-run{form}")
    (run / "summary.json").write_text(json.dumps({"figures": {"holdout_loss": 0.25}}))
    scores = score_run(run, num_images=2, seed=5)
    assert (scores["kind"], scores["method"], scores["real"]) == ("run", "dreambooth", "training pictures")
    assert (scores["num_pictures"], scores["num_real"], scores["holdout_loss"]) == (4, 2, 0.25)
    assert scores == score_run(run, num_images=2, seed=5)
    assert -1 <= scores["clip_t"] <= 1
    assert [entry["prompt"] for entry in scores["prompts"]] == ["red qzx", "green qzx"]
    assert score_run(run, num_images=1, prompts=["red"], real=str(real))["num_pictures"] == 1
    assert words_to_strip(build_recipe(tree)) == {"sks": ""}


@pytest.mark.usefixtures("by_colour")
def test_a_textual_inversion_run_is_scored_with_its_word(tmp_path: Path) -> None:
    save_pipeline(tiny_model(), tmp_path / "base")
    real = save_all(tmp_path / "real", plain(RED))
    run = tmp_path / "my-run"
    (run / "exports").mkdir(parents=True)
    method = {"name": "textual_inversion", "placeholder_token": "qzx", "initializer_token": "cat"}
    tree = recipe_of(tmp_path, tmp_path / "base", real, **method)
    (run / "recipe.yaml").write_text(json.dumps(tree))
    drawn = []
    for seed in (0, 1):
        vectors = 5 * torch.randn(2, 32, generator=torch.Generator().manual_seed(seed))
        write_embedding(Embedding("my-run", vectors), run / "exports" / "my-run.pt")
        drawn.append(score_run(run, num_images=1))
    assert drawn[0]["prompts"] != drawn[1]["prompts"]
    assert words_to_strip(build_recipe(tree)) == {"qzx": "cat"}


@pytest.mark.usefixtures("by_colour")
def test_an_artifact_is_scored_with_its_run_or_with_a_model(tmp_path: Path) -> None:
    save_pipeline(tiny_model(), tmp_path / "base")
    real = save_all(tmp_path / "real", plain(RED))
    exports = tmp_path / "my-run" / "exports"
    exports.mkdir(parents=True)
    method = {"name": "textual_inversion", "placeholder_token": "qzx", "initializer_token": "cat"}
    tree = recipe_of(tmp_path, tmp_path / "base", real, **method)
    (tmp_path / "my-run" / "recipe.yaml").write_text(json.dumps(tree))
    vectors = 5 * torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    for name in ("my-run.pt", "my-run.safetensors"):
        write_embedding(Embedding("my-run", vectors), exports / name)
    run = score_run(tmp_path / "my-run", num_images=1)
    for name in ("my-run.pt", "my-run.safetensors"):
        of_run = score_run(exports / name, num_images=1)
        assert of_run == {**run, "target": str(exports / name), "kind": "artefact"}
    elsewhere = exports.parent.parent / "a" / "wrd.pt"
    elsewhere.parent.mkdir()
    write_embedding(Embedding("wrd", vectors), elsewhere)
    base = str(tmp_path / "base")
    lone = score_run(elsewhere, num_images=1, model=base)
    assert (lone["kind"], lone["prompts"][0]["prompt"]) == ("artefact", "a photo of wrd")
    plainly = score_run(base, prompts=["red wrd"], num_images=1, real=str(real))
    taught = score_run(elsewhere, prompts=["red wrd"], num_images=1, real=str(real), model=base)
    assert taught["clip_i"] != plainly["clip_i"]  # the word was drawn with


@pytest.mark.usefixtures("by_colour")
def test_a_hypernetwork_is_scored_with_a_model_when_told_what_to_draw(tmp_path: Path) -> None:
    from dreamfleet.trainers.config.hypernetwork_structure import Structure
    from dreamfleet.trainers.models.formats.hypernetwork import write_hypernetwork
    from dreamfleet.trainers.models.stable_diffusion.hypernetwork import Hypernetwork

    model = tiny_model()
    save_pipeline(model, tmp_path / "base")
    network = Hypernetwork((model.context_width,), Structure())
    with torch.no_grad():
        for weights in network.parameters():
            weights.normal_()
    path = write_hypernetwork(network.to_file("h"), tmp_path / "h.pt")
    base = str(tmp_path / "base")
    with pytest.raises(UserError, match="--prompt"):
        score_run(path, model=base)
    asked: Any = {"prompts": ["red"], "num_images": 1, "real": str(save_all(tmp_path / "real", plain(RED)))}
    assert score_run(path, model=base, **asked)["clip_i"] != score_run(base, **asked)["clip_i"]


@pytest.mark.usefixtures("by_colour")
def test_a_model_is_scored_when_told_what_to_draw(tmp_path: Path) -> None:
    save_pipeline(tiny_model(), tmp_path / "model")
    with pytest.raises(UserError, match="--prompt"):
        score_run(tmp_path / "model")
    scores = score_run(tmp_path / "model", prompts=["red"], num_images=1)
    assert (scores["kind"], scores["num_pictures"]) == ("model", 1)
