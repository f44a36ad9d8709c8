"""Functions shared by methods that train embeddings: initial vectors, training prompts, exports."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dreamfleet.datasets import captions
from dreamfleet.datasets.errors import RecipeError
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.methods.base import Sample
from dreamfleet.trainers.methods.export_request import Export
from dreamfleet.trainers.models.embeddings import token_tables
from dreamfleet.trainers.models.family import DiffusionModel
from dreamfleet.trainers.models.formats.embedding import Embedding, read_embedding, write_embedding
from dreamfleet.trainers.models.formats.optimizer_file import AdamState, moments_beside
from dreamfleet.trainers.models.learned_words import place_word, words_in

MARK = "\U000f1fff"  # replaces the word while a template is filled: a private-use character, in no text


def initial_vectors(model: DiffusionModel, text: str, num_vectors: int) -> list[Tensor]:
    """Return the initial vectors ``[n, D]`` for each text encoder: the embeddings of the text's tokens.

    Each token initialises an equal run of vectors: vector i copies token floor(i * tokens / n), as in the
    webui; tokens beyond the number of vectors are ignored. An empty text gives zeros (webui), which can be
    trained because the encoder adds position embeddings. Raises RecipeError for a text without tokens.
    """
    tables = [table.detach().float() for table in token_tables(model)]
    if not text.strip():
        return [torch.zeros_like(table[:1]).repeat(num_vectors, 1) for table in tables]
    ids = model.tokenizers[0](text, add_special_tokens=False).input_ids[:num_vectors]
    if not ids:
        raise RecipeError(f"method.initializer_token: {text!r} has no token in this model's vocabulary")
    rows = [ids[i * len(ids) // num_vectors] for i in range(num_vectors)]
    return [table[torch.tensor(rows)].clone() for table in tables]


def vectors_from(
    model: DiffusionModel, path: str, num_vectors: int
) -> tuple[list[Tensor], int, tuple[AdamState, ...]]:
    """Read a file's vectors ``[n, D]`` for each text encoder, their trained steps, and Adam's moments.

    Moments are empty if no matching `.optim` is beside the file. Raises RecipeError if the number or the
    width of the vectors differs from the run's.
    """
    with Storage(path).local_copy() as local:
        found = read_embedding(local)
    vectors = [found.vectors] + ([] if found.vectors_2 is None else [found.vectors_2])
    tables = token_tables(model)
    shapes, wanted = [list(v.shape) for v in vectors], [[num_vectors, table.shape[1]] for table in tables]
    if shapes != wanted:
        raise RecipeError(
            f"method.initial_embedding: {path} holds vectors of shape {shapes}, and this run learns {wanted}; set "
            f"method.num_vectors: {len(vectors[0])}, if it is of the same family of models"
        )
    return vectors, found.step, moments_beside(path, fits=found.checksum, shapes=shapes)


def word_parameters(module: nn.Module, name: str, vectors: Sequence[Tensor]) -> dict[str, nn.Parameter]:
    """Register a word's vectors as parameters of a module; return them by name.

    They are ``name``, and ``name_2`` for SDXL's second text encoder.
    """
    names = [name, f"{name}_2"][: len(vectors)]
    made = {each: nn.Parameter(tensor) for each, tensor in zip(names, vectors, strict=True)}
    for each, parameter in made.items():
        module.register_parameter(each, parameter)
    return made


def fill_prompt(
    templates: Sequence[str], word: str, sample: Sample, rng: np.random.Generator, data: Any
) -> str:
    """Return a random template, filled with the word and the image's caption.

    The word is separated from adjacent letters by spaces, because the tokenizer would not find it otherwise.
    """
    filled = captions.make_caption(
        sample.caption,
        template=captions.choose_template(templates, rng),
        name=MARK,
        file_name=sample.file_name,
        rng=rng,
        config=data,
    )
    return place_word(filled, MARK, word)


def check_templates(
    model: DiffusionModel, templates: Sequence[str], word: str, samples: Sequence[Sample], data: Any
) -> str | None:
    """Return a warning if some prompts lack the word, else None. Raises RecipeError if all lack it."""

    def has_word(template: str, caption: str) -> bool:
        filled = place_word(captions.fill_template(template, MARK, caption), MARK, word)
        return word in words_in(model, [filled])

    having = [template for template in templates if has_word(template, "")]
    lacking = [template for template in templates if template not in having]
    if having:
        few = f"{len(lacking)} of {len(templates)} templates do not use {word!r} and do not train it: {lacking[:1]}"
        return f"{few}. Add [name] to them" if lacking else None
    texts = [
        _file_words(sample, data) for sample in samples if any("[filewords]" in each for each in templates)
    ]
    naming = sum(any(has_word(template, caption) for template in templates) for caption in texts)
    if not naming:
        raise RecipeError(
            f"method.template_file: no template uses {word!r}, and no caption inserted into a template does, so its "
            f"embedding would not be trained. Add [name] to the templates, as in 'a photo of [name]' (first template: "
            f"{templates[0]!r})"
        )
    if naming < len(texts):
        return f"{len(texts) - naming} of {len(texts)} captions do not use {word!r}, nor do the templates"
    return None


def _file_words(sample: Sample, data: Any) -> str:
    """Return the text that may replace ``[filewords]`` for an image: all lines of its caption together."""
    if sample.caption and data.use_captions:
        return " ".join(filter(None, (data.caption_prefix, sample.caption, data.caption_suffix)))
    return captions.caption_from_filename(sample.file_name) if data.caption_from_filename else ""


def export_word(vectors: Sequence[Tensor], order: Export, *, word: str, model: DiffusionModel) -> list[Path]:
    """Write ``NAME.FORMAT`` for every format, kohya's as ``kohya/NAME.safetensors``; return the paths.

    ``vectors``: ``[n, D]`` for each text encoder.
    """
    paths = []
    tables = [tensor.detach().float().cpu().clone() for tensor in vectors]
    for suffix in order.formats:
        # The webui takes the word from the file's name, diffusers from the name inside (the trained word).
        embedding = Embedding(
            name=word if suffix in ("safetensors", "bin") else order.name,
            vectors=tables[0],
            vectors_2=tables[1] if len(tables) > 1 else None,
            step=order.step,
            sd_checkpoint=model.short_hash(),
            sd_checkpoint_name=model.short_name,
            metadata=order.metadata,
        )
        if suffix == "kohya":  # in its own folder, because diffusers' file has the same name
            write_embedding(embedding, order.folder / "kohya" / f"{order.name}.safetensors", kohya=True)
            paths.append(order.folder / "kohya")
        else:
            paths.append(write_embedding(embedding, order.folder / f"{order.name}.{suffix}"))
    return paths
