"""Test a model family from outside the tree, a flow-matching transformer: train, sample, export and plan."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from drawing import generate
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dreamfleet.datasets.errors import ModelError, RecipeError
from dreamfleet.trainers.config.model import ModelConfig
from dreamfleet.trainers.launch import fit
from dreamfleet.trainers.memory.plan import plan_memory
from dreamfleet.trainers.models.condition import Condition
from dreamfleet.trainers.models.family import FAMILIES, DiffusionModel, family_of, load_model, load_shape
from dreamfleet.trainers.models.prompt_pieces import Piece
from dreamfleet.trainers.recipe import build_recipe

CHANNELS, FACTOR, WIDTH, TOKENS = 6, 8, 16, 12
SHIFT, SCALE = 0.1, 1.5  # shift and scale of latents


class ToyBlock(nn.Module):
    """Attention of latent cells to themselves and to the prompt's tokens, then an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, cells: Tensor, tokens: Tensor) -> Tensor:
        everything = torch.cat([cells, tokens], dim=1)
        cells = cells + self.attention(cells, everything, everything, need_weights=False)[0]
        return cells + self.mlp(cells)


class ToyTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(CHANNELS, WIDTH), nn.Linear(WIDTH, CHANNELS)
        self.time = nn.Linear(1, WIDTH)
        self.blocks = nn.ModuleList(ToyBlock() for _ in range(2))

    def forward(self, noisy: Tensor, times: Tensor, context: Tensor) -> Tensor:
        cells = self.into(noisy.flatten(2).transpose(1, 2))
        cells = cells + self.time(times.reshape(-1, 1, 1).to(cells.dtype).expand(len(noisy), -1, -1))
        for block in self.blocks:
            cells = block(cells, context)
        return self.out(cells).transpose(1, 2).reshape(noisy.shape)


class ToyVae(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Conv2d(3, CHANNELS, FACTOR, stride=FACTOR)
        self.decoder = nn.ConvTranspose2d(CHANNELS, 3, FACTOR, stride=FACTOR)


class ByteEncoder(nn.Module):
    """Encodes the bytes of a text; it has no token table of transformers, so it accepts no learned words."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(256, WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        return self.mix(self.table(ids))


class ToySampler:
    """Euler steps along the straight path from noise (time 1) to an image (time 0)."""

    init_noise_sigma = 1.0

    def set_timesteps(self, steps: int, device: Any = None) -> None:
        self.timesteps = torch.linspace(1, 1 / steps, steps, device=device)

    def scale_model_input(self, latents: Tensor, time: Tensor) -> Tensor:
        return latents

    def step(self, velocity: Tensor, time: Tensor, latents: Tensor, *, return_dict: bool) -> tuple[Tensor]:
        return (latents - velocity / len(self.timesteps),)


class ToyModel(DiffusionModel):
    denoiser_name = "transformer"
    block_classes = ("ToyBlock",)

    def __init__(self, folder: str):
        self.folder = folder
        self.content_hash = self.encoder_hash = "toy"
        self.transformer, self.vae, self.text = ToyTransformer(), ToyVae(), ByteEncoder()

    title = "Toy Flow"
    prediction_type = "velocity"
    unsupported: Mapping[str, str] = {
        **dict.fromkeys(("textual_inversion", "prompt_tuning"), "its text encoder has no token table"),
        "safetensors": "there is no single-file layout for it",
    }
    latent_channels, vae_factor, size_multiple, resolution = CHANNELS, FACTOR, FACTOR, 32

    def modules(self) -> dict[str, nn.Module]:
        return {"transformer": self.transformer, "vae": self.vae, "text": self.text}

    @property
    def text_encoders(self) -> list[Any]:
        return [self.text]

    @property
    def tokenizers(self) -> list[Any]:
        return []

    def checkpoint_activations(self, *, text: bool) -> None:
        pass

    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        mean = self.vae.encoder(pixels)
        return mean, torch.full_like(mean, 0.01)

    def scale_latents(self, latents: Tensor) -> Tensor:
        return (latents - SHIFT) * SCALE

    def decode(self, latents: Tensor) -> Tensor:
        return self.vae.decoder(latents / SCALE + SHIFT)

    def tokenize(self, prompts: Sequence[str], swap: Mapping[str, str] | None = None) -> Tensor:
        return torch.tensor([list(prompt.encode()[:TOKENS].ljust(TOKENS)) for prompt in prompts])

    def tokenize_weighted(
        self, texts: Sequence[Sequence[Piece]], *, least: int = 1
    ) -> tuple[Tensor, list[list[float]]]:
        ids = self.tokenize(["".join(piece.text for piece in pieces) for pieces in texts])
        return ids, [[1.0] * TOKENS for _ in texts]

    def encode_tokens(self, input_ids: Tensor) -> Condition:
        return Condition(self.text(input_ids))

    def empty_condition(self, num: int) -> Condition:
        return Condition(torch.empty(num, TOKENS, WIDTH))

    def draw_timestep(self, rng: np.random.Generator) -> float:
        return float(1 / (1 + np.exp(-rng.normal())))

    def even_timesteps(self, count: int) -> Tensor:
        return (torch.arange(count) + 0.5) / count

    def noise_level(self, timesteps: Tensor) -> Tensor:
        return timesteps

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        time = timesteps[:, None, None, None]
        return (1 - time) * latents + time * noise

    def predict(self, noisy: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        return self.transformer(noisy, timesteps, condition.context)

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return noise - latents

    def clean_estimate(self, predicted: Tensor, noisy: Tensor, timesteps: Tensor) -> Tensor:
        return noisy.float() - timesteps[:, None, None, None] * predicted.float()

    def make_sampler(self, name: str) -> Any:
        return ToySampler()

    def save_folder(self, folder: Path, *, dtype: torch.dtype | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "toy.json").write_text(json.dumps({"blocks": 2}))
        for name, part in self.modules().items():
            save_file({key: t.to(dtype or t.dtype).contiguous() for key, t in part.state_dict().items()},
                      folder / f"{name}.safetensors")  # fmt: skip


class ToyFamily:
    def recognises(self, config: ModelConfig) -> bool:
        return (Path(config.pretrained_model_name_or_path) / "toy.json").is_file()

    def load(self, config: ModelConfig, needs: Collection[str]) -> ToyModel:
        folder = Path(config.pretrained_model_name_or_path)
        model = ToyModel(str(folder))
        for name, part in model.modules().items():
            part.load_state_dict(load_file(folder / f"{name}.safetensors"))
        model.freeze()
        return model

    def load_shape(self, config: ModelConfig, needs: Collection[str]) -> ToyModel:
        with torch.device("meta"):
            model = ToyModel(config.pretrained_model_name_or_path)
        model.freeze()
        return model


@pytest.fixture(autouse=True)
def toy_family() -> Iterator[None]:
    FAMILIES.register("toy")(ToyFamily())
    yield
    FAMILIES.unregister("toy")


def recipe(tmp_path: Path, **changes: Any) -> Any:
    if not (tmp_path / "model").exists():
        torch.manual_seed(0)
        ToyModel("toy").save_folder(tmp_path / "model")
        tiny.make_images(tmp_path / "holdout", 2, seed=5)
    options = {
        "method": {"name": "native", "train_text_encoder": True},
        "train__max_train_steps": 40,
        "optimizer__learning_rate": 3e-3,
        "validation": {
            "prompts": ["a cat"],
            "num_images": 1,
            "steps": 40,
            "num_inference_steps": 3,
            "holdout": str(tmp_path / "holdout"),
        },
        **changes,
    }
    return build_recipe(tiny.make_recipe(tmp_path, **options))


def test_a_registered_family_trains_previews_and_exports(tmp_path: Path) -> None:
    result = fit(recipe(tmp_path))
    run = tmp_path / "run"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    held_out = [line["holdout_loss"] for line in lines if "holdout_loss" in line]
    assert result.summary.exit_reason == "completed"
    assert held_out[-1] < 0.95 * held_out[0], "the held-out loss of the flow falls"
    with Image.open(run / "samples" / "step-000040.png") as image:
        assert image.size == (32, 32)
    base = load_model(ModelConfig(pretrained_model_name_or_path=str(tmp_path / "model")))
    tuned = load_model(ModelConfig(pretrained_model_name_or_path=str(run / "exports" / "diffusers")))
    assert isinstance(tuned, ToyModel) and [path.name for path in (run / "exports").iterdir()] == [
        "diffusers"
    ]
    changed = {
        name: any(
            not torch.equal(a, b)
            for a, b in zip(part.parameters(), tuned.modules()[name].parameters(), strict=True)
        )
        for name, part in base.modules().items()
    }
    assert changed == {"transformer": True, "text": True, "vae": False}
    ours, theirs = (
        generate(model, ["a cat"], seeds=[1], steps=3, guidance_scale=2)[0] for model in (base, tuned)
    )
    assert ours.size == (32, 32) and not np.array_equal(np.asarray(ours), np.asarray(theirs))


def test_a_registered_family_is_planned_without_weights(tmp_path: Path) -> None:
    plan = plan_memory(recipe(tmp_path))
    model = load_shape(ModelConfig(pretrained_model_name_or_path=str(tmp_path / "model")))
    assert all(param.is_meta for part in model.modules().values() for param in part.parameters())
    counted = {name: sum(p.numel() for p in part.parameters()) for name, part in model.modules().items()}
    assert plan.parameters == counted
    assert (
        plan.estimates[0].gpu_total > 0
        and sum(plan.counts.learning) == counted["transformer"] + counted["text"]
    )


def test_unsupported_features_are_refused_with_the_reason(tmp_path: Path) -> None:
    word = {"name": "textual_inversion", "placeholder_token": "<x>"}
    with pytest.raises(ModelError, match="no token table"):
        fit(recipe(tmp_path, method=word))
    with pytest.raises(RecipeError, match=r"safetensors.*single-file"):
        fit(recipe(tmp_path, train__export_formats=["safetensors"], output_dir=str(tmp_path / "other")))
    with pytest.raises(ModelError, match=r"Toy Flow.*snr_gamma"):
        fit(recipe(tmp_path, train__snr_gamma=5.0, output_dir=str(tmp_path / "third")))


def test_other_models_are_not_detected_as_the_toy_family(tmp_path: Path) -> None:
    config = ModelConfig(pretrained_model_name_or_path=str(tiny.make_tiny_model(tmp_path / "sd")))
    assert family_of(config) is FAMILIES.get("stable_diffusion")
