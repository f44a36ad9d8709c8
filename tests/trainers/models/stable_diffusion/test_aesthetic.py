"""Test Aesthetic Gradients in sampling: tuning, interpolation, settings, encodings independent of batches."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from drawing import generate
from PIL import Image

from dreamfleet.datasets.errors import ModelError, UserError
from dreamfleet.trainers.config.model import POCKET, ModelConfig
from dreamfleet.trainers.models.embeddings import install_embedding
from dreamfleet.trainers.models.family import DiffusionModel, load_model
from dreamfleet.trainers.models.formats.aesthetic import write_aesthetic
from dreamfleet.trainers.models.formats.lora import LoraFile, Matrices
from dreamfleet.trainers.models.lora import set_loras
from dreamfleet.trainers.models.stable_diffusion import aesthetic
from dreamfleet.trainers.models.stable_diffusion.aesthetic import (
    AestheticEncoder,
    AestheticSettings,
    aim,
    apply_aesthetic,
    clip_of,
    mix,
    slerp,
    tune_text_encoder,
)
from dreamfleet.trainers.models.stable_diffusion.aesthetic_export import bake
from dreamfleet.trainers.models.vision.clip import ClipScorer

FAST = AestheticSettings(steps=3, learning_rate=1e-2)
PROMPTS = ["a cat", "a dog on a photo"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_tiny_model(tmp_path_factory.mktemp("aesthetic") / "model")


@pytest.fixture
def model(folder: Path) -> DiffusionModel:
    return load_model(ModelConfig(pretrained_model_name_or_path=str(folder)))


@pytest.fixture
def clip(model: DiffusionModel) -> ClipScorer:
    return clip_of(model)


@pytest.fixture
def vector() -> torch.Tensor:
    return 3 * torch.randn(1, 8, generator=torch.Generator().manual_seed(1))


def make_encoder(
    model: DiffusionModel, vector: torch.Tensor, clip: ClipScorer, **changes: Any
) -> AestheticEncoder:
    return AestheticEncoder(model, vector, clip=clip, settings=replace(FAST, **changes))


def plain(model: DiffusionModel, prompts: Sequence[str] = PROMPTS) -> torch.Tensor:
    return model.encode_text(model.tokenize(prompts))


def test_each_step_raises_the_cosine_and_the_model_is_unchanged(
    model: DiffusionModel, clip: ClipScorer, vector: torch.Tensor
) -> None:
    before = {name: tensor.clone() for name, tensor in model.text_encoder.state_dict().items()}
    encoder = make_encoder(model, vector, clip)
    context = encoder.contexts(PROMPTS)
    for prompt in PROMPTS:
        cosines = encoder.cosines[prompt]
        assert len(cosines) == 4 and cosines == sorted(cosines) and cosines[-1] > cosines[0] + 0.05
        features = clip.text_features([prompt])
        assert cosines[0] == pytest.approx(float(F.cosine_similarity(features, vector)), abs=1e-5)
    assert (context - plain(model)).abs().amax(dim=(1, 2)).min() > 0.01
    after = model.text_encoder.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert not any(param.requires_grad for param in model.text_encoder.parameters())


def test_an_encoding_depends_on_its_prompt_alone_and_is_cached(
    model: DiffusionModel, clip: ClipScorer, vector: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = make_encoder(model, vector, clip).contexts(PROMPTS)
    encoder = make_encoder(model, vector, clip)
    assert torch.allclose(encoder.contexts(PROMPTS[1:]), together[1:], atol=1e-6)
    encoder.contexts(PROMPTS[:1])
    monkeypatch.setattr(aesthetic, "tune_text_encoder", None)  # fails if a text encoder is tuned again
    assert torch.allclose(encoder.contexts([*PROMPTS, *PROMPTS]), torch.cat([together, together]), atol=1e-6)
    monkeypatch.setattr(aesthetic, "KEPT_PROMPTS", 1)
    encoder.contexts(PROMPTS)
    assert list(encoder.cosines) == PROMPTS[1:], "the least recently used is forgotten"


def test_a_new_lora_clears_the_cached_encodings(
    model: DiffusionModel, clip: ClipScorer, vector: torch.Tensor
) -> None:
    """Test that a new LoRA clears the cache, whose key is the prompt text without LoRA tags."""
    other = replace(model, text_encoder=copy.deepcopy(model.text_encoder))
    encoder = make_encoder(other, vector, clip)
    before = encoder.contexts(PROMPTS)
    width = other.context_width
    layer = Matrices(torch.randn(2, width), torch.randn(width, 2), 2.0)
    file = LoraFile("x", {"text_encoder.encoder.layers.0.self_attn.v_proj": layer})
    set_loras(other, [(file, 1.0)])
    with_lora = encoder.contexts(PROMPTS)
    assert not torch.allclose(with_lora, before, atol=1e-3)
    set_loras(other, [])
    assert torch.allclose(encoder.contexts(PROMPTS), before, atol=1e-6)


@pytest.mark.parametrize("nothing", [{"steps": 0}, {"learning_rate": 0.0}, {"weight": 0.0}])
def test_settings_without_effect_give_the_plain_encoding(
    nothing: dict[str, Any], model: DiffusionModel, clip: ClipScorer, vector: torch.Tensor
) -> None:
    assert torch.allclose(
        make_encoder(model, vector, clip, **nothing).contexts(PROMPTS), plain(model), atol=1e-6
    )


def test_an_empty_prompt_is_not_tuned(model: DiffusionModel, clip: ClipScorer, vector: torch.Tensor) -> None:
    context = make_encoder(model, vector, clip).contexts(["", "a cat"])
    assert torch.allclose(context[0], plain(model, [""])[0], atol=1e-6)
    assert not torch.allclose(context[1], plain(model, ["a cat"])[0], atol=1e-3)


def test_clip_skip_and_learned_words_apply(
    model: DiffusionModel, clip: ClipScorer, vector: torch.Tensor
) -> None:
    last = make_encoder(model, vector, clip, weight=1.0).contexts(["a cat"])
    model.clip_skip = 2
    skipped = make_encoder(model, vector, clip, weight=1.0).contexts(["a cat"])
    tuned, _ = tune_text_encoder(
        model,
        model.tokenize(["a cat"]),
        F.normalize(vector),
        projection=clip.text_projection,
        steps=FAST.steps,
        learning_rate=FAST.learning_rate,
    )
    hidden = tuned(model.tokenize(["a cat"]), output_hidden_states=True).hidden_states[-2]
    assert torch.allclose(skipped, tuned.final_layer_norm(hidden), atol=1e-5)
    assert not torch.allclose(skipped, last, atol=1e-3)
    install_embedding(model, "thing", torch.ones(2, 16))
    assert tune_text_encoder(  # a learned word is not tuned, and logs no warning
        model,
        model.tokenize(["a thing"]),
        F.normalize(vector),
        projection=clip.text_projection,
        steps=1,
        learning_rate=1e-2,
    )[1][1]
    encoder = make_encoder(model, vector, clip)
    assert not torch.allclose(encoder.contexts(["a thing"]), encoder.contexts(["a cat"]), atol=1e-3)
    assert encoder.cosines["a thing"][-1] > encoder.cosines["a thing"][0]


def test_a_long_prompt_is_tuned_by_all_of_its_chunks(
    model: DiffusionModel, clip: ClipScorer, vector: torch.Tensor
) -> None:
    model.max_token_length = 150
    encoder = make_encoder(model, vector, clip)
    long = "a cat, " * 40
    context = encoder.contexts([long, "a cat"])
    assert context.shape == (2, 154, 16)
    assert ((context - plain(model, [long, "a cat"])).abs().amax(dim=2) > 1e-3).all()
    halves = [clip_chunk_cosine(model, clip, vector, long, chunk) for chunk in range(2)]
    assert encoder.cosines[long][0] == pytest.approx(sum(halves) / 2, abs=1e-5)


def clip_chunk_cosine(
    model: DiffusionModel, clip: ClipScorer, vector: torch.Tensor, prompt: str, chunk: int
) -> float:
    """Return the cosine of the vector and the given chunk of 77 tokens, encoded by the text tower alone."""
    ids = model.tokenize([prompt])[:, 77 * chunk : 77 * (chunk + 1)]
    pooled = model.text_encoder(ids).pooler_output
    return float(F.cosine_similarity(pooled @ clip.text_projection.T, vector))


def test_a_text_moves_the_vector(clip: ClipScorer, vector: torch.Tensor) -> None:
    unit, text = F.normalize(vector), clip.text_features(["a cat"])

    def bent(**changes: Any) -> torch.Tensor:
        return aim(vector, clip, AestheticSettings(text="a cat", **changes))

    assert torch.allclose(aim(vector, clip, AestheticSettings()), unit)
    assert torch.allclose(bent(slerp_angle=0.0), unit, atol=1e-6)
    assert torch.allclose(bent(slerp_angle=1.0), text, atol=1e-5)
    assert torch.allclose(bent(slerp_angle=1.0, text_negative=True), F.normalize(unit - text), atol=1e-5)
    towards, away = (float((bent(text_negative=flag) * text).sum()) for flag in (False, True))
    assert towards > float((unit * text).sum()) > away


def test_encodings_are_interpolated_linearly_or_on_an_arc() -> None:
    start, end = torch.randn(2, 5, 3), torch.randn(2, 5, 3)
    assert torch.allclose(mix(start, end, 0.25, "off"), 0.75 * start + 0.25 * end)
    for how, dim in (("channels", -1), ("tokens", 1)):
        for weight, expected in ((0.0, start), (1.0, end)):
            assert torch.allclose(mix(start, end, weight, how), expected, atol=1e-5)  # type: ignore[arg-type]
        units = F.normalize(start, dim=dim), F.normalize(end, dim=dim)
        half = slerp(*units, 0.5, dim=dim)
        assert torch.allclose(half.norm(dim=dim), torch.ones_like(half.norm(dim=dim)), atol=1e-5)
    # The extension's formula for the token axis.
    low, high = F.normalize(start, dim=1), F.normalize(end, dim=1)
    omega = torch.acos((low * high).sum(1))
    theirs = (torch.sin(0.7 * omega) / torch.sin(omega)).unsqueeze(1) * start
    theirs = theirs + (torch.sin(0.3 * omega) / torch.sin(omega)).unsqueeze(1) * end
    assert torch.allclose(mix(start, end, 0.3, "tokens"), theirs, atol=1e-4)
    assert torch.isfinite(slerp(start, start, 0.5, dim=1)).all(), "where the extension divides by zero"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"steps": -1}, "0 steps or more"),
        ({"learning_rate": 2.0}, "rate from 0 to 1"),
        ({"weight": 1.5}, "aesthetic weight 1.5"),
        ({"slerp_angle": -0.1}, "aesthetic slerp_angle -0.1"),
        ({"slerp": "sideways"}, "off, channels, tokens"),
    ],
)
def test_settings_out_of_range_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        AestheticSettings(**wrong)


def test_another_clip_is_refused(model: DiffusionModel, clip: ClipScorer, vector: torch.Tensor) -> None:
    with pytest.raises(ModelError, match=r"768 .* 8"):
        AestheticEncoder(model, torch.ones(1, 768), clip=clip)
    with pytest.raises(ModelError, match="160"):
        clip_of(model, "pocket")
    model.folder = "elsewhere"
    with pytest.raises(ModelError, match="CLIP"):
        clip_of(model)


def test_baking_over_one_prompt_equals_per_prompt_tuning(
    model: DiffusionModel, clip: ClipScorer, vector: torch.Tensor
) -> None:
    settings = replace(FAST, weight=1.0)
    one = bake(model, vector, ["a cat", "", "a cat"], clip=clip, settings=settings)
    apart = make_encoder(model, vector, clip, weight=1.0).contexts(["a cat"])
    mine = replace(model, text_encoder=one.text_encoder)
    assert one.num_prompts == 1 and one.difference < 1e-3
    assert torch.allclose(plain(mine, ["a cat"]), apart, atol=1e-4)
    assert one.cosine_tuned == pytest.approx(one.cosine_per_prompt, abs=1e-4)
    two = bake(model, vector, PROMPTS, clip=clip, settings=settings)
    assert 0.01 < two.difference < 1 and two.cosine_tuned > two.cosine_before
    with pytest.raises(UserError, match="bake"):
        bake(model, vector, [""], clip=clip, settings=FAST)


def test_images_are_sampled_with_the_vector(
    model: DiffusionModel, vector: torch.Tensor, tmp_path: Path
) -> None:
    def sample() -> Image.Image:
        return generate(model, ["a cat"], seeds=[0], steps=2, guidance_scale=7.5)[0]

    before = sample()
    encoder = apply_aesthetic(model, write_aesthetic(vector, tmp_path / "taste.pt"), FAST)
    assert sample().tobytes() != before.tobytes() and "a cat" in encoder.cosines


def test_a_model_tuned_from_the_pocket_uses_the_pockets_clip(tmp_path: Path) -> None:
    pocket = load_model(ModelConfig())
    pocket.folder = str(tmp_path)  # a folder without CLIP, like a run's exports/diffusers
    assert clip_of(pocket).name == POCKET
