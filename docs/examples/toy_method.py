"""A method from outside the package: Textual Inversion that penalises distance from the initial vector."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from dreamfleet.datasets.errors import RecipeError
from dreamfleet.trainers.config.method import METHODS, MethodConfig
from dreamfleet.trainers.methods.base import Batch, Loss, Sample, Setting
from dreamfleet.trainers.methods.diffusion_method import DenoiserInputs, DiffusionMethod
from dreamfleet.trainers.methods.embedding_common import export_word, initial_vectors, word_parameters
from dreamfleet.trainers.methods.export_request import Export
from dreamfleet.trainers.models.embeddings import install_embedding
from dreamfleet.trainers.models.family import DiffusionModel
from dreamfleet.trainers.optim.param_group import ParamGroup


class AnchoredInversionConfig(MethodConfig):
    """The ``method:`` section: its keys, and the properties that commands read without loading the method."""

    implementation: ClassVar[str] = f"{__name__}:AnchoredInversion"
    summary: ClassVar[str] = (
        "Trains one vector for a new word, kept near an existing word. Exports an embedding."
    )
    artifacts: ClassVar[tuple[str, ...]] = ("embedding",)
    packs: ClassVar[bool] = True  # several trainings can share the passes of one model
    name: Literal["anchored_inversion"] = "anchored_inversion"
    placeholder_token: str = Field(min_length=1, description="the new word, as prompts use it")
    initializer_token: str = Field(min_length=1, description="the existing word that the vector starts from")
    anchor_weight: float = Field(
        0.01, ge=0, description="weight of the squared distance from the existing word"
    )


class AnchoredInversion(DiffusionMethod):
    """Adds ``anchor_weight`` times the squared distance from the initial vector to the denoising loss."""

    formats = ("pt", "safetensors")

    def __init__(self, config: AnchoredInversionConfig, model: DiffusionModel, setting: Setting):
        super().__init__(config, model, setting)
        start = initial_vectors(model, config.initializer_token, num_vectors=1)
        self._vectors = word_parameters(self, "vectors", start)  # one for each text encoder
        self._start = [vector.detach().clone() for vector in start]
        install_embedding(model, config.placeholder_token, *self._vectors.values())

    @property
    def trains_text(self) -> bool:
        return True

    def groups(self) -> list[ParamGroup]:
        return [ParamGroup("embedding", dict(self._vectors))]

    def check_prompts(self, samples: Sequence[Sample], data: Any) -> str | None:
        word = self.config.placeholder_token
        for concept in self.setting.concepts:
            if word not in (concept.instance_prompt or ""):
                raise RecipeError(
                    f"data.instance_prompt: {concept.instance_prompt!r} lacks {word!r}, which is to be trained"
                )
        return None

    def loss(self, batch: Batch, inputs: DenoiserInputs, predicted: Tensor) -> Loss:
        loss = super().loss(batch, inputs, predicted)
        pairs = zip(self._vectors.values(), self._start, strict=True)
        distance = sum((vector - start.to(vector)).square().sum() for vector, start in pairs)
        total = loss.total + self.config.anchor_weight * distance
        return Loss(total, loss.per_sample, {**loss.extras, "anchor_distance": distance.detach()})

    def write(self, order: Export) -> list[Path]:
        return export_word(
            list(self._vectors.values()), order, word=self.config.placeholder_token, model=self.model
        )


if __name__ == "__main__":  # in a script or a notebook; an installed package uses an entry point instead
    METHODS.register("anchored_inversion")(AnchoredInversionConfig)
