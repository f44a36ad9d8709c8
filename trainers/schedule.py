"""Learning rates as a pure function of the step: no scheduler state to save, none to get out of step on N workers."""

from __future__ import annotations

import math
from collections.abc import Callable

from dreamfleet.datasets.errors import RecipeError

SCHEDULES = (
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "piecewise_constant",
)


def multiplier_at(
    step: int,
    *,
    name: str,
    warmup: int,
    total: int,
    num_cycles: float = 0.5,
    power: float = 1.0,
    rules: str = "",
) -> float:
    """Return what multiplies the learning rate at an optimizer step (counted from 0); diffusers' names and curves.

    ``total`` counts optimizer steps whatever the number of workers. ``piecewise_constant`` reads ``rules`` such as
    ``"1:10,0.1:20,0.005"``: 1 before step 10, 0.1 before step 20, then 0.005.
    """
    if name == "constant":
        return 1.0
    if name == "piecewise_constant":
        return _piecewise(step, rules)
    if step < warmup:
        return step / max(1, warmup)
    if name == "constant_with_warmup":
        return 1.0
    progress = (step - warmup) / max(1, total - warmup)
    if name == "linear":
        return max(0.0, (total - step) / max(1, total - warmup))
    if name == "cosine":
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * num_cycles * 2.0 * progress)))
    if name == "cosine_with_restarts":
        cycles = max(1, round(num_cycles))
        return 0.0 if progress >= 1.0 else 0.5 * (1.0 + math.cos(math.pi * ((cycles * progress) % 1.0)))
    if name == "polynomial":
        end = 1e-7  # diffusers' lr_end, as a share of a learning rate of 1
        return end if step > total else (1.0 - end) * max(0.0, 1.0 - progress) ** power + end
    raise RecipeError(f"optimizer.lr_scheduler: unknown {name!r}; known: {', '.join(SCHEDULES)}")


def parse_webui_schedule(text: str) -> list[tuple[float, int | None]]:
    """Parse webui's ``"0.005:100, 1e-3:1000, 1e-5"`` into (rate, last step) pairs; None or -1 means to the end.

    Raises RecipeError for text that is no schedule or whose steps do not grow.
    """
    pieces: list[tuple[float, int | None]] = []
    for item in text.split(","):
        rate, _, until = item.strip().partition(":")
        try:
            value, end = float(rate), int(until) if until.strip() else None
        except ValueError:
            raise RecipeError(
                f"learning rate {text!r}: {item.strip()!r} is not RATE or RATE:STEP, as in '0.005:100, 1e-3:1000, 1e-5'"
            ) from None
        if not value >= 0 or value == math.inf:
            raise RecipeError(f"learning rate {text!r}: {rate!r} is not a rate")
        if end is not None and end != -1 and end < 1:
            raise RecipeError(f"learning rate {text!r}: {item.strip()!r} ends before the first step")
        pieces.append((value, None if end == -1 else end))
    ends = [end for _, end in pieces if end is not None]
    if ends != sorted(set(ends)) or any(end is None for _, end in pieces[:-1]):
        raise RecipeError(
            f"learning rate {text!r}: the steps must grow, and only the last piece may be without one"
        )
    return pieces


def last_step(rate: float | str) -> int | None:
    """Return the step a webui schedule string ends at, where training stops; None for one without an end."""
    return parse_webui_schedule(rate)[-1][1] if isinstance(rate, str) else None


def make_rate(rate: float | str, multiplier: Callable[[int], float]) -> Callable[[int], float]:
    """Make the function from optimizer step (from 0) to learning rate; a schedule string stands by itself."""
    if not isinstance(rate, str):
        return lambda step: rate * multiplier(step)
    pieces = parse_webui_schedule(rate)

    def at(step: int) -> float:
        for value, end in pieces:
            if end is None or step < end:
                return value
        return pieces[-1][0]

    return at


def _piecewise(step: int, rules: str) -> float:
    *steps, last = rules.split(",")
    for rule in steps:
        value, _, until = rule.partition(":")
        if step < int(until):
            return float(value)
    return float(last)
