"""Cases on the simulated GPU beside the rows: commands, limits, errors, searches and the benchmark."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

#: By name: what to run in a folder with a tiny model and pictures; it raises what is wrong.
SPECIAL: dict[str, Callable[[Path], dict[str, Any] | None]] = {}
