"""The base ``method:`` section of the methods that train the weights of the model (DreamBooth, native training)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AliasChoices, BeforeValidator, Field, model_validator

from dreamfleet.trainers.config.method import MethodConfig, SearchSpace

_TARGET_SETS = ("all-linear", "locon")


def _split(value: Any) -> Any:
    if isinstance(value, str) and value not in _TARGET_SETS:
        return [part.strip() for part in value.split(",")]
    return value


class WholeModelConfig(MethodConfig):
    """Options shared by the methods that train the weights of the model, directly or with a LoRA."""

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
    lora_target_modules: (
        Annotated[
            Literal["all-linear", "locon"] | Annotated[tuple[str, ...], Field(min_length=1)],
            BeforeValidator(_split),
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
        given = [key for key in ("lora_alpha", "lora_dropout", "lora_target_modules") if getattr(self, key)]
        if given and self.lora_rank is None:
            raise ValueError(
                f"{given[0]} needs lora_rank, such as 8; without it the full weights are trained"
            )
        return self

    @property
    def unpackable(self) -> str | None:
        return "without lora_rank trains the model itself" if self.lora_rank is None else super().unpackable

    @property
    def has_dropout(self) -> bool:
        return self.lora_dropout > 0
