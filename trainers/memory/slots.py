"""Predicts how many trainings fit in one process that shares one copy of the frozen model: the slots of a pack.

A packed pass holds the frozen parts once; each slot adds its trainable parameters, optimizer states, EMA, gradients and
the activations of its own images, all of which are kept until the backward pass of the whole pack.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, replace
from typing import Any

from dreamfleet.trainers.distributed.context import DistributedContext
from dreamfleet.trainers.memory.engine_selection import host_memory, limit_card
from dreamfleet.trainers.memory.estimate import CUDA_CONTEXT, HOST_PROCESS, KERNEL_WORKSPACE, estimate
from dreamfleet.trainers.memory.inputs import Counts, Pass
from dreamfleet.trainers.memory.profile import count_images, count_run, method_shape, trace_passes
from dreamfleet.trainers.memory.strategies import CHOICES
from dreamfleet.trainers.recipe import Recipe

log = logging.getLogger(__name__)

#: Slots of a process with ``scaling.slots_per_worker: auto``, by type of device: more hardly gain speed.
MAX_SLOTS = {"cuda": 32, "cpu": 8}


@dataclass(frozen=True)
class SlotMemory:
    """Memory of one device or host in bytes, as a function of the number of slots.

    ``shared``: once per process. ``held``: each slot, at all times. ``first``: the first slot's part of a packed pass;
    ``further``: that of every further slot. ``alone``: the most that one slot needs beside its ``held`` while the
    others wait, for example to generate previews; ``waiting``: what a slot holds beside ``held`` during that time.
    """

    shared: int
    held: int
    first: int = 0
    further: int = 0
    alone: int = 0
    waiting: int = 0

    def total(self, slots: int) -> int:
        """Return the maximum over a pack's phases with ``slots`` slots, at least 1."""
        packed = self.first + (slots - 1) * self.further
        return self.shared + slots * self.held + max(packed, self.alone + (slots - 1) * self.waiting)


@dataclass(frozen=True)
class SlotProfile:
    """Memory of a pack in bytes: on a GPU, on the host of a GPU, and on a host that trains on its CPU."""

    gpu: SlotMemory
    gpu_host: SlotMemory
    cpu: SlotMemory

    def to_json(self) -> dict[str, Any]:
        """Return the profile as plain values."""
        return asdict(self)


def slots_that_fit(profile: SlotMemory, memory: int, limit: int) -> int:
    """Return the largest number of slots, up to ``limit``, that fit ``memory`` bytes; 0 if not even one fits."""
    return max((slots for slots in range(1, limit + 1) if profile.total(slots) <= memory), default=0)


def profile_slots(recipe: Recipe, counts: Counts | None = None) -> SlotProfile:
    """Return the memory profile of a pack whose slots are all like ``recipe``. Loads no weights.

    ``counts``: those of :func:`count_run` for this recipe, if known. Raises UserError for a method or a model whose
    memory cannot be planned.
    """
    method = method_shape(recipe)
    counts = counts or count_run(recipe, method, count_images(recipe, method))
    train = recipe.train
    doubled = recipe.model_copy(
        update={"train": train.model_copy(update={"train_batch_size": 2 * train.train_batch_size})}
    )
    return combine(counts, *trace_passes(doubled, method))


def combine(counts: Counts, full: Pass, half: Pass) -> SlotProfile:
    """Return the profile of slots with these counts; ``full`` and ``half`` are passes of twice the batch."""
    one = estimate(counts, CHOICES[0])
    two = estimate(replace(counts, full=full, half=half), CHOICES[0])
    lines, gradients = one.gpu, one.gpu["gradients"]
    held = sum(lines[name] for name in ("weights", "optimizer", "average", "text_embeddings"))
    first = lines["activations"] + gradients
    # Twice the batch of one slot has the gradients and low-precision copies of one slot's weights, not of two.
    further = two.gpu["activations"] - lines["activations"] + gradients + counts.full.casts
    copied = sum(lines[name] for name in ("weights", "optimizer", "average"))  # by HostCopy, for a checkpoint
    if counts.kind.average is not None and not counts.average:
        copied += 4 * counts.total  # the optimizer's average is computed for it
    outside = CUDA_CONTEXT + KERNEL_WORKSPACE
    resting = outside + lines["frozen"] + held
    alone = max(size for name, size in one.gpu_moments.items() if name != "training") - resting
    waiting = gradients if counts.accumulates else 0
    on_gpu = SlotMemory(outside + lines["frozen"], held, first, further, alone, waiting)
    return SlotProfile(
        gpu=on_gpu,
        gpu_host=SlotMemory(HOST_PROCESS, counts.latents + copied, first=counts.model),
        cpu=replace(on_gpu, shared=HOST_PROCESS + lines["frozen"], held=held + counts.latents + copied),
    )


_profiles: dict[str, SlotProfile] = {}  # a pool asks before it starts a runner, which asks for its first task


def _profile_once(recipe: Recipe) -> SlotProfile:
    """Return :func:`profile_slots`, computed once for recipes that differ in images, prompts, seed and length only."""
    same = {"method", "model", "engine", "optimizer"}
    sizes = {"resolution", "enable_bucket", "max_bucket_reso", "alpha_mask"}
    train = recipe.train.model_dump_json(exclude={"seed", "max_train_steps", "num_train_epochs"})
    key = f"{recipe.model_dump_json(include=same)} {train} {recipe.data.model_dump_json(include=sizes)}"
    if key not in _profiles:
        _profiles.clear()
        _profiles[key] = profile_slots(recipe)
    return _profiles[key]


def choose_slots(
    recipe: Recipe, distributed: DistributedContext, *, host_share: float = 1.0, limit: int | None = None
) -> int:
    """Return the number of slots for a process on this device: ``scaling.slots_per_worker``, or what its memory holds.

    ``host_share``: the part of this machine's memory that the process may use. ``limit``: the most slots that are
    useful; None: those of MAX_SLOTS. A pack whose memory cannot be planned gets the most slots on a GPU, where running
    out of memory halves the pack, and one on a CPU, where it would end the process.
    """
    device = distributed.device
    most = MAX_SLOTS["cuda" if device.type == "cuda" else "cpu"]
    wanted = recipe.scaling.slots_per_worker
    if wanted != "auto":
        return wanted if limit is None else min(wanted, limit)
    limit = most if limit is None else limit
    if limit <= 1:
        return 1
    try:
        profile = _profile_once(recipe)
    except Exception as error:  # noqa: BLE001 - also an operator of another package without a fake kernel
        fallback = limit if device.type == "cuda" else 1
        why = str(error).strip().partition("\n")[0]
        log.warning("the memory of packed trainings is not known (%s); %d in one process", why, fallback)
        return fallback
    host = int(host_share * host_memory())
    if device.type != "cuda":
        return max(1, slots_that_fit(profile.cpu, host, limit))
    card = limit_card(device, recipe.engine.gpu_limit, distributed.gpu_share)
    return max(
        1, min(slots_that_fit(profile.gpu, card, limit), slots_that_fit(profile.gpu_host, host, limit))
    )
