"""A small method, engine and batch for tests of engines and optimizers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny

from dreamfleet.trainers.distributed.context import DistributedContext
from dreamfleet.trainers.recipe import build_recipe
from dreamfleet.trainers.run.build import Parts, assemble


def make_parts(folder: Path, **changes: Any) -> Parts:
    return assemble(build_recipe(tiny.make_recipe(folder, **changes)), DistributedContext())


def take_step(parts: Parts, step: int = 0, rate: float = 1e-3) -> float:
    losses = []
    for micro in parts.engine.units:
        batch = parts.prepare(parts.engine.to_device(parts.feed.batch(step, micro)))
        losses.append(float(parts.engine.backward(batch, last=micro == parts.engine.units[-1]).total))
    parts.engine.step(dict.fromkeys(parts.rates, rate), step + 1)
    return sum(losses) / len(losses)
