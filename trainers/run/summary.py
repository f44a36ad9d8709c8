"""The summary of a run, which every rank returns and ``summary.json`` contains."""

from __future__ import annotations

import platform
from dataclasses import dataclass, field
from typing import Any

import torch

from dreamfleet.trainers.config.engines import engine_spec
from dreamfleet.trainers.loop import Outcome
from dreamfleet.trainers.run.build import Parts
from dreamfleet.trainers.run.checkpointing import Checkpointing
from dreamfleet.trainers.run.versions import versions


@dataclass
class Summary:
    """Results of a run; written as ``summary.json``."""

    run: str
    method: str
    exit_reason: str
    steps: int
    start_step: int
    images_seen: int
    workers: int
    global_batch: int
    device: str
    wall_seconds: float
    start_up_seconds: float
    train_seconds: float
    figures: dict[str, Any]
    best_checkpoint: str | None
    exports: list[str] = field(default_factory=list)
    bad_files: list[dict[str, str]] = field(default_factory=list)
    dataset_hash: str = ""
    base_model: str = ""
    base_model_hash: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    engine: str = ""
    #: seconds that rank 0 has waited for images, by cause: CAUSES in datasets/serve/stream.py, and `encode`
    data_waits: dict[str, float] = field(default_factory=dict)
    timeline: dict[str, Any] = field(default_factory=dict)  # Timeline.summary; empty for runs without events


def summarise(parts: Parts, outcome: Outcome, checkpointing: Checkpointing, engine_reason: str) -> Summary:
    """Return the summary of a run after its last step; every rank calls this."""
    recipe, distributed, base = parts.recipe, parts.distributed, parts.method.base
    seconds = checkpointing.clock.lap()
    return Summary(
        run=recipe.run_name,
        method=recipe.method.name,
        exit_reason=outcome.exit_reason,
        steps=outcome.step,
        start_step=checkpointing.start_step,
        images_seen=outcome.step * parts.global_batch,
        workers=distributed.world,
        global_batch=parts.global_batch,
        device=torch.cuda.get_device_name(distributed.device)
        if distributed.device.type == "cuda"
        else platform.processor() or "cpu",
        wall_seconds=0.0,
        start_up_seconds=seconds["start_up"],
        train_seconds=seconds["train"],
        figures=outcome.figures,
        best_checkpoint=checkpointing.best,
        bad_files=[
            bad._asdict()
            for bad in distributed.all_gather_unique([*parts.sets.instances.bad, *parts.feed.bad])
        ],
        data_waits=parts.feed.waits,
        dataset_hash=parts.sets.instances.content_hash,
        base_model=base.name,
        base_model_hash=base.content_hash,
        versions=versions(),
        engine=f"{engine_spec(recipe.engine).summary(recipe.engine)} ({engine_reason})",
    )
