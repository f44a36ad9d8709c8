"""Recognises the variant of Stable Diffusion (1.x, 2.x, SDXL) from a model's configs, and rejects unsupported ones."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from dreamfleet.datasets.errors import ModelError
from dreamfleet.trainers.models.formats.ldm_names import OTHER_CHANNELS, Config, Family, family_of

TITLES: dict[Family, str] = {"sd1": "Stable Diffusion 1", "sd2": "Stable Diffusion 2", "sdxl": "SDXL"}
_TRAINED = "methods train Stable Diffusion 1.x, 2.x and SDXL base"
_AESTHETIC = (
    "Aesthetic Gradients are for Stable Diffusion 1.x, whose text encoder is a whole CLIP's; the U-Nets of 2.x and XL "
    "read another layer"
)
#: Methods and export formats that a variant does not support, each with the reason.
UNSUPPORTED: dict[Family, dict[str, str]] = {
    "sd1": {},
    "sd2": {"aesthetic_gradients": _AESTHETIC},
    "sdxl": {"aesthetic_gradients": _AESTHETIC, "optim": "the webui does not train SDXL"},
}


def require_supported(configs: Mapping[str, Config], name: str) -> Family:
    """Return the variant that the configs of a model's parts describe.

    Raises ModelError for models that cannot be trained or sampled from: inpainting, depth, SDXL's refiner, and others
    whose U-Net has additional inputs. The message names the kind of model.
    """
    unet, vae = configs.get("unet", {}), configs.get("vae", {})
    entering, latents = unet.get("in_channels", 4), vae.get("latent_channels", unet.get("out_channels", 4))
    if entering != latents:
        kind = OTHER_CHANNELS.get(entering, "not a text-to-image model")
        raise ModelError(
            f"{name}: {kind}: its U-Net takes {entering} channels and its VAE gives {latents}; {_TRAINED}"
        )
    family = family_of(configs)
    if family == "sdxl" and "text_encoder" not in configs:
        # SDXL's refiner has only the second text encoder, and an aesthetic score as an input.
        raise ModelError(f"{name}: SDXL's refiner, which has no first text encoder; {_TRAINED}")
    inputs = {unet.get("class_embed_type"), unet.get("addition_embed_type")} - {None, "text_time"}
    if inputs:
        raise ModelError(
            f"{name}: a U-Net with inputs besides the prompt ({', '.join(map(str, inputs))}); {_TRAINED}"
        )
    return family


def parts_needed(family: Family, needs: Collection[str]) -> list[str]:
    """Return the parts that the components in ``needs`` consist of: the denoiser is ``unet``, SDXL has two encoders."""
    names = {
        "denoiser": ["unet"],
        "text_encoder": ["text_encoder", "text_encoder_2"][: 1 + (family == "sdxl")],
    }
    return [part for component in needs for part in names.get(component, [component])]
