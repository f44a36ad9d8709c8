"""What the methods that teach new words share: where vectors start, their prompts in training, their files."""

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

MARK = "\U000f1fff"  # stands for the word while a template is filled; a private character, which no text has


def initial_vectors(model: DiffusionModel, text: str, num_vectors: int) -> list[Tensor]:
    """Return the starting vectors ``[n, D]`` in each text encoder: the rows of the text's tokens.

    Each token serves an equal run of vectors: vector i copies token floor(i * tokens / n), as webui does; more tokens
    than vectors are cut. An empty text starts from zeros (webui), which trains, as the encoder adds positions.
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
    """Read the vectors ``[n, D]`` in each text encoder to start from, the steps they were trained, and their moments.

    Moments are none where no `.optim` beside the file fits. Raises RecipeError for a file of another number or width.
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
    """Register a word's vectors under ``name``, and SDXL's second under ``name_2`` -> what was registered, by name."""
    names = [name, f"{name}_2"][: len(vectors)]
    made = {each: nn.Parameter(tensor) for each, tensor in zip(names, vectors, strict=True)}
    for each, parameter in made.items():
        module.register_parameter(each, parameter)
    return made


def fill_prompt(
    templates: Sequence[str], word: str, sample: Sample, rng: np.random.Generator, data: Any
) -> str:
    """Fill a template line drawn for this use of an image with the word and the image's caption.

    The word is set apart from letters beside it, as the tokenizer would not find it among them.
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
    """Return what to warn of where some prompts lack the word. Raises RecipeError where none has it."""

    def has_word(template: str, caption: str) -> bool:
        filled = place_word(captions.fill_template(template, MARK, caption), MARK, word)
        return word in words_in(model, [filled])

    having = [template for template in templates if has_word(template, "")]
    lacking = [template for template in templates if template not in having]
    if having:
        few = f"{len(lacking)} of {len(templates)} templates do not use {word!r}, and teach it nothing: {lacking[:1]}"
        return f"{few}. Put [name] into them" if lacking else None
    texts = [
        _file_words(sample, data) for sample in samples if any("[filewords]" in each for each in templates)
    ]
    naming = sum(any(has_word(template, caption) for template in templates) for caption in texts)
    if not naming:
        raise RecipeError(
            f"method.template_file: no template uses {word!r}, nor does a caption that one is filled with, so it would "
            f"learn nothing; put [name] where the word goes, as in 'a photo of [name]' (now: {templates[0]!r})"
        )
    if naming < len(texts):
        return f"{len(texts) - naming} of {len(texts)} captions do not use {word!r}, nor do the templates"
    return None


def _file_words(sample: Sample, data: Any) -> str:
    """Return what ``[filewords]`` of an image may say, all lines of its caption at once."""
    if sample.caption and data.use_captions:
        return " ".join(filter(None, (data.caption_prefix, sample.caption, data.caption_suffix)))
    return captions.caption_from_filename(sample.file_name) if data.caption_from_filename else ""


def export_word(vectors: Sequence[Tensor], order: Export, *, word: str, model: DiffusionModel) -> list[Path]:
    """Write ``NAME.FORMAT`` for every format, kohya's as ``kohya/NAME.safetensors``; returns the paths.

    ``vectors``: those in each text encoder.
    """
    paths = []
    tables = [tensor.detach().float().cpu().clone() for tensor in vectors]
    for suffix in order.formats:
        # webui goes by the file's name, diffusers by the name inside: the word the vectors were trained under.
        embedding = Embedding(
            name=word if suffix in ("safetensors", "bin") else order.name,
            vectors=tables[0],
            vectors_2=tables[1] if len(tables) > 1 else None,
            step=order.step,
            sd_checkpoint=model.short_hash(),
            sd_checkpoint_name=model.short_name,
            metadata=order.metadata,
        )
        if suffix == "kohya":  # goes by the file's name, which diffusers' file has as well
            write_embedding(embedding, order.folder / "kohya" / f"{order.name}.safetensors", kohya=True)
            paths.append(order.folder / "kohya")
        else:
            paths.append(write_embedding(embedding, order.folder / f"{order.name}.{suffix}"))
    return paths
