"""Selects the engine of a run from the memory of its workers' GPUs and hosts, and limits its GPU memory."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import torch

from dreamfleet.datasets.errors import ResourceError, UserError
from dreamfleet.trainers.distributed.context import DistributedContext
from dreamfleet.trainers.distributed.device import with_index
from dreamfleet.trainers.memory.estimate import CUDA_CONTEXT, GIB
from dreamfleet.trainers.recipe import Recipe

log = logging.getLogger(__name__)
CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def settle_engine(recipe: Recipe, distributed: DistributedContext) -> tuple[Recipe, str]:
    """Return the recipe with the engine selected, and the reason; both are equal on every worker.

    ``engine.zero_stage: auto`` becomes the cheapest choice that fits the smallest of the workers' GPUs and
    hosts; on a CPU it remains plain torch. ``engine.gpu_memory`` is enforced. Raises ResourceError if no
    choice fits.
    """
    recipe = distributed.on_rank_0(recipe.with_deepspeed_file)
    if distributed.device.type != "cuda":
        return recipe, "no GPU" if recipe.engine.is_auto else "set in the recipe"
    if recipe.train.full_bf16:
        _require_equal_gpus(distributed)
    limit = recipe.engine.gpu_limit
    card = distributed.on_every_rank(lambda: limit_card(distributed.device, limit, distributed.gpu_share))
    if not recipe.engine.is_auto:
        return recipe, "set in the recipe"
    if distributed.world > 1 and distributed.gpu_share < 1:
        return recipe, "workers share a GPU, so the training state cannot be sharded"
    return choose_engine(
        recipe,
        distributed,
        gpu_memory=distributed.all_gather_unique([card])[0],
        host_memory=distributed.all_gather_unique([host_memory()])[0],
    )


def _require_equal_gpus(distributed: DistributedContext) -> None:
    """Raise ResourceError if the workers' GPUs differ: they would round bfloat16 replicas differently."""
    # CUDA's random numbers depend on the number of multiprocessors.
    names = distributed.all_gather_unique([torch.cuda.get_device_name(distributed.device)])
    if len(names) > 1:
        raise ResourceError(
            f"train.full_bf16 uses stochastic rounding, whose random numbers differ between GPU models "
            f"({', '.join(names)}); use workers with the same GPU model, or set full_bf16: false"
        )


def choose_engine(
    recipe: Recipe, distributed: DistributedContext, *, gpu_memory: int, host_memory: int
) -> tuple[Recipe, str]:
    """Choose the engine on rank 0 for all ranks; return the recipe and the reason.

    Memory limits are in bytes. A run whose memory cannot be planned uses plain torch. Raises
    ResourceError if no choice fits.
    """
    if (reason := recipe.method.no_plan) is not None:
        return recipe, f"not planned: {recipe.method.name} {reason}"
    # The engine must not change with the number of workers of the moment.
    world = recipe.scaling.min_workers if recipe.scaling.is_elastic else distributed.world
    settings, reason = distributed.on_rank_0(lambda: _decide(recipe, world, gpu_memory, host_memory))
    if distributed.is_main:
        log.info("engine: %s", reason)
    update = {key.removeprefix("engine."): value for key, value in settings.items()}
    return recipe.model_copy(update={"engine": recipe.engine.model_copy(update=update)}), reason


def _decide(
    recipe: Recipe, world: int, gpu_memory: int, host_memory: int
) -> tuple[dict[str, str | int | bool], str]:
    from dreamfleet.trainers.memory.advice import explain_no_fit
    from dreamfleet.trainers.memory.plan import plan_memory

    per_host = min(world, int(os.environ.get("LOCAL_WORLD_SIZE", world)))
    try:
        made = plan_memory(
            recipe, gpu_memory=gpu_memory, host_memory=host_memory, world=world, workers_per_host=per_host
        )
    except UserError as error:
        return {}, f"not planned: {error}"
    except Exception as error:  # noqa: BLE001 - a fault of the planner's, such as an operator without a fake kernel
        why = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        log.warning("the memory of this run cannot be planned (%s); it uses plain torch", why)
        return {}, f"not planned: {why}"
    if made.chosen is None:
        raise ResourceError(f"engine.zero_stage: auto: {explain_no_fit(made, recipe)}")
    chosen, larger = made.chosen, made.estimates[: made.estimates.index(made.chosen)]
    reason = (
        f"{chosen.choice.name} needs {chosen.gpu_total / GIB:.1f} of {gpu_memory / GIB:.1f} GiB on the GPU and "
        f"{chosen.host_total / GIB:.1f} of {host_memory / GIB:.1f} GiB on the host"
    )
    if larger:
        reason += f"; {larger[0].choice.name} would need {larger[0].gpu_total / GIB:.1f} GiB on the GPU"
    return chosen.choice.settings, reason


def limit_card(device: torch.device, limit: int | None, share: float = 1.0) -> int:
    """Limit torch's memory on a GPU and return the limit in bytes, CUDA context included.

    The limit is the smaller of ``limit`` in bytes (None: no limit) and ``share`` of the GPU's memory. Raises
    ResourceError if the CUDA context alone exceeds it.
    """
    device = with_index(device)
    free, total = torch.cuda.mem_get_info(device)
    allowed = min(total, total if limit is None else limit, round(share * total))
    if allowed <= CUDA_CONTEXT:
        whose = "engine.gpu_memory" if limit == allowed else f"{share:g} of a GPU"
        raise ResourceError(
            f"{whose}: {allowed / GIB:.1f} GiB is less than the CUDA context alone uses; give more"
        )
    # Set in any case: torch keeps the limit of an earlier run in this process.
    fraction = (allowed - CUDA_CONTEXT) / total if allowed < total else 1.0
    torch.cuda.set_per_process_memory_fraction(fraction, device)
    return min(allowed, free + CUDA_CONTEXT)  # mem_get_info created the context, which the plan counts


def host_memory() -> int:
    """Return the memory in bytes of this machine, or the limit of the container that the process runs in."""
    sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for file in map(Path, CGROUP_LIMITS):
        text = file.read_text().strip() if file.is_file() else ""
        if text.isdigit():  # else "max"
            sizes.append(int(text))
    return min(sizes)
