"""Guidance while training as text: a fixed scale, ``3.0``, or one that follows the timestep, ``1.0-3.0:cos``."""

from __future__ import annotations

import re
from typing import Literal, NamedTuple, cast

from dreamfleet.datasets.errors import RecipeError

Curve = Literal["ln", "cos", "cos2"]

_NUMBER = r"(\d{1,9}(?:\.\d{0,9})?|\.\d{1,9})"
_TEXT = re.compile(rf"\s*{_NUMBER}\s*(?:-\s*{_NUMBER}\s*(?::\s*(ln|cos|cos2)\s*)?)?", re.ASCII)


class Guidance(NamedTuple):
    """How strongly a prediction is guided: ``low`` at timestep 0, ``high`` at the last one."""

    low: float
    high: float
    curve: Curve = "ln"


def parse_guidance(value: float | str) -> Guidance:
    """Read a fixed scale, ``3.0``, or one that goes with the timestep: ``1.5-3.0``, ``1.0-3.0:cos``.

    Raises RecipeError for anything else, and for a scale of 0 throughout, which trains the negative alone.
    """
    match = _TEXT.fullmatch(str(value))
    if match is None:
        raise RecipeError(
            f"{value!r} is no guidance: write a number such as 3.0, or low-high with an optional curve "
            "(ln, cos or cos2), such as 1.5-3.0:cos"
        )
    low, high, curve = match.groups()
    guidance = Guidance(float(low), float(high or low), cast(Curve, curve or "ln"))
    if not (guidance.low or guidance.high):
        raise RecipeError(f"{value!r}: with a guidance of 0 the positive vectors would never learn; try 3.0")
    return guidance
