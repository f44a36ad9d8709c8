"""Test zero terminal SNR: the last timestep is pure noise, is trained on, and is where sampling starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from drawing import generate

from dreamfleet.datasets.errors import ModelError
from dreamfleet.trainers.config.model import ModelConfig
from dreamfleet.trainers.distributed.context import DistributedContext
from dreamfleet.trainers.methods.export_request import Export
from dreamfleet.trainers.models.denoising_loss import WEIGHTS
from dreamfleet.trainers.models.family import DiffusionModel, load_model
from dreamfleet.trainers.models.stable_diffusion.noise import make_target, signal_to_noise
from dreamfleet.trainers.recipe import build_recipe
from dreamfleet.trainers.run.build import Parts, assemble


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a tiny model that predicts noise."""
    return tiny.make_tiny_model(tmp_path_factory.mktemp("model"))


def load(folder: Path, **options: Any) -> DiffusionModel:
    return load_model(ModelConfig(pretrained_model_name_or_path=str(folder), **options))


ZERO = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}


def test_the_last_timestep_is_pure_noise_and_the_first_is_unchanged(folder: Path) -> None:
    plain, model = (
        load(folder).scheduler,
        load(folder, zero_terminal_snr=True, v_parameterization=True).scheduler,
    )
    assert model.alphas_cumprod[-1] == 0 and plain.alphas_cumprod[-1] > 0.004
    assert model.alphas_cumprod[0] == pytest.approx(float(plain.alphas_cumprod[0]), rel=1e-5)
    latents, noise, last = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8), torch.tensor([999])
    assert torch.equal(model.add_noise(latents, noise, last), noise)
    assert torch.allclose(make_target(model, latents, noise, last), -latents)
    snr = signal_to_noise(model, torch.tensor([0, 998, 999]))
    for weight in WEIGHTS.values():
        assert torch.isfinite(weight.compute(snr, "v_prediction", 5.0)[:2]).all()
    for key in ("snr_gamma", "scale_v_pred_loss_like_noise_pred", "debiased_estimation_loss"):
        assert torch.isfinite(WEIGHTS[key].compute(snr, "v_prediction", 5.0)).all()


def test_noise_prediction_is_refused(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"velocity.*prediction_type: v_prediction"):
        load(folder, rescale_betas_zero_snr=True)


@pytest.mark.parametrize("name", ["ddim", "euler_a", "dpm++"])
def test_sampling_starts_at_the_last_timestep(folder: Path, name: str) -> None:
    model = load(folder, **ZERO)
    scheduler = model.make_sampler(name)
    scheduler.set_timesteps(5)
    assert scheduler.config.timestep_spacing == "trailing"
    assert [round(float(step)) for step in scheduler.timesteps] == [999, 799, 599, 399, 199]
    image = generate(model, ["a cat"], seeds=[1], steps=5, scheduler=name)[0]
    assert np.asarray(image).std() > 0


def test_a_run_trains_saves_and_exports_the_schedule(tmp_path: Path) -> None:
    tree = tiny.make_recipe(tmp_path, method={"name": "native"}, train__snr_gamma=5.0)
    tree["model"] |= ZERO
    parts: Parts = assemble(build_recipe(tree), DistributedContext())
    batch = parts.prepare(parts.feed.batch(0))
    batch["timesteps"] = torch.tensor([999, 500])
    assert torch.isfinite(parts.method(batch).total)
    paths = parts.method.export(
        Export(tmp_path, "x", formats=["diffusers", "safetensors"], step=1, metadata={}, precision="fp32")
    )
    assert [path.name for path in paths] == ["diffusers", "x.safetensors", "x.yaml"]
    for path in paths[:2]:
        config = load(path).scheduler.config
        assert config.rescale_betas_zero_snr and config.prediction_type == "v_prediction"
        assert config.timestep_spacing == "trailing"
