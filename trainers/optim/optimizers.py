"""Builds the optimizer and the learning rates of a recipe."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from dreamfleet.datasets.errors import ResourceError
from dreamfleet.datasets.registry import load_attribute
from dreamfleet.trainers.config.builtin_optimizers import AdamOptions
from dreamfleet.trainers.config.optimizer import OptimizerConfig
from dreamfleet.trainers.optim.param_group import ParamGroup
from dreamfleet.trainers.optim.schedules import make_multiplier, make_rate


def make_optimizer(groups: list[ParamGroup], config: OptimizerConfig) -> torch.optim.Optimizer:
    """Build the optimizer with one parameter group per non-empty method group.

    Raises ResourceError if the optimizer needs a package that is not installed.
    """
    check_package(config)
    groups = [group for group in groups if group.params]
    params = [{"params": list(group.params.values()), "name": group.name} for group in groups]
    options = config.own_options().with_rates(
        {group.name: (_rate_of_group(group, config), group.scale) for group in groups}
    )
    made: torch.optim.Optimizer = resolve(config.kind.build)(params, options)
    return made


def build_adamw(params: list[dict[str, Any]], options: AdamOptions) -> torch.optim.Optimizer:
    """Return torch's fused AdamW for the parameter groups of a run."""
    return torch.optim.AdamW(params, lr=0.0, **options.model_dump(), fused=True)


def check_package(config: OptimizerConfig) -> None:
    """Raise ResourceError if the optimizer of a recipe needs a package that is not installed."""
    kind = config.kind
    if kind.package is not None and importlib.util.find_spec(kind.package) is None:
        package = f"'dreamfleet[{kind.extra}]'" if kind.extra else kind.package
        raise ResourceError(f"optimizer.name: {config.name} needs {kind.package}: pip install {package}")


def resolve(function: Callable[..., Any] | str) -> Callable[..., Any]:
    """Return a function of an :class:`Optimizer`, which may be given as ``"module:attribute"``."""
    if not isinstance(function, str):
        return function
    found: Callable[..., Any] = load_attribute(function, what="the optimizer's function")
    return found


def make_rates(
    groups: list[ParamGroup], config: OptimizerConfig, *, total_steps: int, global_batch: int
) -> dict[str, Callable[[int], float]]:
    """Return the learning rate of each group as a function of the optimizer step (from 0)."""
    scale_all = global_batch if config.scale_lr else 1
    multiplier = make_multiplier(
        config.lr_scheduler,
        warmup=config.lr_warmup_steps,
        total=total_steps,
        num_cycles=config.lr_num_cycles,
        power=config.lr_power,
        rules=config.lr_rules,
        base_rate=1.0 if isinstance(config.learning_rate, str) else config.learning_rate * scale_all,
    )
    return {
        group.name: _scaled(make_rate(_rate_of_group(group, config), multiplier), group.scale * scale_all)
        for group in groups
    }


def _rate_of_group(group: ParamGroup, config: OptimizerConfig) -> float | str:
    return rate_of(group.rates_of or group.name, config) if group.rate is None else group.rate


def rate_of(group: str, config: OptimizerConfig) -> float | str:
    """Return a group's learning rate (a number, or a schedule in the webui's syntax) from the recipe.

    ``text_encoder_2`` falls back to the rate of ``text_encoder``, and every group to ``learning_rate``.
    """
    every, text, second = config.learning_rate, config.text_encoder_lr, config.text_encoder_2_lr
    own = {"text_encoder": [text], "text_encoder_2": [second, text]}.get(group, [])
    return next((rate for rate in own if rate is not None), every)


def _scaled(rate: Callable[[int], float], scale: float) -> Callable[[int], float]:
    return lambda step: scale * rate(step)
