"""Names of the samplers: ours and the webui's."""

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
    """Return a sampler's name, `ddim`, `euler_a` or `dpm++`, given that or its name in the webui.

    Raises UserError for an unknown sampler.
    """
    if (known := _ALIASES.get(name.strip().lower())) is None:
        raise UserError(
            f"sampler {name!r} does not exist; known: ddim, euler_a and dpm++, or by the webui's names DDIM, "
            "Euler a and DPM++ 2M Karras."
        )
    return known
