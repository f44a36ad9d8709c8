"""Reads and writes ConvNeXt classifiers in the format of the authors' code, and reads those of timm.

Weights in memory have transformers' parameter names. Sources of the other names: github.com/facebookresearch/ConvNeXt,
`models/convnext.py`; timm, `timm/models/convnext.py`. DreamArtist's discriminator is a file in the authors' format
(`convnext_discriminator.py` there).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dreamfleet.datasets.errors import FormatError
from dreamfleet.trainers.models.formats.pickle_writer import is_dense, load_pickle, save_pickle
from dreamfleet.trainers.models.formats.tensor_files import read_safetensors, to_dtype

SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".safetensors")

_STAGE = r"convnext.encoder.stages.\1"
_BLOCK = _STAGE + r".layers.\2"
# (the authors' name, transformers' name); `(\d+)` is the number of a stage or of a block in it.
_AUTHORS = (
    (r"downsample_layers\.0\.0", "convnext.embeddings.patch_embeddings"),
    (r"downsample_layers\.0\.1", "convnext.embeddings.layernorm"),
    (r"downsample_layers\.([1-9]\d*)\.([01])", _STAGE + r".downsampling_layer.\2"),
    (r"stages\.(\d+)\.(\d+)\.gamma", _BLOCK + ".layer_scale_parameter"),
    (r"stages\.(\d+)\.(\d+)\.norm", _BLOCK + ".layernorm"),
    (r"stages\.(\d+)\.(\d+)\.(dwconv|pwconv1|pwconv2)", _BLOCK + r".\3"),
    (r"norm", "convnext.layernorm"),
    (r"head", "classifier"),
)
_TIMM = (
    (r"stem\.0", "convnext.embeddings.patch_embeddings"),
    (r"stem\.1", "convnext.embeddings.layernorm"),
    (r"stages\.(\d+)\.downsample\.([01])", _STAGE + r".downsampling_layer.\2"),
    (r"stages\.(\d+)\.blocks\.(\d+)\.gamma", _BLOCK + ".layer_scale_parameter"),
    (r"stages\.(\d+)\.blocks\.(\d+)\.norm", _BLOCK + ".layernorm"),
    (r"stages\.(\d+)\.blocks\.(\d+)\.conv_dw", _BLOCK + ".dwconv"),
    (r"stages\.(\d+)\.blocks\.(\d+)\.mlp\.fc([12])", _BLOCK + r".pwconv\3"),
    (r"head\.norm", "convnext.layernorm"),
    (r"head\.fc", "classifier"),
)
_OURS = (  # (transformers' name, the authors' name)
    (r"convnext\.embeddings\.patch_embeddings", "downsample_layers.0.0"),
    (r"convnext\.embeddings\.layernorm", "downsample_layers.0.1"),
    (r"convnext\.encoder\.stages\.(\d+)\.downsampling_layer\.([01])", r"downsample_layers.\1.\2"),
    (r"convnext\.encoder\.stages\.(\d+)\.layers\.(\d+)\.layer_scale_parameter", r"stages.\1.\2.gamma"),
    (r"convnext\.encoder\.stages\.(\d+)\.layers\.(\d+)\.layernorm", r"stages.\1.\2.norm"),
    (r"convnext\.encoder\.stages\.(\d+)\.layers\.(\d+)\.(dwconv|pwconv1|pwconv2)", r"stages.\1.\2.\3"),
    (r"convnext\.layernorm", "norm"),
    (r"classifier", "head"),
)


class ConvNextFile(NamedTuple):
    """A classifier from a file: arguments of transformers' ConvNextConfig, float32 weights by transformers' names."""

    config: dict[str, Any]
    state: dict[str, Tensor]


def read_convnext(path: str | os.PathLike[str]) -> ConvNextFile:
    """Read a classifier's weights: a state dict with any of the known names, or a checkpoint with one under ``model``.

    Raises FormatError for another kind of file, and for weights that are not a complete ConvNeXt.
    """
    path = Path(path)
    found = read_safetensors(path)[0] if path.suffix.lower() == ".safetensors" else load_pickle(path)
    state: dict[str, Tensor] = {}
    weights = _weights_in(found, path)
    # Expanded views and shared storages would be copied below, and could then fill the memory.
    if sum(tensor.numel() * tensor.element_size() for tensor in weights.values()) > path.stat().st_size:
        raise FormatError(f"{path}: rejected, because its weights are larger than the file.")
    for name, tensor in weights.items():
        ours = _translate(name.removeprefix("module."), path)
        if ours in state:
            raise FormatError(f"{path}: holds {ours} twice.")
        state[ours] = tensor.detach().float().contiguous()
    config = _read_shape(state, path)
    _require_whole(config, state, path)
    return ConvNextFile(config, state)


def write_convnext(
    state: Mapping[str, Tensor], path: str | os.PathLike[str], *, dtype: torch.dtype | None = None
) -> Path:
    """Write weights with transformers' names as a `.pth` with the authors' names, in ``dtype`` (None: unchanged)."""
    return save_pickle(
        {_rename(name, _OURS): to_dtype(tensor, dtype) for name, tensor in state.items()}, path
    )


def _weights_in(found: Any, path: Path) -> dict[str, Tensor]:
    for key in ("model", "state_dict"):
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    plain = isinstance(found, Mapping) and all(
        isinstance(name, str) and is_dense(tensor) for name, tensor in found.items()
    )
    if not found or not plain:
        raise FormatError(f"{path}: holds no classifier; expected a dict of weights, bare or under 'model'.")
    if wrong := [name for name, tensor in found.items() if not tensor.is_floating_point()]:
        raise FormatError(f"{path}: {wrong[0]} is not a floating-point tensor.")
    return dict(found)


def _translate(name: str, path: Path) -> str:
    if name.startswith(("convnext.", "classifier.")):
        return name
    # Check timm's names first: its head.norm would also match the authors' head.
    if ours := _rename(name, _TIMM) or _rename(name, _AUTHORS):
        return ours
    raise FormatError(
        f"{path}: {name!r} is no weight of a ConvNeXt (version 1) classifier; give one trained by `dreamfleet train` "
        "with method discriminator, DreamArtist's, or timm's convnext_tiny"
    )


def _rename(name: str, table: tuple[tuple[str, str], ...]) -> str:
    """Return the name that a table maps ``name`` to, with its ending ``weight`` or ``bias``; "" if there is none."""
    for pattern, other in table:
        if match := re.fullmatch(rf"({pattern})((?:\.(?:weight|bias))?)", name):
            return re.sub(pattern, other, match[1], count=1) + match.groups()[-1]
    return ""


def _read_shape(state: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
    """Return depths and widths, derived from the weights; the blocks of a stage end at a gap in their numbers."""

    def shape(name: str, num_dims: int) -> torch.Size:
        if name not in state or state[name].dim() != num_dims or not state[name].numel():
            raise FormatError(
                f"{path}: not a complete ConvNeXt classifier: {name} is missing or has another shape."
            )
        return state[name].shape

    depths: list[int] = []
    while (stage := f"convnext.encoder.stages.{len(depths)}.layers") + ".0.dwconv.weight" in state:
        depth = 1
        while f"{stage}.{depth}.dwconv.weight" in state:
            depth += 1
        depths.append(depth)
    if not depths:
        raise FormatError(f"{path}: not a complete ConvNeXt classifier: it has no stages.")
    widths = [shape(f"convnext.encoder.stages.{n}.layers.0.dwconv.weight", 4)[0] for n in range(len(depths))]
    scale = "convnext.encoder.stages.0.layers.0.layer_scale_parameter"
    return {
        "depths": depths,
        "hidden_sizes": widths,
        "num_stages": len(depths),
        "patch_size": shape("convnext.embeddings.patch_embeddings.weight", 4)[2],
        "num_labels": shape("classifier.weight", 2)[0],
        "layer_scale_init_value": 1e-6 if scale in state else 0.0,
        "layer_norm_eps": 1e-6,  # the authors' and timm's value; transformers' default is 1e-12
    }


def _require_whole(config: dict[str, Any], state: Mapping[str, Tensor], path: Path) -> None:
    from transformers import ConvNextConfig, ConvNextForImageClassification

    with torch.device("meta"):
        wanted = {
            k: v.shape
            for k, v in ConvNextForImageClassification(ConvNextConfig(**config)).state_dict().items()
        }
    if odd := sorted(wanted.keys() ^ state.keys()):
        raise FormatError(
            f"{path}: not a complete ConvNeXt classifier: {odd[0]} is "
            f"{'missing' if odd[0] in wanted else 'unexpected'}."
        )
    for name, shape in wanted.items():
        if state[name].shape != shape:
            raise FormatError(f"{path}: {name} has the shape {list(state[name].shape)}, not {list(shape)}.")
        if not torch.isfinite(state[name]).all():
            raise FormatError(f"{path}: {name} holds NaN or infinite numbers.")
