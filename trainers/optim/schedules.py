"""Learning rates as a pure function of the optimizer step, so there is no scheduler state to save or synchronise."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import get_args

from dreamfleet.datasets.errors import RecipeError
from dreamfleet.trainers.config.learning_rate import (
    POLYNOMIAL_END,
    ScheduleName,
    parse_rules,
    parse_webui_schedule,
)

SCHEDULES: tuple[str, ...] = get_args(ScheduleName)


def make_multiplier(
    name: str,
    *,
    warmup: int,
    total: int,
    num_cycles: float = 1,
    power: float = 1.0,
    rules: str = "1.0",
    base_rate: float = 1.0,
) -> Callable[[int], float]:
    """Return the multiplier of the learning rate as a function of the optimizer step (from 0), as in diffusers.

    ``total``: optimizer steps, on any number of workers. ``num_cycles``: cycles of ``cosine_with_restarts``; ``cosine``
    is always half a cosine. ``rules``: see :func:`parse_rules`. ``base_rate``: the rate that is multiplied, which
    ``polynomial`` lowers to POLYNOMIAL_END. Raises RecipeError for an unknown name.
    """
    if name == "piecewise_constant":
        *pieces, (last, _) = parse_rules(rules)
        return lambda step: next((value for value, end in pieces if end is not None and step < end), last)
    end = POLYNOMIAL_END / base_rate if name == "polynomial" else 0.0
    # Functions of the elapsed share of the steps after warm-up, from 0 to 1.
    curves: dict[str, Callable[[float], float]] = {
        "constant": lambda passed: 1.0,
        "constant_with_warmup": lambda passed: 1.0,
        "linear": lambda passed: max(0.0, 1.0 - passed),
        "cosine": lambda passed: _half_cosine(min(1.0, passed)),
        "cosine_with_restarts": lambda passed: (
            _half_cosine((max(1.0, num_cycles) * passed) % 1.0) if passed < 1 else 0.0
        ),
        "polynomial": lambda passed: (1.0 - end) * max(0.0, 1.0 - passed) ** power + end,
    }
    if name not in curves:
        raise RecipeError(f"optimizer.lr_scheduler: unknown {name!r}; known: {', '.join(SCHEDULES)}")
    curve, warmup = curves[name], warmup if name != "constant" else 0

    def at(step: int) -> float:
        if step < warmup:
            return step / warmup
        return curve((step - warmup) / max(1, total - warmup))

    return at


def _half_cosine(passed: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * passed))


def make_rate(rate: float | str, multiplier: Callable[[int], float]) -> Callable[[int], float]:
    """Return the learning rate as a function of the step (from 0); a webui schedule string ignores the multiplier."""
    if not isinstance(rate, str):
        return lambda step: rate * multiplier(step)
    pieces = parse_webui_schedule(rate)

    def at(step: int) -> float:
        for value, end in pieces:
            if end is None or step < end:
                return value
        return pieces[-1][0]

    return at
