"""The command `plan`: estimates the memory of a run before it starts."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dreamfleet.cluster.cli.base import AsJson, Overrides, RecipePath, Verbose, print_json, work
from dreamfleet.cluster.cli.cluster_plan import cluster_lines
from dreamfleet.trainers.config.units import format_size
from dreamfleet.trainers.memory.strategies import format_overrides

if TYPE_CHECKING:
    from dreamfleet.trainers.memory.estimate import Estimate
    from dreamfleet.trainers.memory.plan import MemoryPlan
    from dreamfleet.trainers.memory.slots import SlotProfile
    from dreamfleet.trainers.recipe import Recipe

# Columns of the table: heading -> the parts of an estimate that it sums.
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
        typer.Option(
            help="Memory of one GPU, such as 12GiB; the cheapest engine that fits is chosen.",
            show_default=False,
        ),
    ] = None,
    host_memory: Annotated[
        str | None, typer.Option(help="Memory of one machine, such as 64GiB.", show_default=False)
    ] = None,
    pcie: Annotated[
        str,
        typer.Option(
            help="Transfer rate between GPU and host in each direction; default: PCIe 4 x16 in practice."
        ),
    ] = "25GB/s",
    cluster: Annotated[
        str | None,
        typer.Option(
            help="Also predict steps, checkpoints and failures on a cluster, such as 64xH100@400Gb; "
            "docs/scale.md lists the further settings (per_node=8,mtbf=150d,step=0.4s,...).",
            show_default=False,
        ),
    ] = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Estimate the memory per GPU and host for every engine, and choose one.

    Uses the model's configs alone: no weights are read or downloaded. Exit code 2 if no engine fits. A disk of this
    machine that is too small is only a warning here: a planned run often starts elsewhere.
    """
    with work():
        from dreamfleet.datasets.errors import ResourceError
        from dreamfleet.trainers.config.packing import find_unpackable
        from dreamfleet.trainers.config.units import parse_size
        from dreamfleet.trainers.memory.advice import explain_no_fit
        from dreamfleet.trainers.memory.plan import plan_memory
        from dreamfleet.trainers.memory.slots import profile_slots
        from dreamfleet.trainers.recipe import load_recipe
        from dreamfleet.trainers.run.disk import disk_needs, require_disk
        from dreamfleet.trainers.scale.cluster import parse_cluster
        from dreamfleet.trainers.scale.plan import plan_cluster

        limits = {
            "gpu_memory": parse_size(gpu_memory, option="--gpu-memory") if gpu_memory else None,
            "host_memory": parse_size(host_memory, option="--host-memory") if host_memory else None,
        }
        rate = parse_size(pcie.removesuffix("/s"), option="--pcie")
        described = parse_cluster(cluster) if cluster else None
        loaded = load_recipe(recipe, overrides or [])
        made = plan_memory(loaded, **limits)
        unpackable = find_unpackable(loaded)
        profile = None if unpackable else profile_slots(loaded, made.counts)
        needs = disk_needs(loaded)
        scaled = plan_cluster(loaded, described, made) if described else None
    if as_json:
        slots = {"unpackable": unpackable, **(_fitting_slots(profile, made) if profile else {})}
        disk = {name: need.to_json() for name, need in needs.items()}
        whole = made.to_json(rate) | {"slots": slots, "disk": disk}
        print_json(whole | ({"cluster": scaled.to_json()} if scaled else {}))
    else:
        print("\n".join([*_head(made, loaded), "", *_table(made, rate), "", *_verdict(made, rate), ""]))
        print("\n".join(_packing(profile, unpackable, made)))
        if scaled:
            print("\n".join(["", *cluster_lines(scaled)]))
    for name, need in needs.items():
        try:
            stated = require_disk(need, loaded, what=f"a {name}")
        except ResourceError as error:
            print(f"Warning: {error}", file=sys.stderr)
            continue
        if not as_json:
            print(f"On disk, {stated}.")
    if made.limited and made.chosen is None:
        raise ResourceError(explain_no_fit(made, loaded))


def _head(made: MemoryPlan, recipe: Recipe) -> list[str]:
    train = recipe.train
    parts = ", ".join(f"{name} {_millions(number)}" for name, number in made.parameters.items())
    settings = [
        f"{recipe.data.resolution} px",
        f"batch {train.train_batch_size}",
        f"precision {train.mixed_precision}",
        "gradient checkpointing" if train.gradient_checkpointing else "no gradient checkpointing",
        f"{made.world} worker{'s' * (made.world > 1)}, {made.workers_per_host} per host"
        + f" (the smallest of {recipe.scaling.words})" * recipe.scaling.is_elastic,
        "no images found to count" if made.pictures is None else f"{made.pictures} images",
    ]
    return [
        f"{recipe.method.name}: {_millions(made.counts.total)} trainable parameters; {parts}",
        ", ".join(settings),
    ]


def _table(made: MemoryPlan, rate: int) -> list[str]:
    headings = ["engine", "GPU", *COLUMNS, "host", "PCIe per step", "GPU's peak"]
    headings += ["fits"] if made.limited else []
    rows = [headings, *[_row(one, made, rate) for one in made.estimates]]
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


def _row(one: Estimate, made: MemoryPlan, rate: int) -> list[str]:
    cells = [one.choice.name, _gib(one.gpu_total)]
    cells += [_gib(sum(one.gpu[line] for line in lines)) for lines in COLUMNS.values()]
    fits = ["yes" if one.fits(made.gpu_memory, made.host_memory) else "no"] if made.limited else []
    sent = sum(one.traffic.values())
    crossing = f"{_gib(sent)}, {one.traffic_seconds(rate):.2f} s" if sent else "0.0"
    return [*cells, _gib(one.host_total), crossing, one.peak, *fits]


def _verdict(made: MemoryPlan, rate: int) -> list[str]:
    note = (
        "In GiB. GPU and host: the peak of a run; the columns between sum to a training step.\n"
        "CUDA's memory, and Python's on the host, are assumed; the rest is computed. PCIe: bytes that offloading "
        "transfers "
        f"in a step, in both\ndirections, and the least time for that at {rate / 1e9:g} GB/s each way (--pcie)."
    )
    notes = [note]
    if any(one.choice.alters for one in made.estimates):
        notes.append(
            "The last rows change the training: fused backward cannot clip (optimizer.max_grad_norm: 0); Adafactor and "
            "bf16 weights\ngive other results."
        )
    notes += [
        f"{one.choice.name} reads and writes {_gib(one.disk)} GiB on the disk in each step; it needs engine.nvme_path."
        for one in made.estimates
        if one.disk
    ]
    if not made.limited:
        return [*notes, "Give --gpu-memory (and --host-memory) to choose an engine."]
    for one in made.estimates:
        if one is made.chosen:
            notes.append(f"Cheapest that fits: {one.choice.name} ({format_overrides(one.choice)})")
    return notes + [
        f"Also fits, without offloading: {one.choice.name} ({format_overrides(one.choice)})"
        for one in made.estimates
        if one.choice.alters and one.fits(made.gpu_memory, made.host_memory) and not _is_plain(made.chosen)
    ]


def _fitting_slots(profile: SlotProfile, made: MemoryPlan) -> dict[str, Any]:
    """Return the profile as plain values, with the slots that fit the limits: None without a limit."""
    from dreamfleet.trainers.memory.slots import MAX_SLOTS, slots_that_fit

    limits = {
        "gpu": (made.gpu_memory, MAX_SLOTS["cuda"]),
        "gpu_host": (made.host_memory, MAX_SLOTS["cuda"]),
        "cpu": (made.host_memory, MAX_SLOTS["cpu"]),
    }
    return {
        name: {
            **asdict(memory := getattr(profile, name)),
            "fit": slots_that_fit(memory, limit, most) if limit else None,
        }
        for name, (limit, most) in limits.items()
    }


def _packing(profile: SlotProfile | None, unpackable: str | None, made: MemoryPlan) -> list[str]:
    """Return what is said about trainings that share a process, in a search or a fleet."""
    if profile is None:
        return [f"Trainings of a search or a fleet cannot be packed: {unpackable}."]
    on_gpu, fits = profile.gpu, _fitting_slots(profile, made)
    further = on_gpu.held + on_gpu.further
    sizes = f"{format_size(on_gpu.total(1))} on the GPU for the first, {format_size(further)} for each further one"
    lines = [f"Packed trainings of a search or a fleet: {sizes}."]
    numbers = [fits[name]["fit"] for name in ("gpu", "gpu_host") if fits[name]["fit"] is not None]
    if numbers and made.gpu_memory:
        lines.append(f"{min(numbers)} fit on the GPU (scaling.slots_per_worker: auto takes at most 32).")
    if made.host_memory:
        lines.append(f"On a CPU {fits['cpu']['fit']} fit in the host's memory (auto takes at most 8).")
    return lines


def _is_plain(chosen: Estimate | None) -> bool:
    return chosen is not None and chosen.choice.engine == "torch"


def _millions(number: int) -> str:
    return f"{number / 1e6:.1f} M" if number >= 50_000 else str(number)


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f}"
