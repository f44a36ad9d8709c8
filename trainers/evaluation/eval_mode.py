"""A context that sets a method and its model to eval mode, for measurements between training steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from dreamfleet.trainers.methods.base import Method


@contextmanager
def eval_mode(method: Method) -> Iterator[None]:
    """Set a method and its model to eval mode (no dropout) within this context; restore each module's mode after it."""
    parts = [method, *method.model.modules().values()]
    # Per module, since dropout and gradient checkpointing may be enabled in only some layers of a part.
    modes = {module: module.training for part in parts for module in part.modules()}
    for part in parts:
        part.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
