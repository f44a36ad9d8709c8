"""Runs the training loop of the VAE and CLIP stages, with averaged weights, checkpoints and a log of the loss.

The U-Net is trained by dreamfleet's own loop.
"""

from __future__ import annotations

import copy
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from subjects import CACHE

SAVE_SECONDS = 60.0


def pick_device() -> torch.device:
    """Return the GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def scale_rate(step: int, steps: int, warm_up: int = 100, floor: float = 0.02) -> float:
    """Return the factor of the learning rate: a linear warm-up, then cosine decay to `floor`."""
    if step < warm_up:
        return (step + 1) / warm_up
    done = (step - warm_up) / max(1, steps - warm_up)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


class Averaged:
    """Exponential moving average of a model's weights; its decay increases with the step up to a limit."""

    def __init__(self, model: torch.nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model: torch.nn.Module, step: int) -> None:
        """Update the average with the current weights."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), 1 - decay)


def save_whole(state: dict, path: Path) -> None:
    """Write a temporary file and rename it, so that an interruption leaves the previous state complete."""
    torch.save(state, path.with_suffix(".part"))
    os.replace(path.with_suffix(".part"), path)


def train_stage(
    name: str,
    model: torch.nn.Module,
    compute: Callable[[torch.nn.Module, int], tuple[torch.Tensor, dict[str, float]]],
    steps: int,
    rate: float,
    decay: float = 0.999,
) -> torch.nn.Module:
    """Train `model` and return a copy with averaged weights; `compute` returns a step's loss and metrics.

    The state is saved every `SAVE_SECONDS`, and the next call resumes from it.
    """
    folder = CACHE / name
    folder.mkdir(parents=True, exist_ok=True)
    average = Averaged(model, decay)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=0.01)
    start = 0
    if (folder / "state.pt").exists():
        state = torch.load(
            folder / "state.pt", map_location=next(model.parameters()).device, weights_only=True
        )
        model.load_state_dict(state["model"])
        average.model.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    model.train()
    since, saved, sums, counted = time.time(), time.time(), {}, 0
    for step in range(start, steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * scale_rate(step, steps)
        torch.manual_seed(step)
        loss, figures = compute(model, step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average.update(model, step)
        for key, value in {"loss": loss.item(), **figures}.items():
            sums[key] = sums.get(key, 0.0) + value
        counted += 1
        if (step + 1) % 50 == 0:
            row = {"step": step + 1, **{key: value / counted for key, value in sums.items()}}
            row["seconds"] = time.time() - since
            with (folder / "metrics.jsonl").open("a", encoding="utf-8") as log:
                log.write(json.dumps(row) + "\n")
            print(name, row, flush=True)
            since, sums, counted = time.time(), {}, 0
        if time.time() - saved > SAVE_SECONDS or step + 1 == steps:
            state = {"model": model.state_dict(), "average": average.model.state_dict(), "step": step + 1}
            save_whole({**state, "optimizer": optimizer.state_dict()}, folder / "state.pt")
            saved = time.time()
    return average.model.eval()


def load_average(name: str, model: torch.nn.Module) -> torch.nn.Module:
    """Return `model` with the averaged weights of a stage's latest saved state."""
    state = torch.load(CACHE / name / "state.pt", map_location="cpu", weights_only=True)
    model.load_state_dict(state["average"])
    return model.eval()
