"""Reads and writes aesthetic vectors of the webui's aesthetic-gradients extension: a `.pt` with one bare tensor.

Published files differ in shape (`[1, P]` or `[P]`), precision and device; all of these forms are read.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from dreamfleet.datasets.errors import FormatError
from dreamfleet.trainers.models.formats.pickle_writer import is_real, load_pickle, save_pickle

SUFFIX = ".pt"

_LARGEST_WIDTH = 2**14  # CLIP's widest space has 1280


def write_aesthetic(vector: Tensor, path: str | os.PathLike[str]) -> Path:
    """Write a vector `[1, P]` or `[P]` in the extension's form: `[1, P]` in float32, not normalised.

    The format has no metadata. Raises FormatError for another suffix, and for a zero, NaN or infinite vector.
    """
    path = Path(path)
    if path.suffix.lower() != SUFFIX:
        raise FormatError(f"{path}: an aesthetic vector is written as a {SUFFIX} file.")
    return save_pickle(_checked(vector.detach(), path), path)


def read_aesthetic(path: str | os.PathLike[str]) -> Tensor:
    """Read a vector as `[1, P]`, in float32 on the CPU, not normalised. Raises FormatError if it is not one."""
    path = Path(path)
    found = load_pickle(path)
    if not is_real(found):
        raise FormatError(
            f"{path}: holds no aesthetic vector, which is one bare tensor of real numbers; for an embedding use "
            "--embedding, for a hypernetwork --hypernetwork."
        )
    return _checked(found.detach(), path)


def holds_aesthetic(path: str | os.PathLike[str]) -> bool:
    """Return whether a file is a `.pt` with one bare tensor. Raises FormatError for a damaged `.pt`."""
    return Path(path).suffix.lower() == SUFFIX and isinstance(load_pickle(path), Tensor)


def _checked(vector: Tensor, path: Path) -> Tensor:
    shape = list(vector.shape)
    if len(shape) not in (1, 2) or shape[:-1] not in ([], [1]) or not 1 <= shape[-1] <= _LARGEST_WIDTH:
        raise FormatError(
            f"{path}: an aesthetic vector has the shape [1, P] or [P], such as [1, 768], not {shape}."
        )
    row = vector.float().reshape(1, -1)
    if not torch.isfinite(row).all() or not row.any():
        raise FormatError(
            f"{path}: the vector is zero, or holds NaN or infinite numbers, so it has no direction."
        )
    return row
