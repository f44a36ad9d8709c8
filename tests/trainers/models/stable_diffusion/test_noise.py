"""Test targets and SNR against diffusers, and noise that depends on its sample only."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.training_utils import compute_snr
from tiny_models import tiny_model

from dreamfleet.datasets.rng import key
from dreamfleet.trainers.config.noise import NoiseConfig
from dreamfleet.trainers.models.keyed_noise import draw_noise
from dreamfleet.trainers.models.stable_diffusion.noise import make_target, signal_to_noise


def scheduler(kind: str) -> DDPMScheduler:
    return DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=kind
    )


def below(count: int) -> Callable[[np.random.Generator], int]:
    return lambda rng: int(rng.integers(count))


def test_the_noise_of_a_sample_does_not_depend_on_its_batch() -> None:
    keys = [("instance", 0, 3, "a"), ("instance", 0, 3, "b"), ("instance", 0, 4, "a")]
    noise, timesteps = draw_noise(keys, (4, 8, 8), draw_timestep=below(1000))
    alone, timestep = draw_noise(keys[1:2], (4, 8, 8), draw_timestep=below(1000))
    assert torch.equal(noise[1], alone[0]) and timesteps[1] == timestep[0]
    assert not torch.equal(noise[0], noise[2])


def test_keys_that_agree_in_32_bits_give_different_noise() -> None:
    seen: dict[int, int] = {}
    for number in itertools.count():
        low = key("noise", "x", number) % 2**32  # torch's CPU generator uses these bits of a seed
        if low in seen:
            break
        seen[low] = number
    noise, _ = draw_noise([("x", seen[low]), ("x", number)], (4, 8, 8), draw_timestep=below(1000))
    correlation = np.corrcoef(noise.flatten(1))[0, 1]
    assert abs(correlation) < 0.4, (seen[low], number)


def test_noise_is_standard_normal_and_timesteps_cover_their_range() -> None:
    noise, timesteps = draw_noise([("x", i) for i in range(400)], (4, 8, 8), draw_timestep=below(10))
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    assert set(timesteps.tolist()) == set(range(10))


def test_noise_offset_shifts_whole_channels() -> None:
    keys = [("x", i) for i in range(200)]
    plain, t = draw_noise(keys, (4, 8, 8), draw_timestep=below(1000))
    shifted, t_shifted = draw_noise(
        keys, (4, 8, 8), draw_timestep=below(1000), options=NoiseConfig(noise_offset=0.1)
    )
    difference = shifted - plain
    assert torch.equal(t, t_shifted)
    assert torch.allclose(difference, difference[..., :1, :1].expand_as(difference), atol=1e-6)
    assert 0.08 < difference[..., 0, 0].std() < 0.12


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_a_perfect_prediction_of_the_target_removes_the_noise(kind: str) -> None:
    # The target is correct if diffusers' sampler recovers the clean latents when it is the model's output.
    schedule = scheduler(kind)
    latents, noise = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    for t in (1, 500, 999):
        timesteps = torch.full((2,), t)
        noisy = schedule.add_noise(latents, noise, timesteps)
        found = schedule.step(make_target(schedule, latents, noise, timesteps), t, noisy).pred_original_sample
        if not schedule.config.clip_sample:
            assert torch.allclose(found, latents, atol=1e-2)
        else:
            assert torch.allclose(found, latents.clamp(-1, 1), atol=1e-2)


def test_the_signal_to_noise_ratio_equals_that_of_diffusers() -> None:
    schedule, timesteps = scheduler("epsilon"), torch.tensor([0, 10, 500, 999])
    assert torch.allclose(signal_to_noise(schedule, timesteps), compute_snr(schedule, timesteps))


def test_loss_is_per_sample_and_masked() -> None:
    model = tiny_model()
    noise = torch.ones(3, 4, 8, 8) * torch.tensor([1.0, 2.0, 3.0])[:, None, None, None]
    batch = {"latents": torch.zeros(3, 4, 8, 8), "noise": noise, "timesteps": torch.tensor([1, 2, 3])}
    predicted = torch.zeros(3, 4, 8, 8)
    assert torch.allclose(model.loss(predicted, batch), torch.tensor([1.0, 4.0, 9.0]))
    mask = torch.zeros(3, 1, 8, 8)
    mask[..., :4] = 2.0
    masked = model.loss(predicted, {**batch, "mask": mask})
    assert torch.allclose(masked, torch.tensor([1.0, 4.0, 9.0]))
