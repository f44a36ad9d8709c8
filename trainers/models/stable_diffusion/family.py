"""Which family of Stable Diffusion a model is, told from the configs of its parts, and which ones no method trains."""

from __future__ import annotations

from collections.abc import Mapping

from dreamfleet.datasets.errors import ModelError
from dreamfleet.trainers.models.formats.ldm_names import OTHER_CHANNELS, Config, family_of

Configs = Mapping[str, Config]

TITLES = {"sd1": "Stable Diffusion 1", "sd2": "Stable Diffusion 2", "sdxl": "SDXL"}
TRAINED = "methods train Stable Diffusion 1.x, 2.x and SDXL base"


def is_sdxl(configs: Configs) -> bool:
    """Say whether a model is SDXL, whose U-Net is told a summary of the prompt and sizes."""
    return family_of(configs) == "sdxl"


def refuse_other_families(configs: Configs, name: str) -> None:
    """Raise ModelError, calling the family by its name, for a model that methods cannot train or draw with.

    ``configs``: of the parts that are there, by name.
    """
    unet, vae = configs.get("unet", {}), configs.get("vae", {})
    entering, latents = unet.get("in_channels", 4), vae.get("latent_channels", unet.get("out_channels", 4))
    if entering != latents:
        kind = OTHER_CHANNELS.get(entering, "not a text-to-image model")
        raise ModelError(
            f"{name}: {kind}: its U-Net takes {entering} channels and its VAE gives {latents}; {TRAINED}"
        )
    if is_sdxl(configs) and "text_encoder" not in configs:
        # SDXL's refiner has the second encoder alone, and is told an aesthetic score.
        raise ModelError(f"{name}: SDXL's refiner, which has no first text encoder; {TRAINED}")
    told = {unet.get("class_embed_type"), unet.get("addition_embed_type")} - {None, "text_time"}
    if told:
        raise ModelError(
            f"{name}: a U-Net that is told more than a prompt ({', '.join(map(str, told))}); {TRAINED}"
        )
