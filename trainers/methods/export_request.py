"""What an export is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch


@dataclass(frozen=True)
class Export:
    """What to write: files called after ``name`` in ``folder``, in ``formats`` (none: the method's usual ones).

    ``step``: optimizer steps trained; ``metadata``: text that travels with the files; ``precision``: of whole models.
    """

    folder: Path
    name: str
    formats: Sequence[str] = ()
    step: int = 0
    metadata: dict[str, str] = field(default_factory=dict)
    precision: str = "fp32"

    @property
    def dtype(self) -> torch.dtype:
        """The precision as torch calls it."""
        return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[self.precision]
