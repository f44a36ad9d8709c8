"""Reads safetensors files, and writes them one tensor at a time, so that no second copy of a large model is needed.

Format: github.com/huggingface/safetensors, README, "Format".
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dreamfleet.datasets.errors import FormatError
from dreamfleet.datasets.storage.disk import as_storage_error
from dreamfleet.trainers.models.formats.pickle_writer import replacing

_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
}


def write_safetensors(
    state: Mapping[str, Tensor],
    path: Path,
    *,
    dtype: torch.dtype | None = None,
    header: Mapping[str, str] | None = None,
) -> None:
    """Write `state`, with the text entries `header`; floating-point tensors are cast to `dtype` (None: unchanged).

    Raises FormatError for an unsupported dtype, StorageError if writing fails.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", **(header or {})}}
    end = 0
    for key, tensor in state.items():
        kind = dtype if dtype and tensor.is_floating_point() else tensor.dtype
        if kind not in _DTYPE_NAMES:
            raise FormatError(f"{path}: {key} has dtype {kind}, which is not supported.")
        start, end = end, end + tensor.numel() * kind.itemsize
        entries[key] = {
            "dtype": _DTYPE_NAMES[kind],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in state.values():
            content: Any = to_dtype(tensor, dtype).reshape(-1).view(torch.uint8).numpy()
            file.write(memoryview(content))


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return all tensors, on the CPU, and the header's text entries.

    Raises FormatError for a damaged file, StorageError if it cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            header = dict(file.metadata() or {})
            return {key: file.get_tensor(key) for key in file.keys()}, header  # noqa: SIM118 - not a dict
    except OSError as error:
        raise as_storage_error("read", str(path), error) from error
    except SafetensorError as error:
        raise FormatError(
            f"{path}: not a complete safetensors file ({error}). Copy or export it again."
        ) from error


def safetensors_names(path: Path) -> list[str]:
    """Return the names of a file's tensors from its header. Raises FormatError for a damaged file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return list(file.keys())
    except (OSError, SafetensorError) as error:
        raise FormatError(f"{path}: not a complete safetensors file ({error}).") from error


def to_dtype(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Return a contiguous tensor on the CPU, cast to `dtype` if it is floating-point (None: unchanged)."""
    return tensor.detach().to(dtype=dtype if tensor.is_floating_point() else None, device="cpu").contiguous()
