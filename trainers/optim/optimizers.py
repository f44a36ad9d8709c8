"""Builds the optimizer and the learning rates of a recipe."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dreamfleet.datasets.errors import ResourceError
from dreamfleet.trainers.config.optimizer import OptimizerConfig
from dreamfleet.trainers.optim.adafactor import Adafactor
from dreamfleet.trainers.optim.param_group import ParamGroup
from dreamfleet.trainers.optim.schedules import make_multiplier, make_rate


def make_optimizer(groups: list[ParamGroup], config: OptimizerConfig) -> torch.optim.Optimizer:
    """Build the optimizer with one parameter group per non-empty method group.

    Raises ResourceError for the 8-bit optimizer without bitsandbytes.
    """
    options: dict[str, Any] = {
        "lr": 0.0,
        "betas": (config.adam_beta1, config.adam_beta2),
        "weight_decay": config.adam_weight_decay,
        "eps": config.adam_epsilon,
    }
    params = [{"params": list(group.params.values()), "name": group.name} for group in groups if group.params]
    if config.name == "adafactor":
        return Adafactor(params, lr=0.0, weight_decay=config.adam_weight_decay)
    if config.name == "adamw8bit":
        return import_adamw8bit()(params, **options)
    return torch.optim.AdamW(params, **options, fused=True)


def import_adamw8bit() -> type[torch.optim.Optimizer]:
    """Return bitsandbytes' 8-bit AdamW. Raises ResourceError if it is not installed."""
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise ResourceError(
            "optimizer.name: adamw8bit needs bitsandbytes: pip install 'dreamfleet[gpu]'"
        ) from None
    return AdamW8bit


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
