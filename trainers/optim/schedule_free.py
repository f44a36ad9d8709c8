"""Optimizers without a schedule, which train at a point between a fast sequence of weights and its average.

Gradients are taken at the weights ``y``, the state holds the fast sequence ``z``, and their average ``x`` is evaluated
and exported: y = (1 - beta1) z + beta1 x. The packages exchange x and y in place, which changes their last bits; here
the weights stay y, and x is computed where it is needed. Source: Defazio et al. 2024 (arXiv 2405.15682).
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from prodigyplus import ProdigyPlusScheduleFree
from schedulefree import AdamWScheduleFree
from torch import Tensor

from dreamfleet.trainers.config.builtin_optimizers import ProdigyFreeOptions, ScheduleFreeOptions

log = logging.getLogger(__name__)


def build_adamw(params: list[dict[str, Any]], options: ScheduleFreeOptions) -> AdamWScheduleFree:
    """Return Schedule-Free AdamW for the parameter groups of a run, in its training mode."""
    optimizer = AdamWScheduleFree(params, lr=0.0, **options.model_dump())
    optimizer.train()
    return optimizer


def build_prodigy(params: list[dict[str, Any]], options: ProdigyFreeOptions) -> ProdigyFree:
    """Return Schedule-Free Prodigy for the parameter groups of a run, in its training mode."""
    # The engine rounds bfloat16 weights itself, by random numbers that are the same on every worker.
    settings = {**options.model_dump(), "stochastic_rounding": False}
    return ProdigyFree(params, **settings)


def effective_rate(group: dict[str, Any]) -> float:
    """Return the rate of a parameter group of Schedule-Free AdamW after its own warm-up."""
    return float(group["scheduled_lr"])


def effective_prodigy_rate(group: dict[str, Any]) -> float:
    """Return d x lr, the rate of a parameter group of Schedule-Free Prodigy after a step."""
    shared = group["shared_d"] if group["split_groups"] and group["split_groups_mean"] else None
    return float(group["d"] if shared is None else shared) * float(group["lr"])


@torch.no_grad()
def averaged(optimizer: torch.optim.Optimizer) -> dict[Tensor, Tensor]:
    """Return the average x of every parameter as a new float32 tensor, by parameter."""
    found: dict[Tensor, Tensor] = {}
    for group in optimizer.param_groups:
        weight = 1 - 1 / group["betas"][0]
        for param in group["params"]:
            trained, fast = param.detach().float(), optimizer.state.get(param, {}).get("z")
            # before its first step a weight is its own average
            found[param] = trained.clone() if fast is None else trained.lerp(fast.float(), weight)
    return found


class ProdigyFree(ProdigyPlusScheduleFree):
    """ProdigyPlusScheduleFree, which writes to the log instead of stdout."""

    def log(self, message: str) -> None:
        """Write a message of the package to the log."""
        log.info("prodigy_schedulefree: %s", message)

    def try_hook_kohya_fbp(self) -> None:
        """Leave kohya's modules alone, which the package patches where they are loaded."""
        self.kohya_original_patch_adafactor_fused = None  # there is nothing to undo
