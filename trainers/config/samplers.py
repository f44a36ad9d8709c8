"""The names of the samplers, in recipes and in the webui."""

from __future__ import annotations

from dreamfleet.datasets.errors import UserError

_ALIASES = {
    "ddim": "ddim",
    "euler a": "euler_a",
    "euler_a": "euler_a",
    "euler ancestral": "euler_a",
    "dpm++": "dpm++",
    "dpm++ 2m": "dpm++",
    "dpm++ 2m karras": "dpm++",
}


def plain_sampler(name: str) -> str:
    """Return a sampler's name in recipes (`ddim`, `euler_a` or `dpm++`), given this name or the webui's.

    Raises UserError for an unknown sampler.
    """
    if (known := _ALIASES.get(name.strip().lower())) is None:
        raise UserError(
            f"sampler {name!r} does not exist; known: ddim, euler_a and dpm++, or by the webui's names DDIM, "
            "Euler a and DPM++ 2M Karras."
        )
    return known
