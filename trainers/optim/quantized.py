"""Optimizers of bitsandbytes: states of 8 bits, and states that move to host memory while the GPU is full."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from bitsandbytes import optim

from dreamfleet.trainers.config.optimizers import OptimizerOptions


class Paging:
    """Makes loaded states pageable again, which bitsandbytes copies to ordinary memory of the GPU."""

    def load_state_dict(self, state_dict: dict[str, Any], move_to_device: bool = True) -> None:
        """Load a state that :meth:`state_dict` returned."""
        super().load_state_dict(state_dict, move_to_device)  # type: ignore[misc]
        this: Any = self
        for param, states in this.state.items():
            for name in states.keys() & {"state1", "state2"}:
                states[name] = this.get_state_buffer(param, dtype=states[name].dtype).copy_(states[name])


def _build(kind: str, params: list[dict[str, Any]], options: OptimizerOptions) -> torch.optim.Optimizer:
    plain = getattr(optim, kind)
    made: Any = type(kind, (Paging, plain), {}) if kind.startswith("Paged") else plain
    return made(params, lr=0.0, **options.model_dump())


build_adamw8bit = partial(_build, "AdamW8bit")
build_paged_adamw = partial(_build, "PagedAdamW")
build_paged_adamw8bit = partial(_build, "PagedAdamW8bit")
build_lion8bit = partial(_build, "Lion8bit")
build_paged_lion = partial(_build, "PagedLion")
build_paged_lion8bit = partial(_build, "PagedLion8bit")
