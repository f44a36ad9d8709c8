"""Counts the tensors of a run for the memory estimate, and traces a real step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny
import torch
from torch import Tensor

from dreamfleet.trainers.memory.inputs import Counts, Pass
from dreamfleet.trainers.memory.profile import count_run, method_shape
from dreamfleet.trainers.memory.trace import Autocast, trace_step
from dreamfleet.trainers.recipe import build_recipe
from dreamfleet.trainers.run.build import Parts


def count(folder: Path, **changes: Any) -> Counts:
    recipe = build_recipe(tiny.make_recipe(folder, **changes))
    return count_run(recipe, method_shape(recipe), 6)


def trace_real_step(parts: Parts) -> Pass:
    method = parts.method
    every = torch.nn.ModuleList([*parts.model.modules().values(), method])
    raw = parts.feed.batch(0)

    def compute_loss(autocast: Autocast) -> Tensor:
        # The memory plan also creates its batch inside the pass.
        batch = {k: v.clone() if isinstance(v, Tensor) else v for k, v in parts.prepare(raw).items()}
        with autocast():
            return method(batch).total

    known = [*every.parameters(), *every.buffers(), *(v for v in raw.values() if isinstance(v, Tensor))]
    params = [param for group in method.groups() for param in group.params.values()]
    return trace_step(compute_loss, params=params, known=known, dtype=torch.float32)
