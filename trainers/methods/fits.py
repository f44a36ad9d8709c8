"""Whether a saved state is one of this recipe's."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dreamfleet.datasets.errors import RecipeError


def check_fits(method: str, shapes: Mapping[str, torch.Size], state: Mapping[str, Tensor]) -> None:
    """Check that a saved state has these names and shapes. Raises RecipeError naming the first that differs."""
    if wrong := sorted(shapes.keys() ^ state.keys()):
        raise RecipeError(
            f"{method}: the saved state has other parameters than this recipe ({', '.join(wrong[:4])})"
        )
    for name, shape in shapes.items():
        if shape != state[name].shape:
            raise RecipeError(
                f"{method}: {name} was saved with shape {list(state[name].shape)}, "
                f"but this recipe makes {list(shape)}"
            )
