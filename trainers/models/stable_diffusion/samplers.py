"""The samplers of Stable Diffusion: diffusers' schedulers with the settings that the webui gives them."""

from __future__ import annotations

from typing import Any


def make_sampler(name: str, config: Any) -> Any:
    """Return the sampler ``name`` (``ddim``, ``euler_a``, ``dpm++``) on a noise schedule with this config."""
    if name == "ddim":
        from diffusers.schedulers.scheduling_ddim import DDIMScheduler

        return DDIMScheduler.from_config(config)
    # The webui's other samplers space their steps evenly from the first timestep to the last, or by Karras' rule
    # between the two, whatever a model's config says. Zero terminal SNR needs the last timestep, and no step near it.
    zero_snr = config.get("rescale_betas_zero_snr", False)
    spacing = "trailing" if zero_snr else "linspace"
    if name == "euler_a":
        from diffusers.schedulers.scheduling_euler_ancestral_discrete import EulerAncestralDiscreteScheduler

        return EulerAncestralDiscreteScheduler.from_config(config, timestep_spacing=spacing)
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

    return DPMSolverMultistepScheduler.from_config(
        config, algorithm_type="dpmsolver++", use_karras_sigmas=not zero_snr, timestep_spacing=spacing
    )
