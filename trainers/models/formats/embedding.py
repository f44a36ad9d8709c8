"""Textual Inversion embeddings: n learned vectors under a name, in every file form webui and diffusers read."""

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

_PREFIX = "dreamfleet."  # of our fields in a safetensors header, apart from the metadata itself
_KEYS_WITHOUT_NAME = ("emb_params", "clip_l", "clip_g", "*", "")


@dataclass(frozen=True)
class Embedding:
    """`vectors` `[n, D]` (float32) that stand for `name` in prompts; D is the text encoder's width.

    `vectors_2` `[n, 1280]`: the same for SDXL's second text encoder; `vectors` is then for the first. `step`: optimizer
    steps trained. `sd_checkpoint`: short hash (10 hex digits) of the base model, `sd_checkpoint_name` its file stem.
    `metadata`: text entries that travel with the file.
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
        """The 4 hex digits by which webui tells embeddings apart in image infotexts; of `vectors` alone."""
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

    `picture` is what an image embedding shows. `kohya`: the one tensor is called `emb_params`, so that the name is the
    file's. SDXL's pairs are written as kohya and webui read them, `clip_l` and
    `clip_g`: there only `.safetensors` has room for the name, the step and metadata. Raises FormatError for vectors
    nobody could use, and for a `.pt` whose stem differs from the name: webui takes the name from the file, diffusers
    from inside.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    _check(embedding, path)
    if suffix in EMBEDDING_IMAGES:
        held = _to_pair(embedding) or _to_webui(embedding)
        return image_embedding.write_image_embedding(held, path, image=image, caption=_card(embedding))
    if suffix not in EMBEDDINGS:
        raise FormatError(f"{path}: an embedding is written as one of {', '.join(EMBEDDINGS)}.")
    # `.safetensors` and `.bin` hold one tensor, whose key webui ignores: there the inner name may be the word that the
    # vectors were trained under, which is what diffusers loads them as.
    if suffix == ".pt" and path.stem != embedding.name:
        raise FormatError(
            f"{path}: the file must be called {embedding.name}.pt, or the embedding {path.stem!r}: webui takes "
            "the name from the file, diffusers from inside it."
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
    """Read an embedding in any form webui or diffusers reads; `name` overrules the one found.

    Without it, a webui `.pt` and an SDXL pair are called as their file, as in webui; a diffusers file by its one key;
    an image embedding by the name inside. Raises FormatError for another kind of file.
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
    """Read an embedding that another file (a LoRA's) holds under a name. Raises FormatError, naming that file."""
    found = replace(_recognise(data, path, named=True), name=name)
    _check(found, path)
    return found


def embedding_tensors(embedding: Embedding) -> dict[str, Tensor]:
    """Return the tensors of an embedding by the names that stand in another file, those of a webui `.pt` or a pair."""
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
            f"{path}: SDXL's two text encoders need as many vectors each, not {len(tables[0])} and {len(tables[1])}."
        )


def _plain(vectors: Tensor) -> Tensor:
    return vectors.detach().float().cpu().contiguous()


def _to_pair(embedding: Embedding) -> dict[str, Tensor] | None:
    """Build SDXL's pair, None for the other families; webui would take anything beside the two for vectors as well."""
    if embedding.vectors_2 is None:
        return None
    return {"clip_l": _plain(embedding.vectors), "clip_g": _plain(embedding.vectors_2)}


def _from_pair(data: dict[Any, Any], path: Path) -> Embedding | None:
    if "string_to_param" in data or not data.keys() >= {"clip_l", "clip_g"}:
        return None
    return Embedding(path.stem, _vectors(data["clip_l"], path), vectors_2=_vectors(data["clip_g"], path))


def _to_webui(embedding: Embedding) -> dict[str, Any]:
    """Build the dict of a webui `.pt`; 265 is the id of "*" in SD1's vocabulary, always written, never read."""
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
    # Sparse and meta tensors pass torch's safe reader as well, and claim any size; so do views of one number.
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
