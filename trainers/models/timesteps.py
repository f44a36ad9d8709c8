"""Distributions of training timesteps, and the draw of a recipe's timesteps.

Each distribution is a function ``f(rng, low, high, options)`` that returns a timestep from ``low`` to before ``high``;
higher timesteps have more noise. Sources: logit-normal and CosMap, Esser et al. 2024 (arXiv 2403.03206), section 3.1;
the biased ones, ``timestep_bias_strategy`` of diffusers' ``train_text_to_image_sdxl.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from dreamfleet.datasets.errors import RecipeError
from dreamfleet.trainers.config.noise import TIMESTEP_SAMPLINGS, NoiseConfig

#: Draws a timestep with a sample's random numbers.
TimestepDraw = Callable[[np.random.Generator], float]


def make_timestep_draw(options: NoiseConfig, num_timesteps: int, *, model: str) -> TimestepDraw:
    """Return a function that draws a timestep between the recipe's limits from its distribution.

    ``model``: name in errors. Raises RecipeError for limits outside of ``num_timesteps``, the number of timesteps.
    """
    low, high = options.min_timestep or 0, options.max_timestep or num_timesteps
    for key, value, most in (("min", low, num_timesteps - 1), ("max", high, num_timesteps)):
        if value > most:
            raise RecipeError(
                f"train.{key}_timestep: {value}, but {model} has {num_timesteps} timesteps: at most {most}"
            )
    sampling = TIMESTEP_SAMPLINGS.get(options.timestep_sampling)
    return lambda rng: int(sampling(rng, low, high, options))


def uniform(rng: np.random.Generator, low: int, high: int, options: NoiseConfig) -> int:
    """Return a timestep drawn with equal probabilities."""
    return low + int(rng.integers(high - low))


def logit_normal(rng: np.random.Generator, low: int, high: int, options: NoiseConfig) -> int:
    """Return the timestep at ``sigmoid(n)`` of the range, n normal with ``logit_mean`` and ``logit_std``."""
    normal = options.logit_mean + options.logit_std * rng.standard_normal()
    return _at(0.5 + 0.5 * math.tanh(normal / 2), low, high)  # the sigmoid, which overflows for no number


def cosmap(rng: np.random.Generator, low: int, high: int, options: NoiseConfig) -> int:
    """Return the timestep at t = 1 - 1 / (tan(pi u / 2) + 1), u uniform, of the range.

    The density of t is 2 / (pi (1 - 2 t + 2 t^2)), twice as high in the middle as at the ends.
    """
    return _at(1 - 1 / (math.tan(math.pi / 2 * rng.random()) + 1), low, high)


def biased_earlier(rng: np.random.Generator, low: int, high: int, options: NoiseConfig) -> int:
    """Return a timestep, the lowest ``timestep_bias_portion`` of them ``timestep_bias_multiplier`` times as often."""
    end = low + int(options.timestep_bias_portion * (high - low))
    return _biased(rng, (low, high), (low, end), options.timestep_bias_multiplier)


def biased_later(rng: np.random.Generator, low: int, high: int, options: NoiseConfig) -> int:
    """Return a timestep, the highest ``timestep_bias_portion`` of them ``timestep_bias_multiplier`` times as often."""
    begin = high - int(options.timestep_bias_portion * (high - low))
    return _biased(rng, (low, high), (begin, high), options.timestep_bias_multiplier)


def biased_range(rng: np.random.Generator, low: int, high: int, options: NoiseConfig) -> int:
    """Return a timestep, those from ``timestep_bias_begin`` to before ``timestep_bias_end`` more often."""
    preferred = options.timestep_bias_begin, options.timestep_bias_end
    return _biased(rng, (low, high), preferred, options.timestep_bias_multiplier)


def _at(position: float, low: int, high: int) -> int:
    return min(low + int(position * (high - low)), high - 1)


def _biased(
    rng: np.random.Generator, limits: tuple[int, int], preferred: tuple[int, int], factor: float
) -> int:
    """Return a timestep within ``limits``, with probability proportional to ``factor`` in ``preferred``, else to 1."""
    low, high = limits
    begin, end = (min(max(one, low), high) for one in preferred)
    end = max(begin, end)
    more = (factor - 1) * (end - begin)  # probability mass that the preferred timesteps have above the others
    mass = low + rng.random() * (high - low + more)
    if mass < begin:
        return int(mass)
    if mass < end + more:
        return min(begin + int((mass - begin) / factor), end - 1)
    return min(int(mass - more), high - 1)
