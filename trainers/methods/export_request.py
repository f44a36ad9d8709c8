"""The request for an export: names, formats, metadata and precision of the files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch


@dataclass(frozen=True)
class Export:
    """Files to write: named ``name`` in ``folder``, in ``formats`` (empty: the method's default formats).

    ``step``: optimizer steps trained; ``metadata``: text stored in the files; ``precision``: of the weights
    of models, LoRAs and classifiers (embeddings and hypernetworks are always in full precision).
    """

    folder: Path
    name: str
    formats: Sequence[str] = ()
    step: int = 0
    metadata: dict[str, str] = field(default_factory=dict)
    precision: str = "fp32"

    @property
    def dtype(self) -> torch.dtype:
        """The torch dtype of ``precision``."""
        return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[self.precision]
