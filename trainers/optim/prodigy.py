"""Prodigy of the package prodigyopt, with one estimate of the step size or one for each part of the model.

Source: Mishchenko & Defazio 2023 (arXiv 2306.06101).
"""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from typing import Any

import prodigyopt

from dreamfleet.trainers.config.builtin_optimizers import ProdigyOptions


def build(params: list[dict[str, Any]], options: ProdigyOptions) -> Prodigy:
    """Return Prodigy for the parameter groups of a run."""
    settings = options.model_dump(exclude={"split_groups"})
    if settings["growth_rate"] is None:
        settings["growth_rate"] = float("inf")
    with redirect_stdout(io.StringIO()):  # it prints that the weight decay is decoupled
        return Prodigy(params, splits=bool(options.split_groups), **settings)


def effective_rate(group: dict[str, Any]) -> float:
    """Return d x lr, the rate of a parameter group after a step."""
    return float(group["d"]) * float(group["lr"])


class Prodigy(prodigyopt.Prodigy):
    """Prodigy; ``splits``: with an estimate of d for each parameter group, whose learning rates may then differ."""

    def __init__(self, params: list[dict[str, Any]], *, splits: bool, **options: Any):
        super().__init__(params, **options)
        self.splits = splits

    def step(self, closure: Any = None) -> None:
        """Step all parameters that have gradients."""
        if not self.splits:
            super().step(closure)
            return
        groups: list[dict[str, Any]] = self.param_groups  # type: ignore[has-type]  # of an untyped base class
        try:
            for group in groups:  # a group holds its own estimate
                self.param_groups = [group]
                super().step(closure)
        finally:
            self.param_groups = groups
