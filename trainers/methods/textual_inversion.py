"""Textual Inversion: trains n new token embeddings to represent what a set of images has in common.

Source: Gal et al. 2022 (arXiv 2208.01618); multi-vector form and initialisation as in AUTOMATIC1111's webui.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dreamfleet.datasets.index.template_files import load_templates
from dreamfleet.trainers.config.methods.textual_inversion import TextualInversionConfig
from dreamfleet.trainers.methods.base import Sample, Setting
from dreamfleet.trainers.methods.diffusion_method import DiffusionMethod
from dreamfleet.trainers.methods.embedding_common import (
    check_templates,
    export_word,
    fill_prompt,
    initial_vectors,
    vectors_from,
    word_parameters,
)
from dreamfleet.trainers.methods.export_request import Export
from dreamfleet.trainers.models.embeddings import install_embedding
from dreamfleet.trainers.models.family import DiffusionModel
from dreamfleet.trainers.models.formats.optimizer_file import AdamState
from dreamfleet.trainers.optim.param_group import ParamGroup


class TextualInversion(DiffusionMethod):
    """Train n vectors of a new word; the model is frozen. Exports kilobytes, usable with other artifacts."""

    formats = ("pt", "safetensors", "png")

    def __init__(self, config: TextualInversionConfig, model: DiffusionModel, setting: Setting):
        super().__init__(config, model, setting)
        start = initial_vectors(model, config.initializer_token, config.num_vectors)
        self._learning = word_parameters(self, "vectors", start)
        install_embedding(model, config.placeholder_token, *self._learning.values())
        self._templates = load_templates(config.template_file or config.learnable_property)

    @property
    def trains_text(self) -> bool:
        return True

    def start(self) -> dict[str, AdamState]:
        """Load ``initial_embedding`` and its steps; return Adam's moments if their file is beside it."""
        if self.config.initial_embedding is None:
            return {}
        vectors, self.steps_before, moments = vectors_from(
            self.model, self.config.initial_embedding, self.config.num_vectors
        )
        self.load_state(dict(zip(self._learning, vectors, strict=True)))
        return dict(zip(self._learning, moments, strict=True)) if moments else {}

    def groups(self) -> list[ParamGroup]:
        return [ParamGroup("embedding", dict(self._learning))]

    def check_prompts(self, samples: Sequence[Sample], data: Any) -> str | None:
        """Return a warning if some prompts lack the word, else None. Raises RecipeError if all lack it."""
        return check_templates(self.model, self._templates, self.config.placeholder_token, samples, data)

    def prompt(self, sample: Sample, rng: np.random.Generator, data: Any) -> str:
        """Return a random template, filled with the placeholder token and the image's caption."""
        return fill_prompt(self._templates, self.config.placeholder_token, sample, rng, data)

    def write(self, order: Export) -> list[Path]:
        """Write ``NAME.pt`` (webui), ``NAME.safetensors`` (diffusers) and ``NAME.png`` (image embedding).

        For SDXL, a file has the vectors of both encoders under kohya's keys ``clip_l`` and ``clip_g``, which
        the webui reads too.
        """
        return export_word(
            list(self._learning.values()),
            replace(order, step=self.steps_before + order.step),
            word=self.config.placeholder_token,
            model=self.model,
        )
