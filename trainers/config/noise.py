"""The keys of the ``train:`` section that shape the noise and choose the timesteps."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import AfterValidator, AliasChoices, BeforeValidator, Field, model_validator

from dreamfleet.datasets.config_base import Section
from dreamfleet.datasets.registry import EntryName, Registry

#: Distributions of timesteps by name, ``f(rng, low, high, options) -> timestep`` from ``low`` (less noise) to before
#: ``high``; an installed package adds one through the entry-point group ``dreamfleet.timestep_samplings``.
TIMESTEP_SAMPLINGS: Registry[Any] = Registry(
    "timestep sampling",
    group="dreamfleet.timestep_samplings",
    builtin={
        name: f"dreamfleet.trainers.models.timesteps:{function}"
        for name, function in {
            "uniform": "uniform",
            "logit_normal": "logit_normal",
            "cosmap": "cosmap",
            "earlier": "biased_earlier",
            "later": "biased_later",
            "range": "biased_range",
        }.items()
    },
)
_OTHER_NAMES = {"none": "uniform", "cos_map": "cosmap"}


def _read_name(value: Any) -> Any:
    name = value.lower().replace("-", "_") if isinstance(value, str) else value
    return "uniform" if name is None else _OTHER_NAMES.get(name, name)


class NoiseConfig(Section):
    """How noise and timesteps are drawn. Every draw is keyed by (seed, epoch, sample)."""

    noise_offset: float = Field(
        0.0,
        ge=0,
        validation_alias=AliasChoices("noise_offset", "offset_noise"),
        description="noise added per image and channel, about 0.05 for darker and brighter images",
    )
    noise_offset_random_strength: bool = Field(
        False, description="multiply noise_offset by a random number between 0 and 1 for each image"
    )
    multires_noise_iterations: int = Field(
        0, ge=0, description="lower resolutions of noise that are added, usually 6 to 10; 0: none"
    )
    multires_noise_discount: float = Field(
        0.3, ge=0, le=1, description="strength of each lower resolution relative to the one above"
    )
    ip_noise_gamma: float = Field(
        0.0,
        ge=0,
        validation_alias=AliasChoices("ip_noise_gamma", "input_perturbation"),
        description="noise added to the denoiser's input but not to its target (Ning et al. 2023); the paper uses 0.1",
    )
    ip_noise_gamma_random_strength: bool = Field(
        False, description="multiply ip_noise_gamma by a random number between 0 and 1 for each image"
    )
    min_timestep: int | None = Field(
        None, ge=0, description="lowest timestep that is trained, 0 has the least noise; default: 0"
    )
    max_timestep: int | None = Field(
        None,
        ge=1,
        description="number above the highest timestep that is trained; default: all, usually 1000",
    )
    timestep_sampling: Annotated[
        str, BeforeValidator(_read_name), AfterValidator(EntryName(TIMESTEP_SAMPLINGS, loads=False))
    ] = Field(
        "uniform",
        validation_alias=AliasChoices("timestep_sampling", "timestep_bias_strategy", "timestep_distribution"),
        description="distribution of the timesteps between min_timestep and max_timestep: `logit_normal` and `cosmap` "
        "as for Stable Diffusion 3 (Esser et al. 2024), `earlier`, `later` and `range` as diffusers' "
        "timestep_bias_strategy (earlier: less noise)",
    )
    logit_mean: float = Field(
        0.0, description="mean of logit_normal before the sigmoid; above 0: more often the noisier timesteps"
    )
    logit_std: float = Field(1.0, gt=0, description="standard deviation of logit_normal before the sigmoid")
    timestep_bias_multiplier: float = Field(
        1.0, gt=0, description="how much more often earlier, later and range draw the timesteps they prefer"
    )
    timestep_bias_portion: float = Field(
        0.25, gt=0, le=1, description="share of the timesteps that earlier and later prefer"
    )
    timestep_bias_begin: int = Field(0, ge=0, description="first timestep that range prefers")
    timestep_bias_end: int = Field(
        1000, ge=1, description="number above the last timestep that range prefers"
    )

    @property
    def chooses_timesteps(self) -> bool:
        """Whether timesteps are drawn in another way than the model family's own."""
        limits = self.min_timestep, self.max_timestep
        return self.timestep_sampling != "uniform" or limits != (None, None)

    @model_validator(mode="after")
    def _check_timesteps(self) -> Self:
        for low, high in (("min_timestep", "max_timestep"), ("timestep_bias_begin", "timestep_bias_end")):
            first, end = getattr(self, low) or 0, getattr(self, high)
            if end is not None and first >= end:
                raise ValueError(f"{low}: {first} and {high}: {end} leave no timestep; {low} must be lower")
        return self
