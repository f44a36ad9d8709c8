"""Learning rates as a pure function of the step: no scheduler state to save, none to get out of step on N workers."""

from __future__ import annotations

import itertools
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


POLYNOMIAL_END = 1e-7  # the learning rate that diffusers' polynomial ends at


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
    """Make the function from optimizer step (from 0) to what multiplies the learning rate: diffusers' names and curves.

    ``total`` counts optimizer steps whatever the number of workers. ``num_cycles`` is how often `cosine_with_restarts`
    runs through a cosine; `cosine` is always half of one. ``rules``: see :func:`parse_rules`. ``base_rate`` is the rate
    that is multiplied, of which `polynomial` leaves POLYNOMIAL_END. Raises RecipeError for an unknown name.
    """
    if name == "piecewise_constant":
        *pieces, (last, _) = parse_rules(rules)
        return lambda step: next((value for value, end in pieces if end is not None and step < end), last)
    end = POLYNOMIAL_END / base_rate if name == "polynomial" else 0.0
    # Each as a function of what has passed after the warm-up, from 0 to 1.
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
    curve, rises = curves[name], warmup if name != "constant" else 0

    def at(step: int) -> float:
        if step < rises:
            return step / rises
        return curve((step - rises) / max(1, total - rises))

    return at


def _half_cosine(passed: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * passed))


def parse_rules(text: str) -> list[tuple[float, int | None]]:
    """Parse diffusers' ``"1:10,0.1:20,0.005"`` into (multiplier, end) pairs: 1 before step 10, 0.1 before step 20, ...

    Raises ValueError for text that holds anything else; the last piece alone has no end, None.
    """
    *items, last = text.split(",")
    try:
        split = [item.partition(":") for item in items]
        pieces = sorted(((float(value), int(end)) for value, _, end in split), key=lambda piece: piece[1])
        until_the_end = float(last)
    except ValueError:
        pieces, until_the_end = [], math.nan
    values, ends = [*(value for value, _ in pieces), until_the_end], [0, *(end for _, end in pieces)]
    if not all(0 <= value < math.inf for value in values) or any(a >= b for a, b in itertools.pairwise(ends)):
        raise ValueError(
            f"{text!r} is not like '1:10,0.1:20,0.005': MULTIPLIER:STEP, ..., MULTIPLIER multiplies the rate by 1 "
            "before step 10, by 0.1 before step 20, and by 0.005 from then on"
        )
    return [*pieces, (until_the_end, None)]


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
