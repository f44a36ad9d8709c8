"""Parses the guidance scale for training: fixed, ``3.0``, or dependent on the timestep, ``1.0-3.0:cos``."""

from __future__ import annotations

import re
from typing import Literal, NamedTuple, cast

from dreamfleet.datasets.errors import RecipeError

Curve = Literal["ln", "cos", "cos2"]

_NUMBER = r"(\d{1,9}(?:\.\d{0,9})?|\.\d{1,9})"
_TEXT = re.compile(rf"\s*{_NUMBER}\s*(?:-\s*{_NUMBER}\s*(?::\s*(ln|cos|cos2)\s*)?)?", re.ASCII)


class Guidance(NamedTuple):
    """A guidance scale: ``low`` at timestep 0, ``high`` at the last timestep, interpolated by ``curve``."""

    low: float
    high: float
    curve: Curve = "ln"


def parse_guidance(value: float | str) -> Guidance:
    """Parse a fixed scale, ``3.0``, or one that depends on the timestep: ``1.5-3.0``, ``1.0-3.0:cos``.

    Raises RecipeError for other text, and for a scale that is always 0, which would train only the negative word.
    """
    match = _TEXT.fullmatch(str(value))
    if match is None:
        raise RecipeError(
            f"{value!r} is no guidance scale: write a number such as 3.0, or low-high with an optional curve "
            "(ln, cos or cos2), such as 1.5-3.0:cos"
        )
    low, high, curve = match.groups()
    guidance = Guidance(float(low), float(high or low), cast(Curve, curve or "ln"))
    if not (guidance.low or guidance.high):
        raise RecipeError(
            f"{value!r}: with a guidance scale of 0 the positive vectors are not trained; try 3.0"
        )
    return guidance
