"""Tells whether this process is connected to Ray, without importing it."""

from __future__ import annotations

import sys


def is_connected() -> bool:
    """Return whether this process is connected to Ray."""
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized()
