"""Textual Inversion: n new vectors in the text encoder's input learn what a set of pictures has in common.

Source: Gal et al. 2022 (arXiv 2208.01618); multi-vector form and initialisation as in AUTOMATIC1111's webui.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import AliasChoices, Field
from torch import Tensor, nn

from dreamfleet.datasets import captions
from dreamfleet.datasets.errors import RecipeError
from dreamfleet.trainers.methods.base import Method, MethodConfig, ParamGroup, Sample, Setting, register
from dreamfleet.trainers.sd.embeddings import install_embedding, text_embeddings
from dreamfleet.trainers.sd.formats.embedding import Embedding, write_embedding
from dreamfleet.trainers.sd.model import StableDiffusion


class TextualInversionConfig(MethodConfig):
    """The ``method:`` section of Textual Inversion."""

    name: Literal["textual_inversion"] = "textual_inversion"
    placeholder_token: str = Field(
        min_length=1, validation_alias=AliasChoices("placeholder_token", "token_string", "trigger_word")
    )
    initializer_token: str = Field(
        "", validation_alias=AliasChoices("initializer_token", "init_word", "initialization_text")
    )
    num_vectors: int = Field(
        1,
        ge=1,
        le=75,
        validation_alias=AliasChoices("num_vectors", "num_vectors_per_token", "vectors_per_token"),
    )
    learnable_property: Literal["object", "style"] = "object"
    template_file: str | None = Field(
        None,
        description="a prompt a line, with [name] and [filewords]; or a set's name: object, style_filewords",
    )


@register
class TextualInversion(Method):
    """Teach a new word: n vectors learn, the model stays as it is. Kilobytes, combines with anything."""

    name: ClassVar[str] = "textual_inversion"
    Config = TextualInversionConfig
    formats = ("pt", "safetensors", "png")
    all_formats = ("pt", "safetensors", "png", "webp", "bin")

    def __init__(self, config: TextualInversionConfig, model: StableDiffusion, setting: Setting):
        super().__init__(config, model, setting)
        table = text_embeddings(model.text_encoder).token_embedding.weight
        self.vectors = nn.Parameter(
            initial_vectors(model, config.initializer_token, config.num_vectors).to(table)
        )
        install_embedding(model, config.placeholder_token, self.vectors)
        chosen = config.template_file or config.learnable_property
        self._templates = captions.TEMPLATE_SETS.get(chosen) or captions.load_template_file(chosen)

    @property
    def trains_text(self) -> bool:
        return True

    def groups(self) -> list[ParamGroup]:
        return [ParamGroup("embedding", {"vectors": self.vectors})]

    def prompt(self, sample: Sample, rng: np.random.Generator, data: Any) -> str:
        """Fill a template line drawn for this use of the picture with the placeholder and the picture's caption."""
        template = captions.choose_template(self._templates, rng)
        return captions.make_caption(
            sample.caption,
            template=template,
            name=self.config.placeholder_token,
            file_name=sample.uri.rpartition("/")[2],
            rng=rng,
            config=data,
        )

    def export(
        self,
        folder: Path,
        name: str,
        *,
        formats: Sequence[str] | None,
        step: int,
        metadata: dict[str, str],
        precision: str,
    ) -> list[Path]:
        """Write ``NAME.pt`` (webui), ``NAME.safetensors`` (diffusers) and ``NAME.png`` (image embedding)."""
        paths = []
        for suffix in self.chosen_formats(formats):
            # webui goes by the file's name, diffusers by the name inside: the word the vectors were trained under.
            inner = self.config.placeholder_token if suffix in ("safetensors", "bin") else name
            embedding = Embedding(
                name=inner,
                vectors=self.vectors.detach().float().cpu().clone(),
                step=step,
                sd_checkpoint=self.model.content_hash,
                sd_checkpoint_name=Path(self.model.folder).stem,
                metadata=metadata,
            )
            paths.append(folder / f"{name}.{suffix}")
            write_embedding(embedding, paths[-1])
        return paths


def initial_vectors(model: StableDiffusion, text: str, num_vectors: int) -> Tensor:
    """Return the starting vectors ``[n, D]``: the rows of the text's tokens, each serving an equal run of vectors.

    Vector i copies token floor(i * tokens / n), as webui does; more tokens than vectors are cut. An empty
    text starts from zeros (webui), which trains, as the encoder adds positions.
    """
    table = text_embeddings(model.text_encoder).token_embedding.weight.detach().float()
    if not text.strip():
        return torch.zeros(num_vectors, table.shape[1])
    ids = model.tokenizer(text, add_special_tokens=False).input_ids[:num_vectors]
    if not ids:
        raise RecipeError(f"method.initializer_token: {text!r} has no token in this model's vocabulary")
    rows = [ids[i * len(ids) // num_vectors] for i in range(num_vectors)]
    return table[torch.tensor(rows)].clone()
