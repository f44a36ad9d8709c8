"""Limits and names of options that decoding images needs, without pydantic: processes that decode start sooner."""

from __future__ import annotations

# Pillow itself rejects larger images (twice its warning limit), so larger values would have no effect.
MAX_PIXELS = 178_956_970
# The names of the filters that resize images; datasets/images/resampling.py defines them.
IMAGE_FILTERS = ("scaled_lanczos", "lanczos", "bicubic", "bilinear", "area")
