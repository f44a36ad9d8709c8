"""The samplers' names, ours and the webui's."""

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
    """Give our name of a sampler, `ddim`, `euler_a` or `dpm++`, also called as in the webui. Raises UserError."""
    if (known := _ALIASES.get(name.strip().lower())) is None:
        raise UserError(
            f"no sampler is called {name!r}; there are ddim, euler_a and dpm++, or as the webui calls them DDIM, "
            "Euler a and DPM++ 2M Karras."
        )
    return known
