"""Test Advanced Prompt Tuning: the guided loss per sample, the negative embedding, recipe and commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from drawing import generate
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

from dreamfleet.cluster.cli import program
from dreamfleet.datasets.errors import RecipeError
from dreamfleet.datasets.index.index import build_index
from dreamfleet.trainers.artifacts.usage import describe
from dreamfleet.trainers.batches.feed import to_samples
from dreamfleet.trainers.config.model import ModelConfig
from dreamfleet.trainers.distributed.context import DistributedContext
from dreamfleet.trainers.evaluation.heldout_loss import HeldOutLoss
from dreamfleet.trainers.evaluation.previews import generate_previews
from dreamfleet.trainers.memory.profile import count_run, method_shape
from dreamfleet.trainers.models.embeddings import install_embedding, install_negative, remove_embeddings
from dreamfleet.trainers.models.family import load_model
from dreamfleet.trainers.models.formats.embedding import read_embedding
from dreamfleet.trainers.models.sampling.prompt_encoding import negative_for
from dreamfleet.trainers.models.stable_diffusion.noise import make_target
from dreamfleet.trainers.recipe import build_recipe
from dreamfleet.trainers.run.build import Parts, assemble

SECTION = {"name": "prompt_tuning", "placeholder_token": "<x>", "initializer_token": "cat"}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a tiny model and six captioned images."""
    folder = tmp_path_factory.mktemp("prompt-tuning")
    tiny.make_images(folder / "pictures", 6, captions=True)
    tiny.make_recipe(folder)
    return folder


def make_parts(folder: Path, **changes: Any) -> Parts:
    section = {**SECTION, **changes.pop("method", {})}
    return assemble(build_recipe(tiny.make_recipe(folder, method=section, **changes)), DistributedContext())


def spread_out(parts: Parts) -> None:
    # Both embeddings start with equal values; their separate effects are visible only when they differ.
    with torch.no_grad():
        parts.method.negative.copy_(torch.randn(parts.method.negative.shape))


def alone(batch: dict[str, Any], row: int) -> dict[str, Any]:
    rows = slice(row, row + 1)
    one = {name: value[rows] for name, value in batch.items() if name != "num_instances"}
    return {**one, "num_instances": 1}


@pytest.mark.parametrize("snr_gamma", [None, 5.0])
@pytest.mark.parametrize("rec_loss_w", [0.0, 0.5])
def test_the_loss_of_a_batch_is_the_mean_of_its_samples(
    workplace: Path, snr_gamma: float | None, rec_loss_w: float
) -> None:
    parts = make_parts(
        workplace,
        method={"cfg_scale": "1.0-4.0:cos", "rec_loss_w": rec_loss_w},
        train__train_batch_size=3,
        train__snr_gamma=snr_gamma,
    )
    spread_out(parts)
    raw = parts.feed.batch(0)
    whole = parts.method(parts.prepare(raw))
    rows = torch.stack([parts.method(parts.prepare(alone(raw, row))).total for row in range(3)])
    assert torch.allclose(whole.per_sample, rows, rtol=1e-4)
    assert torch.allclose(whole.total, rows.mean(), rtol=1e-4)
    if rec_loss_w:
        extras = whole.extras["noise_loss"] + rec_loss_w * whole.extras["reconstruction_loss"]
        assert torch.allclose(whole.total, extras, rtol=1e-4)


def test_accumulation_gives_the_gradient_of_the_whole_batch(workplace: Path) -> None:
    # DreamArtist divided by the number of micro-batches, but used only the last two.
    found = []
    for batch, micros in ((6, 1), (2, 3), (1, 6)):
        parts = make_parts(
            workplace,
            method={"cfg_scale": "1.0-4.0"},
            train__train_batch_size=batch,
            train__gradient_accumulation_steps=micros,
        )
        for micro in range(micros):
            parts.engine.backward(parts.prepare(parts.feed.batch(0, micro)), last=micro == micros - 1)
        found.append([param.grad.clone() for param in parts.engine.params.values()])
    for other in found[1:]:
        assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-6) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_the_loss_of_an_exact_prediction_is_zero(tmp_path: Path, prediction_type: str) -> None:
    tiny.make_tiny_model(tmp_path / "model", prediction_type=prediction_type)
    parts = make_parts(tmp_path, method={"rec_loss_w": 1.0})
    scheduler = parts.model.scheduler
    batch = parts.prepare(parts.feed.batch(0))
    parts.method.model.unet = ExactUNet(scheduler, batch)
    loss = parts.method(batch)
    assert loss.per_sample.shape == (2,) and loss.total < 1e-3


class ExactUNet(torch.nn.Module):
    """A U-Net that predicts the target of one batch exactly, for any prompt."""

    def __init__(self, scheduler: Any, batch: dict[str, Any]):
        super().__init__()
        self.answer = make_target(scheduler, batch["latents"], batch["noise"], batch["timesteps"])

    def forward(self, noisy: Tensor, timesteps: Tensor, context: Tensor, return_dict: bool) -> Any:
        return (torch.cat([self.answer] * (len(noisy) // len(self.answer))),)


def test_reconstruction_gradients_reach_both_embeddings_through_the_decoder(workplace: Path) -> None:
    gradients = []
    for weight in (0.0, 1.0):
        parts = make_parts(workplace, method={"rec_loss_w": weight})
        parts.method(parts.prepare(parts.feed.batch(0))).total.backward()
        gradients.append([param.grad.clone() for param in parts.engine.params.values()])
    assert all((one - two).abs().sum(1).all() for one, two in zip(*gradients, strict=True))
    assert not any(param.grad is not None for param in parts.model.vae.parameters())


def test_the_negative_embedding_has_separate_rate_initialisation_and_prompt(workplace: Path) -> None:
    parts = make_parts(workplace, method={"neg_lr_w": 0.25, "num_vectors": 2, "num_vectors_neg": 4})
    assert parts.rates["negative"](0) == 0.25 * parts.rates["positive"](0)
    method = parts.method
    assert method.positive.shape == (2, 16) and method.negative.shape == (4, 16)
    away = (method.negative - method.positive[:1]).abs()
    assert 0 < away.max() < 0.01
    sample = to_samples(parts.sets.instances)[0]
    data = build_recipe(tiny.make_recipe(workplace)).data
    prompt = method.prompt(sample, np.random.default_rng(0), data)
    assert "<x>" in prompt and "-neg" not in prompt
    ids = method.tokenize([prompt, "<x>"])
    vocab = len(parts.model.tokenizer)
    assert ids.shape == (2, 2, 77)
    assert [sorted(set(side[side >= vocab].tolist()) - {0}) for side in ids[0]] == [
        list(range(vocab + 2, vocab + 6)),
        [vocab, vocab + 1],
    ]
    fixed = make_parts(workplace, method={"negative_prompt": "bad [name]"}).method
    negative = fixed.tokenize(["a photo of <x> by the sea"])[0, 0]
    assert torch.equal(negative, fixed.model.tokenize(["bad <x>-neg"])[0])


def test_the_negative_embedding_is_placed_like_its_placeholder(workplace: Path) -> None:
    method = make_parts(workplace, method={"placeholder_token": "Cat", "negative_prompt": None}).method
    for prompt in ("a cat", "cat2, CAT", "bobcat", "a cat-neg", "cats", "\u732bcat\u732b"):
        negative, positive = method.tokenize([prompt])[0]
        swapped = method.model.tokenize([prompt], {"Cat": "Cat-neg"})[0]
        assert torch.equal(negative, swapped)
        vocab = len(method.model.tokenizer)
        assert not ((negative >= vocab) & (negative < vocab + 3)).any(), prompt
        assert (negative >= vocab).any() == (positive >= vocab).any() == (prompt != "cats"), prompt


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"cfg_scale": "1.5,3"}, "method.cfg_scale.*low-high"),
        ({"cfg_scale": 0}, "not trained"),
        ({"cfg_scale": "1-3:abs(rate)"}, "ln, cos or cos2"),
        ({"negative_prompt": "ugly"}, r"no \[name\]"),
        ({"num_vectors_neg": 0}, "greater than or equal to 1"),
        ({"neg_lr_w": 0}, "greater than 0"),
        ({"num_vector_neg": 3}, "did you mean 'num_vectors_neg'"),
    ],
)
def test_an_invalid_section_is_an_error(section: dict[str, Any], message: str, workplace: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        make_parts(workplace, method=section)


def test_both_embeddings_get_gradients(workplace: Path) -> None:
    parts = make_parts(workplace, train__gradient_checkpointing=True)
    for step in range(2):
        parts.method(parts.prepare(parts.feed.batch(step))).total.backward()
        assert all(param.grad is not None for param in parts.engine.params.values())
        parts.engine.drop_gradients()


def test_an_embedding_adds_its_negative(workplace: Path) -> None:
    model = load_model(ModelConfig(pretrained_model_name_or_path=str(workplace / "model")))
    assert negative_for(model, "a cat", "ugly") == "ugly"
    install_embedding(model, "cat", torch.randn(2, 16))
    install_embedding(model, "dog-neg", torch.randn(1, 16))
    plain = generate(model, ["a cat", "a dog"], seeds=[1, 1], steps=2)
    install_negative(model, "cat", torch.randn(3, 16))
    assert negative_for(model, "a cat", "") == "cat-neg"
    assert negative_for(model, "a Cat, a dog", "ugly") == "ugly, cat-neg"
    assert negative_for(model, "a cat", "old CAT-neg") == "old CAT-neg"
    assert negative_for(model, "cats", "ugly") == negative_for(model, "cat-neg", "ugly") == "ugly"
    paired = generate(model, ["a cat", "a dog"], seeds=[1, 1], steps=2)
    named = generate(model, ["a cat"], seeds=[1], steps=2, negative_prompt="cat-neg")
    assert paired[0].tobytes() == named[0].tobytes() != plain[0].tobytes()
    assert paired[1].tobytes() == plain[1].tobytes()
    remove_embeddings(model)
    assert negative_for(model, "a cat", "ugly") == "ugly"


def test_previews_and_the_held_out_loss_use_guidance(workplace: Path) -> None:
    validation = {"prompts": ["a <x>"], "num_images": 1, "num_inference_steps": 2}
    parts = make_parts(workplace, validation=validation)
    config = build_recipe(tiny.make_recipe(workplace, validation=validation))
    held_out = HeldOutLoss(
        build_index(workplace / "pictures"), method=parts.method, data=config.data, count=2
    )

    def look() -> tuple[float, bytes]:
        images, _ = generate_previews(parts.method, parts.engine, config.validation, tiny.RESOLUTION)
        return held_out.measure(parts.engine), images[0].tobytes()

    before = look()
    spread_out(parts)
    after = look()
    assert abs(before[0] - after[0]) > 1e-5 and before[1] != after[1]


def command(*words: Any) -> Any:
    return CliRunner().invoke(program.app, [str(word) for word in words])


def test_a_run_of_one_image_samples_and_scores_with_its_negative_embedding(tmp_path: Path) -> None:
    tiny.make_images(tmp_path / "pictures", 1)
    tree = tiny.make_recipe(
        tmp_path,
        method={**SECTION, "cfg_scale": "1.5-3.0:cos"},
        train__max_train_steps=2,
        optimizer__learning_rate=0.5,
        engine={"use_ema": True},
        validation={"prompts": ["a <x>"], "num_images": 1, "num_inference_steps": 2},
    )
    trained = command("train", tiny.write_recipe(tmp_path / "r.yaml", tree))
    assert trained.exit_code == 0, trained.output
    run, model, exports = tmp_path / "run", tmp_path / "model", tmp_path / "run" / "exports"
    assert sorted(path.name for path in exports.iterdir()) == [
        "run-neg.pt",
        "run-neg.safetensors",
        "run.pt",
        "run.safetensors",
    ]
    assert read_embedding(exports / "run-neg.pt").name == "run-neg"
    assert read_embedding(exports / "run-neg.safetensors").name == "<x>-neg"

    def sample(prompt: str, *words: Any) -> Any:
        out = tmp_path / "sampled.png"
        options = ["--num-images", 1, "--steps", 2, "--out", out]
        result = command("sample", "--prompt", prompt, *words, *options)
        assert result.exit_code == 0, result.output
        return np.asarray(Image.open(out)).astype(int)

    sampled = sample("a <x>", "--model", run)
    files = sample("a run", "--model", model, "--embedding", exports / "run.pt")
    words = sample("a <x>", "--model", model, "--embedding", exports / "run.safetensors")
    assert np.array_equal(sampled, files) and np.array_equal(sampled, words)
    lone = tmp_path / "run.pt"
    lone.write_bytes((exports / "run.pt").read_bytes())
    assert np.abs(sample("a run", "--model", model, "--embedding", lone) - sampled).max() > 0
    both = [exports / "run-neg.pt", exports / "run.pt"]
    options = [word for path in both for word in ("--embedding", path)]
    assert np.array_equal(sample("a run", "--model", model, *options), sampled)
    scores = command("score", run, "--num-images", 1, "--json")
    assert scores.exit_code == 0 and json.loads(scores.stdout)["method"] == "prompt_tuning"
    hint = describe("run-neg.safetensors", run_name="run", recipe=tree)
    assert 'token="<x>-neg"' in hint.uses[0].text and "negative prompt" in hint.what


def test_a_memory_plan_includes_the_decoder_only_if_gradients_pass_through(tmp_path: Path) -> None:
    peaks = []
    for weight in (0.0, 1.0):
        tree = tiny.make_recipe(tmp_path, method={**SECTION, "rec_loss_w": weight})
        recipe = build_recipe(tree)
        peaks.append(count_run(recipe, method_shape(recipe), 1).full.activations)
    assert peaks[0] < peaks[1]
