"""Test samplers under the webui's names: noise levels, and results of k-diffusion formulas (written here)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from drawing import generate
from tiny_models import tiny_model

from dreamfleet.trainers.config.samplers import plain_sampler
from dreamfleet.trainers.models.formats.ldm_names import FAMILY_CONFIGS
from dreamfleet.trainers.models.sampling.sample import to_images

SPACINGS = ["leading", "trailing", "linspace"]  # values of a model's config, which the webui ignores


def model_with(**changes: Any) -> Any:
    model = tiny_model(changes.get("prediction_type", "epsilon"))
    model.scheduler = type(model.scheduler).from_config(model.scheduler.config, **changes)
    return model


def levels(model: Any) -> np.ndarray:
    """Return the noise level of each training timestep relative to the image: shape (timesteps,)."""
    kept = model.scheduler.alphas_cumprod.double().numpy()
    return ((1 - kept) / kept) ** 0.5


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [10, 20, 30])
def test_euler_a_has_even_steps_from_the_last_timestep_to_the_first(spacing: str, steps: int) -> None:
    model = model_with(timestep_spacing=spacing)
    scheduler = model.make_sampler(plain_sampler("Euler a"))
    scheduler.set_timesteps(steps)
    at = np.linspace(999, 0, steps)
    assert np.allclose(scheduler.timesteps, at, atol=1e-3)
    expected = np.exp(np.interp(at, np.arange(1000), np.log(levels(model))))
    assert np.allclose(scheduler.sigmas, [*expected, 0], rtol=2e-3)
    assert float(scheduler.init_noise_sigma) == pytest.approx(levels(model)[-1], rel=1e-4)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", ["DPM++ 2M", "DPM++ 2M Karras"])
def test_dpm_has_karras_steps_between_first_and_last_level(spacing: str, name: str) -> None:
    model = model_with(timestep_spacing=spacing)
    scheduler = model.make_sampler(plain_sampler(name))
    scheduler.set_timesteps(12)
    last, first = levels(model)[[0, -1]] ** (1 / 7)
    expected = np.linspace(first, last, 12) ** 7
    assert np.allclose(scheduler.sigmas, [*expected, 0], rtol=1e-4)
    assert scheduler.config.algorithm_type == "dpmsolver++"


def test_ddim_uses_every_nth_timestep_from_the_second() -> None:
    scheduler = model_with().make_sampler(plain_sampler("DDIM"))
    scheduler.set_timesteps(20)
    assert scheduler.timesteps.tolist() == [step + 1 for step in range(0, 1000, 50)][::-1]


@pytest.mark.parametrize("name", ["Euler a", "DPM++ 2M"])
def test_zero_snr_starts_at_the_last_timestep(name: str) -> None:
    model = model_with(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )
    scheduler = model.make_sampler(plain_sampler(name))
    scheduler.set_timesteps(10)
    assert scheduler.timesteps.tolist() == [999 - 100 * step for step in range(10)]


def test_published_configs_end_at_the_first_timestep() -> None:
    for configs in FAMILY_CONFIGS.values():
        assert configs["scheduler"]["set_alpha_to_one"] is False


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_euler_a_follows_the_webui_formula(prediction_type: str) -> None:
    """Test ancestral steps: denoise to below the next noise level, then add fresh noise up to it."""
    model, steps, scale = model_with(prediction_type=prediction_type, timestep_spacing="leading"), 6, 3.0
    generator = torch.Generator().manual_seed(11)

    def noise() -> torch.Tensor:
        return torch.randn((4, 8, 8), generator=generator)[None]

    context = torch.cat([model.encode(["b"]).context, model.encode(["a cat"]).context])
    at = np.linspace(999, 0, steps)
    sigmas = [*np.interp(at, np.arange(1000), levels(model)), 0.0]
    x = noise() * sigmas[0]
    with torch.no_grad():
        for step, sigma, following in zip(at, sigmas, sigmas[1:], strict=False):
            entering = torch.cat([x, x]) / (sigma**2 + 1) ** 0.5
            output = model.unet(entering, torch.tensor([step]).float(), context, return_dict=False)[0]
            away, towards = output.chunk(2)
            output = away + scale * (towards - away)
            clean = x - sigma * output
            if prediction_type == "v_prediction":
                clean = x / (sigma**2 + 1) - output * sigma / (sigma**2 + 1) ** 0.5
            up = (following**2 * (sigma**2 - following**2) / sigma**2) ** 0.5
            down = (following**2 - up**2) ** 0.5
            x = x + (x - clean) / sigma * (down - sigma) + (noise() * up if following else 0)
        expected = to_images(model.decode(x.float()))[0]
    image = generate(
        model,
        ["a cat"],
        seeds=[11],
        negative_prompt="b",
        steps=steps,
        guidance_scale=scale,
        scheduler="Euler a",
    )[0]
    assert np.abs(np.asarray(image, float) - np.asarray(expected, float)).mean() < 0.05
