"""The samplers of Stable Diffusion: diffusers' schedulers with the webui's settings."""

from __future__ import annotations

from typing import Any


def make_sampler(name: str, config: Any) -> Any:
    """Return the sampler ``name`` (``ddim``, ``euler_a``, ``dpm++``) for a noise schedule's ``config``."""
    if name == "ddim":
        from diffusers.schedulers.scheduling_ddim import DDIMScheduler

        return DDIMScheduler.from_config(config)
    # Whatever the model's config says, the webui's other samplers space their steps evenly from the first timestep to
    # the last, or by Karras' rule between them. With zero terminal SNR they must start at the last timestep, without
    # another step close to it.
    zero_snr = config.get("rescale_betas_zero_snr", False)
    spacing = "trailing" if zero_snr else "linspace"
    if name == "euler_a":
        from diffusers.schedulers.scheduling_euler_ancestral_discrete import EulerAncestralDiscreteScheduler

        return EulerAncestralDiscreteScheduler.from_config(config, timestep_spacing=spacing)
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

    return DPMSolverMultistepScheduler.from_config(
        config, algorithm_type="dpmsolver++", use_karras_sigmas=not zero_snr, timestep_spacing=spacing
    )
