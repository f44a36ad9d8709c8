"""Test shaped noise, input perturbation and timestep distributions against the formulas of other trainers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from tiny_models import tiny_model

from dreamfleet.datasets.errors import RecipeError
from dreamfleet.datasets.rng import numpy_rng
from dreamfleet.trainers.config.noise import NoiseConfig
from dreamfleet.trainers.models.keyed_noise import draw_noise, perturb_input

SHAPE = (4, 9, 12)
KEYS: list[tuple[int | str, ...]] = [("instance", 0, 3, "a"), ("instance", 0, 3, "b")]


def noise_of(keys: list[tuple[int | str, ...]] = KEYS, **options: Any) -> torch.Tensor:
    return draw_noise(keys, SHAPE, draw_timestep=lambda rng: 1, options=NoiseConfig(**options))[0]


def bilinear(low: np.ndarray, height: int, width: int) -> np.ndarray:
    """Enlarge ``[C, h, w]`` with pixel centres aligned and edges repeated, as torch's Upsample(mode="bilinear")."""

    def weights(size: int, small: int) -> np.ndarray:
        found = np.zeros((size, small))
        for i in range(size):
            place = max(0.0, (i + 0.5) * small / size - 0.5)
            first = int(place)
            second = min(first + 1, small - 1)
            found[i, first] += 1 - (place - first)
            found[i, second] += place - first
        return found

    rows, columns = weights(height, low.shape[1]), weights(width, low.shape[2])
    return np.einsum("ih,chw,jw->cij", rows, low, columns)


@pytest.mark.parametrize(("iterations", "discount"), [(1, 0.3), (6, 0.3), (10, 0.8)])
def test_multiresolution_noise_equals_kohyas_pyramid_noise(iterations: int, discount: float) -> None:
    # kohya-ss/sd-scripts, library/custom_train_functions.py, pyramid_noise_like, for a batch of one image.
    shaped = noise_of(multires_noise_iterations=iterations, multires_noise_discount=discount)
    for row, key in enumerate(KEYS):
        rng, total = numpy_rng("multires", *key), noise_of()[row].double().numpy()
        for level in range(iterations):
            ratio = (rng.random() * 2 + 2) ** level
            height, width = max(1, int(SHAPE[1] / ratio)), max(1, int(SHAPE[2] / ratio))
            low = rng.standard_normal((SHAPE[0], height, width), dtype=np.float32)
            total = total + bilinear(low.astype(float), SHAPE[1], SHAPE[2]) * discount**level
            if height == 1 or width == 1:
                break
        expected = total / total.std(ddof=1)
        assert np.allclose(shaped[row].numpy(), expected, atol=1e-5)


def test_the_strength_of_the_offset_is_random_between_zero_and_noise_offset() -> None:
    keys: list[tuple[int | str, ...]] = [("x", number) for number in range(300)]
    plain, fixed = noise_of(keys), noise_of(keys, noise_offset=0.1)
    random = noise_of(keys, noise_offset=0.1, noise_offset_random_strength=True)
    # kohya: noise + rand(1) * noise_offset * randn(B, C, 1, 1)
    strengths = ((random - plain) / (fixed - plain))[:, :, 0, 0]
    assert torch.allclose(strengths, strengths[:, :1].expand_as(strengths), atol=1e-3), "one for each image"
    expected = [numpy_rng("offset_strength", *key).random() for key in keys]
    assert np.allclose(strengths[:, 0], expected, atol=1e-3)


@pytest.mark.parametrize("is_random", [False, True])
def test_input_perturbation_changes_the_input_but_not_the_target(is_random: bool) -> None:
    # Ning et al. 2023 (arXiv 2301.11706), algorithm 1: y = sqrt(abar) x + sqrt(1 - abar) (eps + gamma xi), target eps.
    options = NoiseConfig(ip_noise_gamma=0.1, ip_noise_gamma_random_strength=is_random)
    noise = noise_of()
    perturbed = perturb_input(noise, KEYS, options)
    assert perturbed is not None and perturb_input(noise, KEYS, NoiseConfig()) is None
    for row, key in enumerate(KEYS):
        rng = numpy_rng("ip_noise", *key)
        gamma = 0.1 * (rng.random() if is_random else 1)
        xi = rng.standard_normal(SHAPE, dtype=np.float32)
        assert np.allclose(perturbed[row], noise[row].numpy() + gamma * xi, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"noise_offset": 0.1, "noise_offset_random_strength": True},
        {"multires_noise_iterations": 6},
        {"ip_noise_gamma": 0.1, "ip_noise_gamma_random_strength": True},
        {"timestep_sampling": "logit_normal"},
        {"timestep_sampling": "later", "timestep_bias_multiplier": 3.0},
    ],
)
def test_the_draws_of_a_sample_do_not_depend_on_its_batch(options: dict[str, Any]) -> None:
    model, config = tiny_model(), NoiseConfig(**options)

    def draw(keys: list[tuple[int | str, ...]]) -> list[torch.Tensor]:
        noise, timesteps = model.draw_noise(keys, SHAPE, config)
        perturbed = perturb_input(noise, keys, config)
        return [noise, timesteps, noise if perturbed is None else perturbed]

    for both, second, first in zip(draw(KEYS), draw(KEYS[::-1]), draw(KEYS[:1]), strict=True):
        assert torch.equal(both, second.flip(0)) and torch.equal(both[:1], first)


def draws_of(count: int = 20_000, **options: Any) -> np.ndarray:
    draw = tiny_model().timestep_draw(NoiseConfig(**options))
    rng = np.random.default_rng(0)
    return np.array([draw(rng) for _ in range(count)])


def sigmoid_normal(mean: float, std: float) -> Callable[[float], float]:
    return lambda t: float(stats.norm.cdf((math.log(t / (1 - t)) - mean) / std))


def cosmap(t: float) -> float:
    # The integral of Esser et al. 2024 (arXiv 2403.03206), eq. 21: 2 / (pi - 2 pi t + 2 pi t^2).
    return 2 / math.pi * math.atan(t / (1 - t))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            {"timestep_sampling": "logit-normal", "logit_mean": 0.5, "logit_std": 0.8},
            sigmoid_normal(0.5, 0.8),
        ),
        ({"timestep_distribution": "LOGIT_NORMAL"}, sigmoid_normal(0, 1)),
        ({"timestep_sampling": "COS_MAP"}, cosmap),
        ({"min_timestep": 0}, lambda t: t),
    ],
)
def test_continuous_distributions_have_their_density(
    options: dict[str, Any], expected: Callable[[float], float]
) -> None:
    for low, high in ((0, 1000), (200, 700)):
        found = draws_of(**{**options, "min_timestep": low, "max_timestep": high})
        assert found.min() >= low and found.max() < high
        for share in (0.1, 0.35, 0.5, 0.8):
            below = float((found < low + share * (high - low)).mean())
            assert below == pytest.approx(expected(share), abs=0.015), (low, share)


def diffusers_weights(
    strategy: str, *, multiplier: float, portion: float, begin: int, end: int
) -> np.ndarray:
    """diffusers, examples/text_to_image/train_text_to_image_sdxl.py, generate_timestep_weights."""
    weights, number = np.ones(1000), int(portion * 1000)
    chosen = {"earlier": slice(0, number), "later": slice(-number, None), "range": slice(begin, end)}
    if strategy in chosen:
        weights[chosen[strategy]] *= multiplier
    return weights / weights.sum()


@pytest.mark.parametrize("strategy", ["earlier", "later", "range", "none"])
@pytest.mark.parametrize("multiplier", [4.0, 0.25])
def test_biased_distributions_have_the_weights_of_diffusers(strategy: str, multiplier: float) -> None:
    found = draws_of(
        timestep_bias_strategy=strategy,
        timestep_bias_multiplier=multiplier,
        timestep_bias_portion=0.3,
        timestep_bias_begin=450,
        timestep_bias_end=620,
    )
    weights = diffusers_weights(strategy, multiplier=multiplier, portion=0.3, begin=450, end=620)
    counts = Counter(found.tolist())
    assert min(counts) >= 0 and max(counts) < 1000
    for begin in range(0, 1000, 50):
        share = sum(counts[t] for t in range(begin, begin + 50)) / len(found)
        assert share == pytest.approx(weights[begin : begin + 50].sum(), abs=0.008), begin
    edges = {"earlier": 300, "later": 700, "range": 450}
    if (edge := edges.get(strategy)) and multiplier > 1:
        low, high = sorted([counts[edge - 1] + counts[edge - 2], counts[edge] + counts[edge + 1]])
        assert high > 2 * low, "the border is at the timestep of diffusers"


def test_the_limits_of_the_default_distribution_change_no_draw() -> None:
    default = draws_of(count=500)
    assert np.array_equal(default, draws_of(count=500, min_timestep=0, max_timestep=1000))
    assert np.array_equal(draws_of(count=500, min_timestep=999), np.full(500, 999))


def test_limits_beyond_the_timesteps_of_the_model_are_an_error() -> None:
    for key, value in (("min_timestep", 1000), ("max_timestep", 1001)):
        with pytest.raises(RecipeError, match=rf"train.{key}: {value}.*1000 timesteps"):
            tiny_model().timestep_draw(NoiseConfig.model_validate({key: value}))
