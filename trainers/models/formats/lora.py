"""Reads and writes LoRA files in diffusers' and kohya's layouts, including older forms.

A LoRA changes the weight of a layer by ``alpha / rank * up @ down``. Kohya's layout stores alpha beside the matrices.
In diffusers' layout the scale is multiplied into ``up``, which all versions of all readers handle correctly.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dreamfleet.datasets.errors import FormatError
from dreamfleet.trainers.models.formats.embedding import Embedding, embedding_in, embedding_tensors
from dreamfleet.trainers.models.formats.ldm_names import Family
from dreamfleet.trainers.models.formats.lora_header import PeftAlphas, kohya_entries, own_entries
from dreamfleet.trainers.models.formats.lora_names import STANDARD_LAYERS, kohya_name, layer_of_key
from dreamfleet.trainers.models.formats.lycoris import FACTOR_KEYS, Factors, factor_entries, read_factors
from dreamfleet.trainers.models.formats.pickle_writer import is_dense, is_real, load_pickle, require_backed
from dreamfleet.trainers.models.formats.tensor_files import (
    read_safetensors,
    safetensors_names,
    write_safetensors,
)

logger = logging.getLogger(__name__)

SUFFIXES = (".safetensors", ".pt", ".ckpt", ".bin")

_LORA_KEYS = {"down", "up"} | FACTOR_KEYS
_BUNDLED = "bundle_emb."  # the webui's prefix of the tensors of embeddings in a LoRA

_WIDTHS: dict[int, Family] = {1024: "sd2", 2048: "sdxl"}  # by context width; that of SD 1.x is 768


class Matrices(NamedTuple):
    """The LoRA of one layer: ``down`` ``[r, in]`` or ``[r, in, kh, kw]``, ``up`` ``[out, r]`` or ``[out, r, 1, 1]``.

    ``magnitude`` ``[out]``: the lengths of the weights of a DoRA (Liu et al. 2024, arXiv 2402.09353).
    """

    down: Tensor
    up: Tensor
    alpha: float
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        """The rank r."""
        return self.down.shape[0]


Layers = Mapping[str, Matrices]  # by part and layer name: unet.mid_block.attentions.0.proj_in


@dataclass(frozen=True)
class LoraFile:
    """The content of a LoRA file: layers, text entries, and bundled embeddings; ``factors``: those of LoKr and LoHa."""

    name: str
    layers: dict[str, Matrices]
    metadata: dict[str, str] = field(default_factory=dict)
    is_kohyas: bool = False  # whether it was read from kohya's layout
    embeddings: tuple[Embedding, ...] = ()
    factors: dict[str, Factors] = field(default_factory=dict)

    @property
    def family(self) -> Family:
        """The family of its base model, derived from the context width and the parts that it changes."""
        widths = {layer: matrices.down.shape[1] for layer, matrices in self.layers.items()}
        widths |= {layer: factors.shape()[1] for layer, factors in self.factors.items()}
        for layer, width in widths.items():
            if layer.startswith("text_encoder_2.") or ".transformer_blocks.1." in layer:
                return "sdxl"
            if layer.endswith(("attn2.to_k", "attn2.to_v")):
                return _WIDTHS.get(width, "sd1")
        return "sd1"


def write_diffusers_lora(file: LoraFile, path: Path, *, dtype: torch.dtype = torch.float32) -> Path:
    """Write the layout that diffusers' `load_lora_weights` reads, with alpha multiplied into ``up``.

    This layout cannot contain embeddings; a warning names those that are left out. Raises FormatError for a LoKr or
    LoHa, which diffusers does not load for Stable Diffusion.
    """
    if file.factors:
        raise FormatError(
            f"{path}: diffusers' layout has no {next(iter(file.factors.values())).kind}; write kohya's layout, or "
            "merge it into the model (train.export_formats: [diffusers])."
        )
    if file.embeddings:
        names = ", ".join(embedding.name for embedding in file.embeddings)
        logger.warning(
            "%s: the embeddings in %s are not written, as diffusers reads none from a LoRA: %s",
            path,
            file.name,
            names,
        )
    state = {}
    for layer, (down, up, alpha, magnitude) in file.layers.items():
        _require_finite(layer, (down, up), path)
        if magnitude is not None:
            # peft's shape is [out], of convolutions [1, out, 1, 1]. Without `.weight`, diffusers 0.42 leaves out
            # the lengths of text encoders.
            ones = [1] * (down.ndim - 2)
            shaped = magnitude.reshape(1, -1, *ones) if ones else magnitude
            state[f"{layer}.lora_magnitude_vector.weight"] = shaped.float().to(dtype)
        state[f"{layer}.lora_A.weight"] = down.float().to(dtype)
        state[f"{layer}.lora_B.weight"] = (up.float() * (alpha / down.shape[0])).to(dtype)
    write_safetensors(state, path, header=own_entries(file.metadata))
    return path


def write_kohya_lora(
    file: LoraFile,
    path: Path,
    *,
    dtype: torch.dtype = torch.float32,
    family: Family | None = None,
    unet_config: Mapping[str, Any] | None = None,
) -> Path:
    """Write the layout of the webui, ComfyUI and kohya's scripts, with kohya's ``ss_`` entries in the header.

    ``family``: derived from the layers if None. ``unet_config``: needed if SDXL's U-Net does not have its usual blocks.
    Raises FormatError for a layer that has no name in kohya's layout.
    """
    family = family or file.family
    state: dict[str, Tensor] = {}
    for layer, (down, up, alpha, magnitude) in file.layers.items():
        _require_finite(layer, (down, up), path)
        name = kohya_name(layer, sdxl=family == "sdxl", unet_config=unet_config)
        state[f"{name}.alpha"] = torch.tensor(float(alpha))
        state[f"{name}.lora_down.weight"] = down.float().to(dtype)
        state[f"{name}.lora_up.weight"] = up.float().to(dtype)
        if magnitude is not None:
            # LyCORIS' key and shape; ComfyUI tells by the shape that they are the lengths of the outputs.
            state[f"{name}.dora_scale"] = magnitude.reshape(-1, *[1] * (down.ndim - 1)).float().to(dtype)
    for layer, factors in file.factors.items():
        name = kohya_name(layer, sdxl=family == "sdxl", unet_config=unet_config)
        state |= factor_entries(name, factors, dtype=dtype, layer=layer, path=path)
    for embedding in file.embeddings:
        for key, tensor in embedding_tensors(embedding).items():
            state[f"{_BUNDLED}{embedding.name}.{key}"] = tensor.to(dtype)
    digest = hashlib.sha256()  # of the bytes after the header; the webui shows it in its lists
    for tensor in state.values():
        content: Any = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        digest.update(content)
    header = own_entries(file.metadata) | kohya_entries(
        file.metadata,
        name=file.name,
        family=family,
        ranks=[(matrices.rank, matrices.alpha) for matrices in file.layers.values()]
        + [(factors.rank or 1, factors.alpha) for factors in file.factors.values()],
        has_convolutions=any(matrices.down.shape[2:].numel() > 1 for matrices in file.layers.values()),
        algorithm=next((factors.kind for factors in file.factors.values()), None),
    )
    write_safetensors(state, path, header=header | {"sshs_model_hash": digest.hexdigest()})
    return path


def read_lora(path: str | Path, *, layers_per_block: int = STANDARD_LAYERS) -> LoraFile:
    """Read a LoRA of either layout on the CPU in float32, with its embeddings; its name is the file's stem.

    ``layers_per_block``: that of the model's U-Net, for files with Stability's block names. Raises FormatError for
    another kind of file, and for LyCORIS's forms other than LoRA, LoHa and LoKr.
    """
    path = Path(path)
    tensors, header = _read_tensors(path)
    embeddings = _take_embeddings(tensors, path)
    found: dict[str, dict[str, Tensor]] = {}
    unknown, twice = [], []
    for key, tensor in tensors.items():
        place = layer_of_key(key, layers_per_block=layers_per_block)
        if place is None:
            unknown.append(key)
        elif place[1] in found.setdefault(place[0], {}):
            twice.append(key)
        else:
            found[place[0]][place[1]] = tensor
    if not any(not _LORA_KEYS.isdisjoint(parts) for parts in found.values()):
        raise FormatError(f"{path}: holds no LoRA: no key ends in lora_down.weight or lora_A.weight.")
    for keys, what in (
        (unknown, "are not those of a LoRA"),
        (twice, "name a layer twice"),
    ):
        if keys:
            raise FormatError(
                f"{path}: {len(keys)} keys {what}: {', '.join(map(repr, keys[:4]))}. LoRA, LoCon, DoRA, LoHa and LoKr "
                "files can be read, other forms of LyCORIS cannot."
            )
    alphas = PeftAlphas(header, path)
    factored = {layer: parts for layer, parts in found.items() if not FACTOR_KEYS.isdisjoint(parts)}
    layers = {
        layer: _matrices(layer, parts, alphas, path)
        for layer, parts in found.items()
        if layer not in factored
    }
    factors = {layer: read_factors(layer, parts, path) for layer, parts in factored.items()}
    is_kohyas = any(key.startswith("lora_") for key in tensors)
    return LoraFile(path.stem, layers, header, is_kohyas, embeddings, factors)


def holds_lora(path: str | Path) -> bool:
    """Return whether a file is a LoRA, judging by its tensor names. Raises FormatError for a damaged file."""
    path = Path(path)
    if path.suffix.lower() == ".safetensors":
        keys = safetensors_names(path)
    elif path.suffix.lower() in SUFFIXES:
        data = load_pickle(path)
        keys = [key for key in data if isinstance(key, str)] if isinstance(data, dict) else []
    else:
        return False
    places = [layer_of_key(key) for key in keys]
    return any(place is not None and place[1] != "alpha" for place in places)


def _take_embeddings(tensors: dict[str, Tensor], path: Path) -> tuple[Embedding, ...]:
    """Remove the bundled embeddings (``bundle_emb.NAME.KEY``, with KEY as in an embedding file) and return them."""
    bundled: dict[str, dict[str, Any]] = {}
    for key in [key for key in tensors if key.startswith(_BUNDLED)]:
        name, _, inner = key.removeprefix(_BUNDLED).partition(".")
        group, _, word = inner.partition(".")
        held = bundled.setdefault(name, {})
        if group == "string_to_param":
            held.setdefault(group, {})[word] = tensors.pop(key)
        else:
            held[inner] = tensors.pop(key)
    return tuple(embedding_in(held, name, path) for name, held in bundled.items())


def _matrices(layer: str, parts: Mapping[str, Tensor], alphas: PeftAlphas, path: Path) -> Matrices:
    if "down" not in parts or "up" not in parts:
        raise FormatError(
            f"{path}: the layer {layer} has only {', '.join(sorted(parts))}; down and up are both needed."
        )
    down, up = parts["down"].float(), parts["up"].float()
    fits = down.ndim in (2, 4) and up.ndim in (2, 4) and up.shape[1] == down.shape[0]
    if not fits or not down.numel() or not up.numel() or up.shape[2:].numel() != 1:
        raise FormatError(
            f"{path}: the layer {layer} has down {list(down.shape)} and up {list(up.shape)}, which do not match."
        )
    _require_finite(layer, (down, up), path)
    alpha: Any = parts["alpha"].tolist() if "alpha" in parts else alphas.of(layer, down.shape[0])
    if isinstance(alpha, list) and len(alpha) == 1:
        alpha = alpha[0]
    if type(alpha) not in (int, float) or not math.isfinite(alpha):
        raise FormatError(f"{path}: the layer {layer} has an alpha that is not a number.")
    return Matrices(down, up, float(alpha), _magnitude(layer, parts, len(up), path))


def _magnitude(layer: str, parts: Mapping[str, Tensor], count: int, path: Path) -> Tensor | None:
    if "magnitude" not in parts:
        return None
    found = parts["magnitude"].float()
    _require_finite(layer, (found,), path)
    pefts, lycoris = ((count,), (1, count, 1, 1)), ((count, 1), (count, 1, 1, 1))
    if tuple(found.shape) not in (*pefts, *lycoris):
        raise FormatError(
            f"{path}: the layer {layer} has {list(found.shape)} lengths of a DoRA, and {count} outputs: LyCORIS writes "
            "lengths of the inputs without its option wd_on_output, which cannot be read."
        )
    return found.reshape(-1)


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if path.suffix.lower() == ".safetensors":
        tensors, header = read_safetensors(path)
    else:
        data, header = load_pickle(path), {}
        if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
            raise FormatError(f"{path}: holds no LoRA; expected a dict of named tensors.")
        tensors = data
    for key, tensor in tensors.items():
        is_alpha = is_dense(tensor) and key.endswith("alpha") and tensor.numel() == 1
        if not (is_alpha or is_real(tensor) or (key.startswith(_BUNDLED) and is_dense(tensor))):
            raise FormatError(f"{path}: {key!r} is not a tensor of a LoRA.")
    require_backed(tensors.values(), path)
    return {key: tensor.detach() for key, tensor in tensors.items()}, header


def _require_finite(layer: str, tensors: tuple[Tensor, ...], path: Path) -> None:
    if not all(torch.isfinite(tensor).all() for tensor in tensors):
        raise FormatError(f"{path}: the layer {layer} holds NaN or infinite numbers; its training failed.")
