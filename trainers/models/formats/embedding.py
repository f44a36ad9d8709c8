"""Reads and writes Textual Inversion embeddings in every file format of the webui and diffusers."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dreamfleet.datasets.errors import FormatError
from dreamfleet.trainers.models.formats import image_embedding
from dreamfleet.trainers.models.formats.file_names import EMBEDDING_IMAGES, EMBEDDINGS
from dreamfleet.trainers.models.formats.pickle_writer import (
    METADATA_KEY,
    is_real,
    load_pickle,
    parameters_of,
    require_backed,
    save_pickle,
    text_entries,
)
from dreamfleet.trainers.models.formats.tensor_files import read_safetensors, write_safetensors

_PREFIX = "dreamfleet."  # prefix of dreamfleet's fields in a safetensors header
_KEYS_WITHOUT_NAME = ("emb_params", "clip_l", "clip_g", "*", "")


@dataclass(frozen=True)
class Embedding:
    """A textual inversion embedding: float32 `vectors` `[n, D]` for the word `name`; D is the text encoder's width.

    `vectors_2` `[n, 1280]` are those for SDXL's second text encoder; `vectors` are then for the first. `step`: number
    of optimizer steps trained. `sd_checkpoint`: short hash (10 hex digits) of the base model, `sd_checkpoint_name` its
    file stem. `metadata`: text entries stored in the file.
    """

    name: str
    vectors: Tensor
    step: int = 0
    sd_checkpoint: str | None = None
    sd_checkpoint_name: str | None = None
    metadata: dict[str, str] = field(default_factory=dict)
    vectors_2: Tensor | None = None

    @property
    def checksum(self) -> str:
        """The 4 hex digits by which the webui identifies an embedding in generation parameters; of `vectors` only."""
        result = 0
        for value in (self.vectors.float().cpu().reshape(-1) * 100).tolist():
            result = (result * 281 ^ int(value) * 997) & 0xFFFFFFFF
        return f"{result & 0xFFFF:04x}"


def write_embedding(
    embedding: Embedding,
    path: str | os.PathLike[str],
    *,
    image: Image.Image | None = None,
    kohya: bool = False,
) -> Path:
    """Write `.pt` (webui), `.safetensors` or `.bin` (diffusers), or an image embedding (`.png`, lossless `.webp`).

    `image` is the visible part of an image embedding. `kohya` names the tensor `emb_params`, so that programs use the
    file's name as the word. SDXL's pairs are written as `clip_l` and `clip_g`, which kohya and the webui read; only a
    `.safetensors` then stores the name, the step and metadata. Raises FormatError for invalid vectors, and for a `.pt`
    whose stem differs from the name, since the webui uses the file's name and diffusers the one inside.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    _check(embedding, path)
    if suffix in EMBEDDING_IMAGES:
        held = _to_pair(embedding) or _to_webui(embedding)
        return image_embedding.write_image_embedding(held, path, image=image, caption=_card(embedding))
    if suffix not in EMBEDDINGS:
        raise FormatError(f"{path}: an embedding is written as one of {', '.join(EMBEDDINGS)}.")
    # A `.safetensors` or `.bin` contains one tensor. The webui ignores its key, and diffusers uses it as the word.
    if suffix == ".pt" and path.stem != embedding.name:
        raise FormatError(
            f"{path}: the file must be called {embedding.name}.pt, or the embedding {path.stem!r}: the webui takes "
            "the name from the file, diffusers from its content."
        )
    pair = _to_pair(embedding)
    if suffix == ".pt":
        return save_pickle(pair or _to_webui(embedding), path)
    tensors = pair or {"emb_params" if kohya else embedding.name: _plain(embedding.vectors)}
    if suffix == ".bin":
        return save_pickle(tensors, path)
    header = _to_header(embedding) | ({f"{_PREFIX}name": embedding.name} if pair else {})
    write_safetensors(tensors, path, header=header)
    return path


def read_embedding(path: str | os.PathLike[str], name: str | None = None) -> Embedding:
    """Read an embedding in any format of the webui or diffusers; `name` overrides its name.

    By default the name of a webui `.pt` or an SDXL pair is the file's stem, as in the webui, that of a diffusers file
    is its only key, and that of an image embedding is stored in it. Raises FormatError if it is not an embedding.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix in EMBEDDING_IMAGES:
        held = image_embedding.read_image_embedding(path)
        found = _from_pair(held, path) or _from_webui(held, path, name_from_file=False)
    elif suffix == ".safetensors":
        found = _read_safetensors(path)
    elif suffix in (".pt", ".bin"):
        found = _recognise(load_pickle(path), path, named=name is not None)
    else:
        raise FormatError(f"{path}: an embedding is read from one of {', '.join(EMBEDDINGS)}.")
    if name is not None:
        found = replace(found, name=name)
    _check(found, path)
    return found


def embedding_in(data: dict[str, Any], name: str, path: Path) -> Embedding:
    """Return an embedding bundled in another file (a LoRA), given its tensors. Raises FormatError naming that file."""
    found = replace(_recognise(data, path, named=True), name=name)
    _check(found, path)
    return found


def embedding_tensors(embedding: Embedding) -> dict[str, Tensor]:
    """Return an embedding's tensors, named for bundling in another file as in a webui `.pt` or in an SDXL pair."""
    return _to_pair(embedding) or {"string_to_param.*": _plain(embedding.vectors)}


def _check(embedding: Embedding, path: Path) -> None:
    if not embedding.name.strip():
        raise FormatError(f"{path}: the embedding has no name; give it one.")
    tables = [embedding.vectors] + ([] if embedding.vectors_2 is None else [embedding.vectors_2])
    for vectors in tables:
        if vectors.ndim != 2 or not vectors.numel() or not vectors.is_floating_point():
            raise FormatError(
                f"{path}: an embedding is a table [vectors, width] of numbers, not {list(vectors.shape)} "
                f"{vectors.dtype}."
            )
        if not torch.isfinite(vectors).all():
            raise FormatError(
                f"{path}: the embedding {embedding.name!r} holds NaN or infinite numbers; its training failed."
            )
    if len(tables[0]) != len(tables[-1]):
        raise FormatError(
            f"{path}: SDXL's two text encoders need equally many vectors, not {len(tables[0])} and {len(tables[1])}."
        )


def _plain(vectors: Tensor) -> Tensor:
    return vectors.detach().float().cpu().contiguous()


def _to_pair(embedding: Embedding) -> dict[str, Tensor] | None:
    """Return SDXL's pair of tensors, without other entries, which the webui would read as vectors; None if not SDXL."""
    if embedding.vectors_2 is None:
        return None
    return {"clip_l": _plain(embedding.vectors), "clip_g": _plain(embedding.vectors_2)}


def _from_pair(data: dict[Any, Any], path: Path) -> Embedding | None:
    if "string_to_param" in data or not data.keys() >= {"clip_l", "clip_g"}:
        return None
    return Embedding(path.stem, _vectors(data["clip_l"], path), vectors_2=_vectors(data["clip_g"], path))


def _to_webui(embedding: Embedding) -> dict[str, Any]:
    """Return the dict of a webui `.pt`. The token id 265 ("*" in SD1's vocabulary) is always written and never read."""
    data = {
        "string_to_token": {"*": 265},
        "string_to_param": {"*": _plain(embedding.vectors)},
        "name": embedding.name,
        "step": int(embedding.step),
        "sd_checkpoint": embedding.sd_checkpoint,
        "sd_checkpoint_name": embedding.sd_checkpoint_name,
    }
    if embedding.metadata:
        data[METADATA_KEY] = json.dumps(embedding.metadata)
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
        step if type(step) is int and 0 <= step < 10**18 else 0,
        hash_ if isinstance(hash_, str) else None,
        checkpoint if isinstance(checkpoint, str) else None,
        text_entries(data.get(METADATA_KEY)),
    )


def _recognise(data: Any, path: Path, *, named: bool) -> Embedding:
    """Return the embedding in the content of a file, whose format is recognised in the webui's order.

    Source: webui, modules/textual_inversion/textual_inversion.py. Raises FormatError for any other content.
    """
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
    if pair := _from_pair(data, path):
        return pair
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
    return replace(
        found,
        name=ours.get("name") or found.name,
        step=int(step) if step.isdecimal() and len(step) < 20 else 0,
        sd_checkpoint=ours.get("sd_checkpoint"),
        sd_checkpoint_name=ours.get("sd_checkpoint_name"),
        metadata=header,
    )


def _to_header(embedding: Embedding) -> dict[str, str]:
    header = {**embedding.metadata, f"{_PREFIX}step": str(int(embedding.step))}
    if embedding.sd_checkpoint is not None:
        header[f"{_PREFIX}sd_checkpoint"] = embedding.sd_checkpoint
    if embedding.sd_checkpoint_name is not None:
        header[f"{_PREFIX}sd_checkpoint_name"] = embedding.sd_checkpoint_name
    return header


def _vectors(value: Any, path: Path) -> Tensor:
    # torch's safe reader also returns sparse tensors, meta tensors and expanded views, which can be of any size.
    if not is_real(value):
        raise FormatError(f"{path}: holds a {type(value).__name__} where the vectors should be.")
    if path.suffix.lower() in (".pt", ".bin"):
        require_backed([value], path)
    vectors = value.detach().float()
    return vectors[None] if vectors.ndim == 1 else vectors


def _card(embedding: Embedding) -> list[str]:
    footer = f"{len(embedding.vectors)}v {embedding.step}s"
    return [
        f"<{embedding.name}>",
        embedding.sd_checkpoint_name or "",
        f"[{embedding.sd_checkpoint}]" if embedding.sd_checkpoint else "",
        footer,
    ]
