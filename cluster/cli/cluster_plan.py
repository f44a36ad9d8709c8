"""The text of `plan --cluster`: a recipe's steps, checkpoints and failures on a described cluster."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from dreamfleet.trainers.config.units import format_size

if TYPE_CHECKING:
    from dreamfleet.trainers.scale.plan import ClusterPlan, Prediction

STEP_HEADINGS = ("sent per GPU", "sending", "not hidden", "step", "images/s", "efficiency")


def cluster_lines(plan: ClusterPlan) -> list[str]:
    """Return the lines that describe a plan, with the assumptions behind its figures."""
    cluster, costs = plan.cluster, plan.costs
    inside = cluster.gpu.bus if cluster.bus is None else cluster.bus
    nodes = f"{cluster.nodes} node{'s' * (cluster.nodes > 1)} of {min(cluster.gpus, cluster.per_node)}"
    computes = (
        f"{cluster.utilisation:.0%} of the data sheet's {cluster.gpu.flops / 1e12:g} TFLOP/s"
        if cluster.step is None
        else "as given by step="
    )
    interval = f"every {plan.recipe_interval} steps" if plan.recipe_interval else "only the last"
    first = plan.engines[0]
    head = (
        f"Cluster: {cluster.gpus} {cluster.gpu.name}, {nodes}; {cluster.link * 8 / 1e9:g} Gb/s per node, "
        f"{inside / 1e9:g} GB/s inside"
    )
    step_note = (
        f"A GPU computes {_seconds(first.step.compute)} of each step, {computes}. Messages are sent during "
        f"{cluster.overlap:.0%} of\nthe backward pass (ZeRO-3: of both passes); the updated weights of ZeRO-1 and 2 "
        "after it."
    )
    recovery_note = (
        f"A checkpoint of {format_size(plan.checkpoint_bytes)} stops training for {_seconds(costs.save)} and is "
        f"complete {_seconds(costs.background)} later. A node fails every {_seconds(cluster.mtbf)}, any of\nthem "
        f"every {_seconds(cluster.failure_interval)}: torch continues {_seconds(costs.regroup)} later and repeats no "
        f"step, ZeRO {_seconds(costs.restart)} later from its last checkpoint. Effective:\nseconds of steps that "
        "counted over seconds of the run. docs/scale.md has the model."
    )
    recovery = ("engine", "best interval", "in steps", "effective", f"effective, {interval}", "whole run")
    growth = [
        (
            str(one.gpus),
            *_step_cells(one),
            _seconds(cluster.of(one.gpus).failure_interval),
            _share(one.share),
        )
        for one in plan.growth
    ]
    return [
        head,
        "",
        *_table([("engine", *STEP_HEADINGS), *((one.engine, *_step_cells(one)) for one in plan.engines)]),
        step_note,
        "",
        *_table([recovery, *((one.engine, *_recovery_cells(one)) for one in plan.engines)]),
        recovery_note,
        "",
        f"{first.engine} on other numbers of GPUs, with equal batches per GPU:",
        *_table([("GPUs", *STEP_HEADINGS, "failure every", "effective"), *growth]),
        "",
    ]


def _step_cells(one: Prediction) -> tuple[str, ...]:
    step = one.step
    return (
        format_size(round(step.sent)),
        _seconds(step.communication),
        _seconds(step.exposed),
        _seconds(step.seconds),
        f"{step.images_per_second:.3g}" if step.images_per_second < 100 else f"{step.images_per_second:,.0f}",
        _share(step.efficiency),
    )


def _recovery_cells(one: Prediction) -> tuple[str, ...]:
    steps = "-" if math.isinf(one.chosen_steps) else f"{max(1, one.chosen_steps):,.0f}"
    return (
        _seconds(one.chosen_interval),
        steps,
        _share(one.share),
        _share(one.recipe_share),
        _seconds(one.wall),
    )


def _share(value: float) -> str:
    return f"{value:.2%}" if value > 0.99 else f"{value:.1%}"


def _seconds(value: float) -> str:
    """Return a time in the unit that shows it well."""
    if math.isinf(value):
        return "never"
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60), ("s", 1), ("ms", 1e-3)):
        if value >= 2 * size or (unit in ("s", "ms") and value >= size):
            return f"{value / size:.3g} {unit}"
    return f"{value * 1e6:.0f} us"


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    return [
        "  "
        + "  ".join(
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
