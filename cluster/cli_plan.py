"""The command that tells memory before a run: plan."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from dreamfleet.cluster.cli_base import AsJson, Overrides, RecipePath, Verbose, print_json, work

if TYPE_CHECKING:
    from dreamfleet.trainers.memory import Estimate
    from dreamfleet.trainers.plan_memory import MemoryPlan
    from dreamfleet.trainers.recipe import Recipe

# Columns of the table: heading, and which of an estimate's lines it adds up.
COLUMNS = {
    "weights": ("weights", "gathered", "master"),
    "frozen": ("frozen",),
    "gradients": ("gradients",),
    "optimizer": ("optimizer",),
    "EMA": ("average",),
    "activations": ("activations",),
    "buffers": ("buffers", "text_embeddings"),
    "CUDA": ("context", "workspace"),
}


def plan(
    recipe: RecipePath,
    overrides: Overrides = None,
    gpu_memory: Annotated[
        str | None,
        typer.Option(help="Memory of one GPU, such as 12GiB; chooses the engine.", show_default=False),
    ] = None,
    host_memory: Annotated[
        str | None, typer.Option(help="Memory of one machine, such as 64GiB.", show_default=False)
    ] = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Estimate memory per GPU and host for every engine, and choose.

    From the model's configs alone: no weights are read, nothing is downloaded. Exit code 2 when no engine fits.
    """
    with work():
        from dreamfleet.datasets.errors import ResourceError
        from dreamfleet.trainers.memory import parse_size
        from dreamfleet.trainers.plan_memory import plan_memory
        from dreamfleet.trainers.recipe import load_recipe

        limits = {
            "gpu_memory": parse_size(gpu_memory, option="--gpu-memory") if gpu_memory else None,
            "host_memory": parse_size(host_memory, option="--host-memory") if host_memory else None,
        }
        loaded = load_recipe(recipe, overrides or [])
        made = plan_memory(loaded, **limits)
    if as_json:
        print_json(made.to_json())
    else:
        print("\n".join([*_head(made, loaded), "", *_table(made), "", *_verdict(made)]))
    if made.limited and made.chosen is None:
        raise ResourceError(_nothing_fits(made, loaded))


def _head(made: MemoryPlan, recipe: Recipe) -> list[str]:
    train = recipe.train
    parts = ", ".join(f"{name} {_millions(number)}" for name, number in made.parameters.items())
    settings = [
        f"{recipe.data.resolution} px",
        f"batch {train.train_batch_size}",
        f"precision {train.mixed_precision}",
        "gradient checkpointing" if train.gradient_checkpointing else "no gradient checkpointing",
        f"{made.world} worker{'s' * (made.world > 1)}, {made.workers_per_host} a host",
        "no pictures found to count" if made.pictures is None else f"{made.pictures} pictures",
    ]
    return [
        f"{recipe.method.name}: {_millions(made.counts.total)} parameters learn; {parts}",
        ", ".join(settings),
    ]


def _table(made: MemoryPlan) -> list[str]:
    headings = ["engine", "GPU", *COLUMNS, "host", "GPU's peak", *(["fits"] if made.limited else [])]
    rows = [headings, *[_row(one, made) for one in made.estimates]]
    widths = [max(len(row[place]) for row in rows) for place in range(len(headings))]
    lines = [
        "  ".join(
            cell.rjust(width) if rows[1][place][:1].isdigit() else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    marks = ["  "] + ["> " if one is made.chosen else "  " for one in made.estimates]
    return [mark + line for mark, line in zip(marks, lines, strict=True)]


def _row(one: Estimate, made: MemoryPlan) -> list[str]:
    cells = [one.choice.name, _gib(one.gpu_total)]
    cells += [_gib(sum(one.gpu[line] for line in lines)) for lines in COLUMNS.values()]
    fits = ["yes" if one.fits(made.gpu_memory, made.host_memory) else "no"] if made.limited else []
    return [*cells, _gib(one.host_total), one.peak, *fits]


def _verdict(made: MemoryPlan) -> list[str]:
    note = (
        "In GiB. GPU and host: the most at any moment of a run; the columns between add up to a training step.\n"
        "CUDA's share, and Python's on the host, are assumed; the rest is counted."
    )
    if not made.limited:
        return [note, "Give --gpu-memory (and --host-memory) to choose."]
    if made.chosen is None:
        return [note]
    choice = made.chosen.choice
    settings = {
        "engine.zero_stage": "auto" if choice.zero_stage is None else choice.zero_stage,
        "engine.offload_optimizer_device": "cpu" if choice.offload_optimizer else "none",
        "engine.offload_param_device": "cpu" if choice.offload_param else "none",
    }
    told = " ".join(f"{key}={value}" for key, value in settings.items() if value != "none")
    return [note, f"Cheapest that fits: {choice.name} ({told})"]


def _nothing_fits(made: MemoryPlan, recipe: Recipe) -> str:
    smallest = min(made.estimates, key=lambda one: one.gpu_total)
    limits = [
        f"{_gib(limit)} GiB {where}"
        for limit, where in ((made.gpu_memory, "per GPU"), (made.host_memory, "per host"))
        if limit is not None
    ]
    return (
        f"no engine choice fits {' and '.join(limits)}: the smallest on the GPU, {smallest.choice.name}, needs "
        f"{_gib(smallest.gpu_total)} GiB there and {_gib(smallest.host_total)} GiB on the host; what may help: "
        f"{', '.join(_ways_out(smallest, made, recipe))}"
    )


def _ways_out(smallest: Estimate, made: MemoryPlan, recipe: Recipe) -> list[str]:
    """List the settings that would lower the highest moment of a run, of those not made yet."""
    train, moment = recipe.train, smallest.peak
    ways = {
        "train.mixed_precision=bf16": train.mixed_precision == "no",
        "train.gradient_checkpointing=true": moment == "training" and not train.gradient_checkpointing,
        "train.train_batch_size=1": moment == "training" and train.train_batch_size > 1,
        "data.cache_latents=false (several pictures are encoded at once)": moment == "starting"
        and recipe.data.cache_latents,
        "method.sample_batch_size=1": moment == "starting"
        and getattr(recipe.method, "with_prior_preservation", False),
        "validation.num_images=1": moment == "previews" and recipe.validation.num_images > 1,
        "engine.use_ema=false": recipe.engine.use_ema,
        f"data.resolution below {recipe.data.resolution}": True,
        "more workers": made.world == 1,
    }
    return [way for way, is_open in ways.items() if is_open]


def _millions(number: int) -> str:
    return f"{number / 1e6:.1f} M" if number >= 50_000 else str(number)


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f}"
