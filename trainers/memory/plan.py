"""Plans the memory of a run: counts sizes on a model without weights and estimates every engine choice."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from dreamfleet.trainers.memory.estimate import Estimate, cheapest_fit, estimate_all
from dreamfleet.trainers.memory.inputs import Counts
from dreamfleet.trainers.memory.profile import count_images, count_run, method_shape, parts_of
from dreamfleet.trainers.models.pretrained import quiet_libraries
from dreamfleet.trainers.recipe import Recipe


@dataclass(frozen=True)
class MemoryPlan:
    """The memory of a run under every engine choice, and the cheapest that fits.

    ``parameters``: elements by model part. ``pictures``: number of images, None if the recipe's folders cannot be read.
    ``chosen``: None if no limit is given or nothing fits.
    """

    parameters: dict[str, int]
    counts: Counts
    pictures: int | None
    world: int
    workers_per_host: int
    gpu_memory: int | None
    host_memory: int | None
    estimates: list[Estimate]
    chosen: Estimate | None

    @property
    def limited(self) -> bool:
        """Whether there is a limit to choose within."""
        return self.gpu_memory is not None or self.host_memory is not None

    def to_json(self, pcie: float) -> dict[str, Any]:
        """Return the plan as plain values, sizes in bytes; ``pcie`` is in bytes per second."""
        plain = asdict(self) | {"pcie_bytes_per_second": pcie}
        plain["counts"] |= {"learning": self.counts.total, "learning_tensors": len(self.counts.learning)}
        plain["counts"]["optimizer_bytes"] = self.counts.states
        for key in ("shapes", "options"):
            del plain["counts"][key]
        plain["chosen"] = self.chosen.choice.name if self.chosen else None
        for entry, one in zip(plain["estimates"], self.estimates, strict=True):
            entry |= {"gpu_total": one.gpu_total, "host_total": one.host_total}
            entry["traffic"]["seconds"] = one.traffic_seconds(pcie)
            entry["choice"] |= {"alters": one.choice.alters, "settings": one.choice.settings}
            entry["fits"] = one.fits(self.gpu_memory, self.host_memory)
        return plain


def plan_memory(
    recipe: Recipe,
    *,
    gpu_memory: int | None = None,
    host_memory: int | None = None,
    world: int | None = None,
    workers_per_host: int | None = None,
) -> MemoryPlan:
    """Estimate every engine choice for a recipe on GPUs, and choose the cheapest within the limits in bytes.

    ``world`` and ``workers_per_host`` default to the recipe's ``scaling:``; of a range of
    workers, to the smallest number, with which a worker needs the most memory. Loads no weights and downloads nothing.
    Raises ModelError for a model whose shape is unknown, RecipeError for a resolution that it cannot compute, UserError
    for a method or engine that cannot be planned.
    """
    quiet_libraries()
    method = method_shape(recipe)
    images = count_images(recipe, method)
    counts = count_run(recipe, method, images)
    world = world or recipe.scaling.min_workers
    units = max(world, recipe.scaling.max_workers) * recipe.train.gradient_accumulation_steps
    counts = replace(counts, micros=-(-units // world))
    together = recipe.scaling.placement_strategy == "STRICT_PACK"
    per_host = workers_per_host or (world if together else 1)
    estimates = estimate_all(counts, world=world, workers_per_host=per_host)
    limits = {"gpu_memory": gpu_memory, "host_memory": host_memory}
    return MemoryPlan(
        parameters={
            name: sum(p.numel() for p in part.parameters()) for name, part in parts_of(method).items()
        },
        counts=counts,
        pictures=images,
        world=world,
        workers_per_host=per_host,
        **limits,
        estimates=estimates,
        chosen=cheapest_fit(estimates, **limits) if any(limits.values()) else None,
    )
