"""The summary of a run, which every rank returns and ``summary.json`` contains."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


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
