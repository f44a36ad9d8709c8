"""The base ``method:`` section of the methods that train the weights of the model (DreamBooth, native training)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AliasChoices, BeforeValidator, Field, model_validator

from dreamfleet.datasets.config_base import split_text
from dreamfleet.trainers.config.engine import EngineConfig
from dreamfleet.trainers.config.engines import engine_name, engine_spec
from dreamfleet.trainers.config.layer_rates import LayerRates
from dreamfleet.trainers.config.method import MethodConfig, SearchSpace

_HIDDEN_DROPOUTS = ("neuron_dropout", "rank_dropout", "module_dropout")
_LOKR_KEYS = ("lokr_factor", "lokr_decompose_both", "lokr_full_matrix")
_LORA_ONLY = ("use_dora", "lora_dropout", "neuron_dropout", "rank_dropout", "scale_weight_norms")
_TARGET_SETS = ("all-linear", "locon")


def _read_targets(value: Any) -> Any:
    return value if value in _TARGET_SETS else split_text(value)


class WeightsConfig(MethodConfig):
    """What is trained: the weights of the model, or a LoRA of some layers."""

    artifacts: ClassVar[tuple[str, ...]] = ("checkpoint", "lora")
    search_spaces: ClassVar[Mapping[str, SearchSpace]] = {
        "dreambooth and native, all weights": {
            "optimizer.learning_rate": {"distribution": "loguniform", "lower": 5e-7, "upper": 2e-4},
            "optimizer.lr_scheduler": {"distribution": "choice", "values": ["constant", "cosine"]},
        },
        "dreambooth and native, LoRA": {
            "optimizer.learning_rate": {"distribution": "loguniform", "lower": 1e-5, "upper": 2e-3},
            "method.lora_rank": {"distribution": "choice", "values": [4, 8, 16, 32]},
        },
    }
    packs: ClassVar[bool] = True

    train_text_encoder: bool = Field(False, description="also train the text encoder (both of SDXL)")
    lora_rank: int | None = Field(
        None,
        ge=1,
        validation_alias=AliasChoices("lora_rank", "rank", "network_dim"),
        description="train a LoRA of this rank, usually 4 to 128, instead of the full weights; a file of megabytes",
    )
    lora_type: Literal["lora", "lokr", "loha"] = Field(
        "lora",
        validation_alias=AliasChoices("lora_type", "algo"),
        description="`lokr` and `loha`: LyCORIS's Kronecker and Hadamard products of factors of this rank instead of a "
        "LoRA's two matrices; for kohya's scripts, ComfyUI and the webui",
    )
    lokr_factor: int | None = Field(
        None,
        validation_alias=AliasChoices("lokr_factor", "factor"),
        description="LoKr: largest size of the smaller factor; default, and -1: the nearest to a square root",
    )
    lokr_decompose_both: bool = Field(
        False,
        validation_alias=AliasChoices("lokr_decompose_both", "decompose_both"),
        description="LoKr: the smaller factor has the rank too, where that is less",
    )
    lokr_full_matrix: bool = Field(
        False,
        validation_alias=AliasChoices("lokr_full_matrix", "full_matrix"),
        description="LoKr: the larger factor is a whole matrix; a rank of half its size or more does the same",
    )
    lora_alpha: float | None = Field(
        None,
        gt=0,
        validation_alias=AliasChoices("lora_alpha", "network_alpha"),
        description="the LoRA is scaled by lora_alpha / lora_rank; default: the rank, as in diffusers",
    )
    lora_dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        validation_alias=AliasChoices("lora_dropout", "network_dropout"),
        description="dropout probability of a layer's input to its LoRA",
    )
    use_dora: bool = Field(
        False,
        validation_alias=AliasChoices("use_dora", "dora_wd"),
        description="train a DoRA (Liu et al. 2024): a LoRA of the weights' directions, and their lengths; slower; "
        "for diffusers; merge it into the model for other programs",
    )
    neuron_dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="dropout probability of the numbers between a LoRA's matrices: network_dropout of kohya's scripts, "
        "whose place is another than lora_dropout's",
    )
    rank_dropout: float = Field(
        0.0, ge=0, lt=1, description="probability of leaving out a rank of a LoRA for an image"
    )
    module_dropout: float = Field(
        0.0, ge=0, lt=1, description="probability of leaving out the LoRA of a layer for a batch"
    )
    scale_weight_norms: float | None = Field(
        None,
        gt=0,
        description="largest norm of a LoRA's change of a layer; after each step larger ones are scaled down; kohya "
        "suggests 1",
    )
    lora_target_modules: (
        Annotated[
            Literal["all-linear", "locon"] | Annotated[tuple[str, ...], Field(min_length=1)],
            BeforeValidator(_read_targets),
        ]
        | None
    ) = Field(
        None,
        description="layers that get a LoRA: the ends of their names, or a set. Default: attention's to_q, to_k, to_v, "
        "to_out.0 (text encoder: q_proj, k_proj, v_proj, out_proj). all-linear: every linear layer and 1 x 1 "
        "convolution of the blocks; locon: all convolutions as well. Layers outside the blocks (conv_in, conv_out, "
        "time_embedding, add_embedding) must be named, because other programs ignore them",
    )

    @property
    def search_space(self) -> SearchSpace:
        """The space of a search without one, for all weights or for a LoRA."""
        weights, lora = self.search_spaces.values()
        return weights if self.lora_rank is None else lora

    @model_validator(mode="after")
    def _check_lora(self) -> Self:
        keys = (
            "lora_alpha",
            "lora_dropout",
            "lora_target_modules",
            "use_dora",
            *_HIDDEN_DROPOUTS,
            "scale_weight_norms",
            *_LOKR_KEYS,
        )
        given = [key for key in keys if getattr(self, key)]
        given += ["lora_type"] if self.lora_type != "lora" else []
        if given and self.lora_rank is None:
            raise ValueError(
                f"{given[0]} needs lora_rank, such as 8; without it the full weights are trained"
            )
        self._check_type()
        inside = [key for key in (*_HIDDEN_DROPOUTS, "scale_weight_norms") if getattr(self, key)]
        if self.use_dora and inside:
            raise ValueError(
                f"use_dora cannot be combined with {inside[0]}: the length of a weight depends on its whole LoRA; use "
                "lora_dropout, or a LoRA"
            )
        return self

    def _check_type(self) -> None:
        """Raise ValueError for options that the kind of LoRA does not have."""
        if self.lora_type != "lokr" and (given := [key for key in _LOKR_KEYS if getattr(self, key)]):
            raise ValueError(f"{given[0]} is an option of lora_type: lokr")
        if self.lokr_factor is not None and self.lokr_factor < 1 and self.lokr_factor != -1:
            raise ValueError(f"lokr_factor must be -1 or at least 1 (got {self.lokr_factor})")
        without = [key for key in _LORA_ONLY if getattr(self, key)]
        if self.lora_type != "lora" and without:
            raise ValueError(
                f"{without[0]} is for a LoRA's two matrices, which lora_type: {self.lora_type} does not have; leave it "
                "out (module_dropout works), or train a LoRA"
            )

    @property
    def unpackable(self) -> str | None:
        if self.lora_rank is None:
            return "without lora_rank trains the model itself"
        if self.use_dora:
            return "with use_dora scales the frozen weights"
        if self.lora_type != "lora":
            return f"with lora_type: {self.lora_type} has no two matrices, which a pack multiplies at once"
        used = [key for key in _HIDDEN_DROPOUTS if getattr(self, key)]
        if used:
            return f"with {used[0]} changes a LoRA between its matrices, which a pack multiplies at once"
        return super().unpackable

    def refused_by_engine(self, engine: EngineConfig) -> str | None:
        if self.scale_weight_norms is not None and engine_name(engine) != "torch":
            return (
                f"method.scale_weight_norms: {engine_spec(engine).setting(engine)} shards the weights, which then "
                "cannot be scaled between steps; leave it out, or train with plain torch (engine.name: torch)"
            )
        if self.use_dora and engine.zero_stage == 3:
            return "method.use_dora reads whole weights, which engine.zero_stage: 3 shards; use zero_stage: 2"
        if self.lora_type != "lora" and engine.zero_stage == 3:
            return (
                f"method.lora_type: {self.lora_type} reads its factors outside a layer's forward pass, where "
                "engine.zero_stage: 3 has sharded them; use zero_stage: 2"
            )
        return None

    @property
    def has_dropout(self) -> bool:
        return any(getattr(self, key) for key in ("lora_dropout", *_HIDDEN_DROPOUTS))


class WholeModelConfig(LayerRates, WeightsConfig):  # pydantic lists the keys of the last base class first
    """Options shared by the methods that train the weights of the model, directly or with a LoRA."""

    @model_validator(mode="after")
    def _check_ratios(self) -> Self:
        ratios = [key for key in type(self).model_fields if key.startswith("loraplus") and getattr(self, key)]
        if ratios and self.lora_rank is None:
            raise ValueError(f"{ratios[0]} needs lora_rank, such as 8; without it there are no up matrices")
        if ratios and self.lora_type != "lora":
            raise ValueError(
                f"{ratios[0]} is for the up matrices of a LoRA; lora_type: {self.lora_type} has none"
            )
        return self
