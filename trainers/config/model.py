"""The ``model:`` section of a recipe."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BeforeValidator, Field

from dreamfleet.datasets.config_base import Section
from dreamfleet.datasets.path_field import PathField

POCKET = "pocket"
HUB_MODEL = PathField("model", hub=True, names=(POCKET,))


def _read_parameterization(value: Any) -> Any:
    # kohya's v_parameterization is a boolean.
    return ("v_prediction" if value else None) if isinstance(value, bool) else value


class ModelConfig(Section):
    """The ``model:`` section: the base model and how it is used."""

    pretrained_model_name_or_path: Annotated[str, HUB_MODEL] = Field(
        POCKET,
        validation_alias=AliasChoices("pretrained_model_name_or_path", "name_or_path", "model_path"),
        description="`pocket`, a diffusers folder, a hub name, a `.safetensors` or `.ckpt` file; folders and files "
        "also in a bucket",
    )
    revision: str | None = Field(None, description="branch, tag or commit of a hub name")
    variant: str | None = Field(None, description="such as `fp16`, for folders with several variants")
    pretrained_vae_model_name_or_path: Annotated[str | None, HUB_MODEL] = Field(
        None,
        validation_alias=AliasChoices("pretrained_vae_model_name_or_path", "vae"),
        description="a VAE that replaces the model's own",
    )
    clip_skip: int = Field(
        1,
        ge=1,
        le=12,
        description="layer of the text encoder that is used: 1 = the family's own, 2 = the one before. The family's "
        "own "
        "is the last layer in SD 1.x, the second to last in SD 2.x and SDXL",
    )
    max_token_length: Literal[75, 150, 225] = Field(
        75,
        description="tokens of a prompt; 150 and 225 are encoded in chunks of 75, whose outputs are concatenated",
    )
    prediction_type: Annotated[
        Literal["epsilon", "v_prediction", "sample"] | None, BeforeValidator(_read_parameterization)
    ] = Field(
        None,
        validation_alias=AliasChoices("prediction_type", "v_parameterization"),
        description="what the U-Net predicts; default: the model's own",
    )
    rescale_betas_zero_snr: bool = Field(
        False,
        validation_alias=AliasChoices("rescale_betas_zero_snr", "zero_terminal_snr"),
        description="zero signal-to-noise ratio at the last timestep (Lin et al. 2023), for truly dark and bright "
        "images; "
        "needs v_prediction",
    )
