"""Textual Inversion embeddings: n learned vectors under a name, in every file form webui and diffusers read."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dreamfleet.datasets.errors import FormatError
from dreamfleet.trainers.sd.formats import image_embedding
from dreamfleet.trainers.sd.formats.pickles import load_pickle, parameters_of, save_pickle
from dreamfleet.trainers.sd.formats.tensor_files import read_safetensors, write_safetensors

SUFFIXES = (".pt", ".bin", ".safetensors", *image_embedding.SUFFIXES)

_METADATA_KEY = "dreamfleet"  # an extra entry of the webui dict: webui and diffusers pass over it
_PREFIX = "dreamfleet."  # of our fields in a safetensors header, apart from the metadata itself
_KEYS_WITHOUT_NAME = ("emb_params", "clip_l", "clip_g", "*", "")


@dataclass(frozen=True)
class Embedding:
    """`vectors` `[n, D]` (float32) that stand for `name` in prompts; D is the text encoder's width.

    `step`: optimizer steps trained. `sd_checkpoint`: short hash (10 hex digits) of the base model, `sd_checkpoint_name`
    its file stem. `metadata`: text entries that travel with the file.
    """

    name: str
    vectors: Tensor
    step: int = 0
    sd_checkpoint: str | None = None
    sd_checkpoint_name: str | None = None
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def checksum(self) -> str:
        """The 4 hex digits by which webui tells embeddings apart in picture infotexts."""
        result = 0
        for value in (self.vectors.float().cpu().reshape(-1) * 100).tolist():
            result = (result * 281 ^ int(value) * 997) & 0xFFFFFFFF
        return f"{result & 0xFFFF:04x}"


def write_embedding(
    embedding: Embedding, path: str | os.PathLike[str], *, picture: Image.Image | None = None
) -> Path:
    """Write `.pt` (webui), `.safetensors` or `.bin` (diffusers), or an image embedding (`.png`, lossless `.webp`).

    `picture` is what an image embedding shows. Raises FormatError for vectors nobody could use, and for a `.pt`
    whose stem differs from the name: webui takes the name from the file, diffusers from inside.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    _check(embedding, path)
    if suffix in image_embedding.SUFFIXES:
        return image_embedding.write_image_embedding(
            _to_webui(embedding), path, picture=picture, caption=_card(embedding)
        )
    if suffix not in SUFFIXES:
        raise FormatError(f"{path}: an embedding is written as one of {', '.join(SUFFIXES)}.")
    # `.safetensors` and `.bin` hold one tensor, whose key webui ignores: there the inner name may be the word that the
    # vectors were trained under, which is what diffusers loads them as.
    if suffix == ".pt" and path.stem != embedding.name:
        raise FormatError(
            f"{path}: the file must be called {embedding.name}.pt, or the embedding {path.stem!r}: webui takes "
            "the name from the file, diffusers from inside it."
        )
    vectors = embedding.vectors.detach().float().cpu().contiguous()
    if suffix == ".pt":
        return save_pickle(_to_webui(embedding), path)
    if suffix == ".bin":
        return save_pickle({embedding.name: vectors}, path)
    write_safetensors({embedding.name: vectors}, path, header=_to_header(embedding))
    return path


def read_embedding(path: str | os.PathLike[str], name: str | None = None) -> Embedding:
    """Read an embedding in any form webui or diffusers reads; `name` overrules the one found.

    Without it, a webui `.pt` is called as its file, as in webui; a diffusers file by its one key; an image
    embedding by the name inside. Raises FormatError for another kind of file, SDXL pairs included.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix in image_embedding.SUFFIXES:
        found = _from_webui(image_embedding.read_image_embedding(path), path, name_from_file=False)
    elif suffix == ".safetensors":
        found = _read_safetensors(path)
    elif suffix in (".pt", ".bin"):
        found = _recognise(load_pickle(path), path, named=name is not None)
    else:
        raise FormatError(f"{path}: an embedding is read from one of {', '.join(SUFFIXES)}.")
    if name is not None:
        found = Embedding(
            name, found.vectors, found.step, found.sd_checkpoint, found.sd_checkpoint_name, found.metadata
        )
    _check(found, path)
    return found


def _check(embedding: Embedding, path: Path) -> None:
    vectors = embedding.vectors
    if not embedding.name.strip():
        raise FormatError(f"{path}: the embedding has no name; give it one.")
    if vectors.ndim != 2 or not vectors.numel() or not vectors.is_floating_point():
        raise FormatError(
            f"{path}: an embedding is a table [vectors, width] of numbers, not {list(vectors.shape)} {vectors.dtype}."
        )
    if not torch.isfinite(vectors).all():
        raise FormatError(
            f"{path}: the embedding {embedding.name!r} holds NaN or infinite numbers; its training failed."
        )


def _to_webui(embedding: Embedding) -> dict[str, Any]:
    """Build the dict of a webui `.pt`; 265 is the id of "*" in SD1's vocabulary, always written, never read."""
    data = {
        "string_to_token": {"*": 265},
        "string_to_param": {"*": embedding.vectors.detach().float().cpu().contiguous()},
        "name": embedding.name,
        "step": int(embedding.step),
        "sd_checkpoint": embedding.sd_checkpoint,
        "sd_checkpoint_name": embedding.sd_checkpoint_name,
    }
    if embedding.metadata:
        data[_METADATA_KEY] = json.dumps(embedding.metadata)
    return data


def _from_webui(data: dict[Any, Any], path: Path, *, name_from_file: bool) -> Embedding:
    held = parameters_of(data.get("string_to_param"))
    if not isinstance(held, dict) or len(held) != 1:
        raise FormatError(f"{path}: its string_to_param must hold exactly one tensor.")
    vectors = _vectors(next(iter(held.values())), path)
    inner = data.get("name")
    name = path.stem if name_from_file or not isinstance(inner, str) or not inner else inner
    step = data.get("step")
    hash_, checkpoint = data.get("sd_checkpoint"), data.get("sd_checkpoint_name")
    return Embedding(
        name,
        vectors,
        step if isinstance(step, int) else 0,
        hash_ if isinstance(hash_, str) else None,
        checkpoint if isinstance(checkpoint, str) else None,
        _metadata(data.get(_METADATA_KEY)),
    )


def _recognise(data: Any, path: Path, *, named: bool) -> Embedding:
    """Tell the forms apart in webui's order (reference, section 1.1)."""
    if isinstance(data, Tensor):
        if named:
            return Embedding(path.stem, _vectors(data, path))
        raise FormatError(
            f"{path}: holds one tensor without a name: an aesthetic embedding, or a Textual Inversion that needs "
            "a name."
        )
    if not isinstance(data, dict):
        raise FormatError(f"{path}: holds no embedding.")
    if "string_to_param" in data:
        return _from_webui(data, path, name_from_file=True)
    if "clip_g" in data and "clip_l" in data:
        raise FormatError(
            f"{path}: an SDXL embedding (a pair of vectors), which Stable Diffusion 1 and 2 cannot use."
        )
    if len(data) != 1:
        some = ", ".join(map(repr, list(data)[:4]))
        raise FormatError(
            f"{path}: no embedding: expected one tensor, found {len(data)} entries ({some} ...)."
        )
    key, value = next(iter(data.items()))
    name = path.stem if key in _KEYS_WITHOUT_NAME or not isinstance(key, str) else key
    return Embedding(name, _vectors(value, path))


def _read_safetensors(path: Path) -> Embedding:
    data, header = read_safetensors(path)
    found = _recognise(data, path, named=False)
    ours = {key.removeprefix(_PREFIX): header.pop(key) for key in list(header) if key.startswith(_PREFIX)}
    header.pop("format", None)
    step = ours.get("step", "")
    return Embedding(
        found.name,
        found.vectors,
        int(step) if step.isdecimal() else 0,
        ours.get("sd_checkpoint"),
        ours.get("sd_checkpoint_name"),
        header,
    )


def _to_header(embedding: Embedding) -> dict[str, str]:
    header = {**embedding.metadata, f"{_PREFIX}step": str(int(embedding.step))}
    if embedding.sd_checkpoint is not None:
        header[f"{_PREFIX}sd_checkpoint"] = embedding.sd_checkpoint
    if embedding.sd_checkpoint_name is not None:
        header[f"{_PREFIX}sd_checkpoint_name"] = embedding.sd_checkpoint_name
    return header


def _vectors(value: Any, path: Path) -> Tensor:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise FormatError(f"{path}: holds a {type(value).__name__} where the vectors should be.")
    vectors = value.detach().float()
    return vectors[None] if vectors.ndim == 1 else vectors


def _metadata(text: Any) -> dict[str, str]:
    try:
        found = json.loads(text) if isinstance(text, str) else {}
    except (ValueError, RecursionError):
        return {}
    return {str(key): str(value) for key, value in found.items()} if isinstance(found, dict) else {}


def _card(embedding: Embedding) -> list[str]:
    footer = f"{len(embedding.vectors)}v {embedding.step}s"
    return [
        f"<{embedding.name}>",
        embedding.sd_checkpoint_name or "",
        f"[{embedding.sd_checkpoint}]" if embedding.sd_checkpoint else "",
        footer,
    ]
