"""Sampler names, dreamfleet's and the webui's."""

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
    """Return dreamfleet's name of a sampler, given that or the webui's. Raises UserError for an unknown one."""
    if (known := _ALIASES.get(name.strip().lower())) is None:
        raise UserError(
            f"sampler {name!r} does not exist (known: ddim, euler_a, dpm++; the webui's DDIM, Euler a, "
            "DPM++ 2M Karras)"
        )
    return known
