"""Builds the error message if no engine choice fits: what each needs, and which settings need less."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dreamfleet.trainers.memory.estimate import Estimate
from dreamfleet.trainers.memory.strategies import format_overrides

if TYPE_CHECKING:
    from dreamfleet.trainers.memory.plan import MemoryPlan
    from dreamfleet.trainers.recipe import Recipe


def explain_no_fit(made: MemoryPlan, recipe: Recipe) -> str:
    """Return the message: the limits, settings that may help, and the memory that each choice needs."""
    smallest = min((one for one in made.estimates if not one.choice.alters), key=lambda one: one.gpu_total)
    limits = [
        f"{_gib(limit)} GiB {where}"
        for limit, where in ((made.gpu_memory, "per GPU"), (made.host_memory, "per host"))
        if limit is not None
    ]
    needs = "; ".join(
        f"{one.choice.name} {_gib(one.gpu_total)} GiB on the GPU and {_gib(one.host_total)} GiB on the host"
        for one in made.estimates
    )
    return (
        f"no engine choice fits {' and '.join(limits)}: {smallest.choice.name}, which needs the least GPU memory, "
        "takes "
        f"{_gib(smallest.gpu_total)} GiB on the GPU and {_gib(smallest.host_total)} GiB on the host. Possible "
        "remedies: "
        f"{', '.join(_remedies(smallest, made, recipe))}. Memory of each choice: {needs}"
    )


def _remedies(smallest: Estimate, made: MemoryPlan, recipe: Recipe) -> list[str]:
    """Return the settings that would lower the peak memory of a run, except those that the recipe has."""
    train, moment = recipe.train, smallest.peak
    altering = [
        one for one in made.estimates if one.choice.alters and one.fits(made.gpu_memory, made.host_memory)
    ]
    remedies = {
        **{f"{format_overrides(one.choice)} ({one.choice.name}, which fits)": True for one in altering[:1]},
        "train.mixed_precision=bf16": train.mixed_precision == "no",
        "train.gradient_checkpointing=true": moment == "training" and not train.gradient_checkpointing,
        "train.train_batch_size=1": moment == "training" and train.train_batch_size > 1,
        "data.cache_latents=false (several images are encoded at once)": moment == "starting"
        and recipe.data.cache_latents,
        "method.sample_batch_size=1": moment == "starting"
        and getattr(recipe.method, "with_prior_preservation", False),
        "validation.num_images=1": moment == "previews" and recipe.validation.num_images > 1,
        "engine.use_ema=false": recipe.engine.use_ema,
        "engine.nvme_path, a folder on a fast local disk, for what does not fit in host memory": any(
            one.fits(made.gpu_memory, None) for one in made.estimates if not one.choice.alters
        )
        and not made.counts.nvme,
        f"data.resolution below {recipe.data.resolution}": True,
        "more workers": made.world == 1,
    }
    return [remedy for remedy, applies in remedies.items() if applies]


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f}"
