"""Parses learning-rate schedules: diffusers' ``1:10,0.1:20,0.005`` and the webui's ``0.005:100, 1e-3:1000``."""

from __future__ import annotations

import itertools
import math
from typing import Literal

from dreamfleet.datasets.errors import RecipeError

# diffusers' names of schedules
ScheduleName = Literal[
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "piecewise_constant",
]
POLYNOMIAL_END = 1e-7  # final learning rate of diffusers' polynomial schedule


def parse_rules(text: str) -> list[tuple[float, int | None]]:
    """Parse diffusers' ``"1:10,0.1:20,0.005"`` into (multiplier, end) pairs: 1 before step 10, 0.1 before step 20, ...

    Only the last piece has no end (None). Raises ValueError for other text.
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
    """Parse the webui's ``"0.005:100, 1e-3:1000, 1e-5"`` into (rate, last step) pairs.

    The last step is None if it is -1 or missing: the rate then applies to the end. Raises RecipeError for text that is
    not a schedule or whose steps do not increase.
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
            f"learning rate {text!r}: the steps must grow, and only the last piece may have none"
        )
    return pieces


def last_step(rate: float | str) -> int | None:
    """Return the last step of a webui schedule, at which training stops; None if it has no end."""
    return parse_webui_schedule(rate)[-1][1] if isinstance(rate, str) else None
