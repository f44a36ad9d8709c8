"""Reads the webui's hypernetwork files, including its oldest form and NovelAI's, and writes the current form."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from dreamfleet.datasets.errors import FormatError, UserError
from dreamfleet.trainers.config.hypernetwork_structure import Structure, WeightInit, derived_dropout
from dreamfleet.trainers.models.formats.pickle_writer import (
    METADATA_KEY,
    is_real,
    load_pickle,
    require_backed,
    save_pickle,
    text_entries,
)

SUFFIX = ".pt"

Weights = Mapping[str, Tensor]  # state dict of one MLP: linear.0.weight, linear.0.bias, ...
Pair = tuple[Weights, Weights]  # (MLP for keys, MLP for values)

_MOST_WIDTHS = 32
_LARGEST_WIDTH = 2**16
_OLD_NAMES = {f"linear{number}.{part}": f"linear.{number - 1}.{part}"
              for number in (1, 2) for part in ("weight", "bias")}  # fmt: skip


@dataclass(frozen=True)
class HypernetworkFile:
    """The content of a hypernetwork file.

    ``weights``: the two MLPs of each context width, in the file's order. ``step``: number of optimizer steps trained.
    ``sd_checkpoint``: short hash (10 hex digits) of the base model, ``sd_checkpoint_name`` its file stem.
    ``metadata``: text entries stored in the file.
    """

    name: str
    structure: Structure
    weights: Mapping[int, Pair]
    step: int = 0
    sd_checkpoint: str | None = None
    sd_checkpoint_name: str | None = None
    metadata: dict[str, str] = field(default_factory=dict)


def write_hypernetwork(file: HypernetworkFile, path: str | os.PathLike[str]) -> Path:
    """Write the webui's `.pt` in float32. Raises FormatError for another suffix, and for NaN or infinite weights."""
    path = Path(path)
    if path.suffix.lower() != SUFFIX:
        raise FormatError(f"{path}: a hypernetwork is written as a {SUFFIX} file.")
    structure = file.structure
    data: dict[Any, Any] = {}
    for width, pair in sorted(file.weights.items()):
        data[width] = tuple({name: tensor.float() for name, tensor in part.items()} for part in pair)
        for weights in data[width]:
            _require_finite(weights, width, path)
    data |= {
        "step": int(file.step),
        "name": file.name,
        "layer_structure": list(structure.layer_structure),
        "activation_func": structure.activation_func,
        "is_layer_norm": structure.add_layer_norm,
        "weight_initialization": structure.weight_init,
        "sd_checkpoint": file.sd_checkpoint,
        "sd_checkpoint_name": file.sd_checkpoint_name,
        "activate_output": structure.activate_output,
        "use_dropout": any(structure.dropout_structure),
        "dropout_structure": list(structure.dropout_structure),
        "last_layer_dropout": structure.dropout_structure[-2] != 0,
        "optional_info": None,
    }
    if file.metadata:
        data[METADATA_KEY] = json.dumps(file.metadata)
    return save_pickle(data, path)


def read_hypernetwork(path: str | os.PathLike[str]) -> HypernetworkFile:
    """Read a hypernetwork file on the CPU in float32; its name is the file's stem, as in the webui.

    Missing entries of old files get the webui's defaults. The memory used is at most a few times the file's size.
    Raises FormatError if the file is not a hypernetwork.
    """
    path = Path(path)
    data = load_pickle(path)
    widths = _widths_in(data)
    if not widths:
        raise FormatError(
            f"{path}: holds no hypernetwork: there is no layer width (320, 768 ...) with a pair of modules."
        )
    if len(widths) > _MOST_WIDTHS or not all(1 <= width <= _LARGEST_WIDTH for width in widths):
        raise FormatError(
            f"{path}: {len(widths)} layer widths from {min(widths)} to {max(widths)} are not plausible."
        )
    stored = {
        width: [_weights(part, width, path) for part in _pair(data[width], width, path)] for width in widths
    }
    require_backed((t for pair in stored.values() for part in pair for t in part.values()), path)
    try:
        structure = _structure(data)
        # Create the names for each MLP separately: shared strings are pickled once, which would change the bytes.
        shapes = {width: (_shapes(width, structure), _shapes(width, structure)) for width in widths}
    except UserError as error:
        raise FormatError(f"{path}: {error}") from error
    weights = {}
    for width, pair in stored.items():
        for expected, part in zip(shapes[width], pair, strict=True):
            _require_shapes(expected, part, width, path)
            _require_finite(part, width, path)
        keys, values = (
            {name: part[name].float() for name in expected}
            for expected, part in zip(shapes[width], pair, strict=True)
        )
        weights[width] = (keys, values)
    step, hash_, checkpoint = (data.get(key) for key in ("step", "sd_checkpoint", "sd_checkpoint_name"))
    return HypernetworkFile(
        path.stem,
        structure,
        weights,
        step if type(step) is int else 0,
        hash_ if isinstance(hash_, str) else None,
        checkpoint if isinstance(checkpoint, str) else None,
        text_entries(data.get(METADATA_KEY)),
    )


def holds_hypernetwork(path: str | os.PathLike[str]) -> bool:
    """Return whether a file is a hypernetwork, which has context widths as keys. Raises FormatError if damaged."""
    return Path(path).suffix.lower() == SUFFIX and bool(_widths_in(load_pickle(path)))


def _widths_in(data: Any) -> list[int]:
    # As in the webui, only keys whose type is exactly int, which excludes bool.
    return [key for key in data if type(key) is int] if isinstance(data, dict) else []


def _pair(value: Any, width: int, path: Path) -> Any:
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise FormatError(f"{path}: width {width} must hold two modules, one for keys and one for values.")
    return value


def _weights(value: Any, width: int, path: Path) -> dict[str, Tensor]:
    if not isinstance(value, dict):
        raise FormatError(f"{path}: width {width} holds a {type(value).__name__} instead of weights.")
    found = {}
    for name, tensor in value.items():
        if not isinstance(name, str) or not is_real(tensor):
            raise FormatError(f"{path}: width {width} holds {name!r}, which is not a tensor of numbers.")
        found[_OLD_NAMES.get(name, name)] = tensor.detach()
    return found


def _structure(data: Mapping[Any, Any]) -> Structure:
    """Return the MLP structure stored in a file; missing entries get the defaults of the webui's loader."""
    layers, dropout = _numbers(data, "layer_structure"), _numbers(data, "dropout_structure")
    if layers is None:
        layers = (1, 2, 1)
    if dropout is None:
        dropout = (0,) * len(layers)
        if _flag(data, "use_dropout", False):
            dropout = derived_dropout(len(layers), last_layer=_flag(data, "last_layer_dropout", False))
    init: Any = _text(data, "weight_initialization", "Normal")
    return Structure(
        layer_structure=layers,
        activation_func=_text(data, "activation_func", "linear"),
        # Describes only how the weights were initialised, so an unknown value does not matter.
        weight_init=init if init in get_args(WeightInit) else "Normal",
        add_layer_norm=_flag(data, "is_layer_norm", False),
        activate_output=_flag(data, "activate_output", True),
        dropout_structure=dropout[: len(layers)],
    )


def _numbers(data: Mapping[Any, Any], key: str) -> tuple[float, ...] | None:
    value = data.get(key)
    if value is None:
        return None
    if not isinstance(value, list | tuple) or not all(type(item) in (int, float) for item in value):
        raise FormatError(f"{key} must be a list of numbers.")
    return tuple(value)


def _flag(data: Mapping[Any, Any], key: str, default: bool) -> bool:
    value = data.get(key, default)
    if not isinstance(value, int | None):
        raise FormatError(f"{key} must be true or false, not a {type(value).__name__}.")
    return bool(value)


def _text(data: Mapping[Any, Any], key: str, default: str) -> str:
    value = data.get(key)
    if value is not None and not isinstance(value, str):
        raise FormatError(f"{key} must be text, not a {type(value).__name__}.")
    return default if value is None else value


def _shapes(width: int, structure: Structure) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of one MLP's weights. As in the webui, their numbers count all layers."""
    shapes: dict[str, tuple[int, ...]] = {}
    place = 0
    for number, (entering, leaving) in enumerate(pairwise(structure.sizes(width)), start=1):
        shapes[f"linear.{place}.weight"], shapes[f"linear.{place}.bias"] = (leaving, entering), (leaving,)
        place += 1
        if structure.is_activated(number):
            if structure.activation_func == "prelu":  # the only activation with a parameter
                shapes[f"linear.{place}.weight"] = (1,)
            place += 1
        if structure.add_layer_norm:
            shapes[f"linear.{place}.weight"] = shapes[f"linear.{place}.bias"] = (leaving,)
            place += 1
        if structure.dropout_structure[number]:
            place += 1
    return shapes


def _require_shapes(expected: Mapping[str, tuple[int, ...]], found: Weights, width: int, path: Path) -> None:
    wrong = [name for name in expected.keys() | found.keys()
             if name not in expected or name not in found or expected[name] != found[name].shape]  # fmt: skip
    if wrong:
        raise FormatError(
            f"{path}: the weights of width {width} do not fit its layer_structure and options "
            f"({', '.join(sorted(wrong)[:4])})."
        )


def _require_finite(weights: Weights, width: int, path: Path) -> None:
    for name, tensor in weights.items():
        if not torch.isfinite(tensor).all():
            raise FormatError(
                f"{path}: {name} of width {width} holds NaN or infinite numbers; its training failed."
            )
