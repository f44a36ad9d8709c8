"""Estimates the memory of a run per GPU and per host for every engine choice, from counted sizes.

Sources: Rajbhandari et al. 2020 (ZeRO, arXiv 1910.02054), section 3; DeepSpeed 0.19's ``stage_1_and_2.py`` and
``stage3.py`` for copies and buffers that the paper does not count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dreamfleet.trainers.config.deepspeed import SWAPPED_GROUP
from dreamfleet.trainers.engines.gradient_exchange import BUCKET_BYTES, IN_FLIGHT
from dreamfleet.trainers.memory.inputs import Counts
from dreamfleet.trainers.memory.strategies import ALTERING, CHOICES, NVME_CHOICES, EngineChoice

GIB = 2**30
# Assumed, not counted: what a process uses before its first tensor. On the GPU: the CUDA context with the kernels of
# torch, cuBLAS and cuDNN. On the host: Python with torch, diffusers and Ray (0.5 GiB) and CUDA's libraries.
CUDA_CONTEXT = GIB // 2
KERNEL_WORKSPACE = GIB // 4
HOST_PROCESS = 3 * GIB // 2

# DeepSpeed's defaults, in elements: stage 3 keeps gathered weights that are used again within REUSE_DISTANCE and
# fetches PREFETCH_BUCKET ahead; stage 0 sends gradients in buckets of REDUCE_BUCKET.
REUSE_DISTANCE, PREFETCH_BUCKET, REDUCE_BUCKET = 1_000_000_000, 50_000_000, 500_000_000
# Bytes per element besides state and gradient while bfloat16 weights are stepped: float32 copies of weight and
# gradient; then what the optimizer needs, at least as much as the random bits of the rounding.
NARROW_COPIES, ROUNDING_BITS = 8, 4


@dataclass(frozen=True)
class Estimate:
    """The memory of one engine choice in bytes: items of a training step, and totals of each phase of a run.

    ``gpu`` and ``host``: one worker's items while it trains. ``gpu_moments``: totals of one GPU by phase.
    ``host_moments``: totals of rank 0's host with all its workers, by phase. ``traffic``: bytes per step that
    offload moves over PCIe. ``disk``: bytes per step that it reads and writes on an NVMe disk.
    """

    choice: EngineChoice
    gpu: dict[str, int]
    gpu_moments: dict[str, int]
    host: dict[str, int]
    host_moments: dict[str, int]
    traffic: dict[str, int]
    disk: int = 0

    @property
    def gpu_total(self) -> int:
        """The maximum on a GPU over all phases."""
        return max(self.gpu_moments.values())

    @property
    def peak(self) -> str:
        """The phase in which a GPU uses the most memory."""
        return max(self.gpu_moments, key=lambda name: self.gpu_moments[name])

    @property
    def host_total(self) -> int:
        """The maximum on a host over all phases."""
        return max(self.host_moments.values())

    def traffic_seconds(self, bytes_per_second: float) -> float:
        """Return the minimum time of a step's traffic in seconds; both directions run at once."""
        return max(self.traffic.values()) / bytes_per_second

    def fits(self, gpu_memory: int | None, host_memory: int | None) -> bool:
        """Return whether the choice stays within both limits in bytes (None: no limit)."""
        return (gpu_memory is None or self.gpu_total <= gpu_memory) and (
            host_memory is None or self.host_total <= host_memory
        )


def estimate_all(counts: Counts, *, world: int = 1, workers_per_host: int = 1) -> list[Estimate]:
    """Estimate every choice that these counts allow, cheapest first, then those that change the training.

    ZeRO supports optimizers with ``moments``, float32 weights and optimizer steps after the backward pass. The
    choices that change the training need one GPU and no gradient accumulation.
    """
    choices = [CHOICES[0]]
    if counts.kind.moments and not counts.fused and not counts.bf16_weights:
        sharded = [*CHOICES[1:], *(NVME_CHOICES if counts.nvme else ())]
        choices += [one for one in sharded if counts.kind.offloads or not one.offload_optimizer]
    if world == 1 and not counts.accumulates:
        # bf16 weights were traced only where the recipe computes in 16 bits.
        allowed = [choice for choice in ALTERING if counts.mixed or not choice.bf16_weights]
        if not counts.kind.steps_alone:
            allowed = [choice for choice in allowed if choice.optimizer is not None]
        choices += [choice for choice in allowed if counts.under(choice) != counts]
    return [estimate(counts, choice, world=world, workers_per_host=workers_per_host) for choice in choices]


def cheapest_fit(
    estimates: Sequence[Estimate], *, gpu_memory: int | None, host_memory: int | None = None
) -> Estimate | None:
    """Return the first estimate of :func:`estimate_all` that fits and does not change the training, or None."""
    fitting = (one for one in estimates if one.fits(gpu_memory, host_memory))
    return next((one for one in fitting if not one.choice.alters), None)


def estimate(counts: Counts, choice: EngineChoice, *, world: int = 1, workers_per_host: int = 1) -> Estimate:
    """Estimate one choice for ``world`` workers with one GPU each."""
    counts = counts.under(choice)
    run = _Run(counts, choice, world)
    gpu, host, total = run.gpu_lines(), run.host_lines(), run.total
    passing = gpu["activations"] + gpu["gradients"] + gpu["buffers"]
    resting = sum(gpu.values()) - passing
    idle = resting + (gpu["gradients"] + gpu["buffers"] if run.keeps_gradients else 0)
    # For previews, averaged weights are copied beside the model's own. Stage 3 exchanges them in place, and
    # torch uses the average itself if it has the dtype of the weights.
    copies_average = counts.average and run.stage != 3 and (not run.is_torch or counts.bf16_weights)
    # An optimizer's own average is computed for each preview, and for each checkpoint.
    computed = 0 if counts.average or counts.kind.average is None else 4 * total
    # For a checkpoint, rank 0 gathers ZeRO's states unsharded. Torch's are copied into buffers, which stay for the next
    # one, and the weights are copied once more to be written.
    saved = (
        run.copied() + run.width * total if run.is_torch else (4 + run.moments + 4 * counts.average) * total
    )
    training = workers_per_host * sum(host.values())
    exported = 0 if run.is_torch else 4 * total + (run.stage == 3) * run.width * counts.passed
    return Estimate(
        choice,
        gpu,
        {
            "starting": CUDA_CONTEXT + KERNEL_WORKSPACE + gpu["frozen"] + run.starting(),
            "training": resting + passing,
            "optimizer step": resting + gpu["gradients"] + run.step_buffers(),
            "saving": idle + computed if computed else 0,
            "previews": (
                idle + copies_average * run.width * total + computed + counts.drawing if counts.drawing else 0
            ),
        },
        host,
        {
            "starting": workers_per_host * (host["process"] + counts.model),
            "training": training,
            "saving": training + saved,
            "exporting": training + exported,
        },
        run.traffic(),
        # Weights, moments and gradients are read; gradients were written before, the others are written back.
        (16 + 2 * run.moments) * run.part if choice.nvme else 0,
    )


class _Run:
    """A run's counts under one choice, for ``world`` workers."""

    def __init__(self, counts: Counts, choice: EngineChoice, world: int):
        self.counts, self.choice, self.world = counts, choice, world
        self.is_torch, self.stage = choice.zero_stage is None, choice.zero_stage or 0
        self.total, self.largest = counts.total, max(counts.learning)
        self.part = self._part(self.total)  # trained elements per worker
        self.sharded = self.total + (counts.passed if self.stage == 3 else 0)
        # Bytes of a weight that the model computes with: ZeRO's half-precision modes keep 16 bits.
        self.width = 2 if counts.bf16_weights or (counts.mixed and self.stage) else 4
        self.moments = 4 * len(counts.kind.moments)  # bytes per element of the states that ZeRO shards
        self.keeps_gradients = self.stage == 3  # which allocates gradients and buffers once

    def gpu_lines(self) -> dict[str, int]:
        """Return the bytes on a GPU in a training step."""
        counts, choice, width = self.counts, self.choice, self.width
        weights, gathered, frozen = width * self.total, 0, counts.frozen
        if self.stage == 3:
            weights = 0 if choice.offload_param else width * self._part(self.sharded)
            frozen -= width * counts.passed
            if choice.offload_param or self.world > 1:  # one worker computes with its own weights
                gathered = width * min(self.sharded, REUSE_DISTANCE // 2 + PREFETCH_BUCKET)
        optimizer, master = counts.states, 0
        if self.stage:
            on_gpu = 0 if choice.offload_optimizer else self.part
            # DeepSpeed steps a float32 copy of the weights, even if the weights are float32.
            master, optimizer = 4 * on_gpu, self.moments * on_gpu
        step = counts.half if width == 2 else counts.full
        buffers = width * min(counts.bucket, self.total) if self.stage else 0
        if choice.offload_optimizer and self.stage < 3:
            buffers += width * self.largest
        if (
            self.is_torch and self.world > 1
        ):  # gradients on their way to other workers, and the sums of this one's part
            sent = 2 * (IN_FLIGHT + 1) * max(BUCKET_BYTES, width * self.largest)
            buffers += min(2 * width * self.total, sent) + width * self.part
        if counts.fused:  # one gradient at a time
            gradients = width * self.largest
            together = step.activations + gradients
            buffers += self._torch_step()
        else:
            # The part of the gradients that stays on this GPU until the step.
            share = 1.0 if self.stage < 2 else 0.0 if choice.offload_optimizer else 1 / self.world
            gradients = round(share * width * self.total)
            accumulates = counts.accumulates or self.keeps_gradients
            together = step.peak(width * self.total, share, accumulates=accumulates)
        averaged = counts.average and not choice.offload_optimizer
        return {
            "weights": weights,
            "gathered": gathered,
            "master": master,
            "frozen": frozen,
            "gradients": gradients,
            "optimizer": optimizer,
            "average": averaged * 4 * (self.part if self.stage else self.total),
            "activations": together - gradients,
            "buffers": buffers,
            "text_embeddings": counts.text_embeddings,
            "context": CUDA_CONTEXT,
            "workspace": KERNEL_WORKSPACE,
        }

    def host_lines(self) -> dict[str, int]:
        """Return the bytes in host memory in a training step."""
        counts, width = self.counts, self.width
        lines = {"process": HOST_PROCESS, "latents": counts.latents}
        if self.choice.offload_param:
            lines["weights"] = width * self._part(self.total + counts.passed)
        if not self.choice.offload_optimizer:
            return lines
        # Stages 1 and 2 copy weights back through a buffer, stage 3 gradients in; accumulation adds a sum.
        staging = width * self.part * (2 if counts.accumulates and self.stage != 3 else 1)
        held = self.part
        if self.choice.nvme:  # one sub-group at a time, which ends with a tensor
            held = min(self.part, SWAPPED_GROUP + self._part(self.largest))
        return lines | {
            "master": 4 * held,
            "optimizer": self.moments * held,
            "gradients": 4 * held,
            "staging": staging + width * self.largest,
            "average": counts.average * 4 * self.part,
        }

    def copied(self) -> int:
        """Return the bytes of the buffers in host memory into which torch's state is copied for checkpoints."""
        counts = self.counts
        averaged = counts.average or counts.kind.average is not None
        return self.width * self.total + counts.states + 4 * averaged * self.total

    def traffic(self) -> dict[str, int]:
        """Return the bytes that offload moves in one optimizer step of one worker.

        Gradients go to the host in float32. A sum over micro-batches goes back and forth in the precision of
        the weights; stage 3 always sends it. Stepped weights return in the precision that they compute in.
        Weights on the host, including frozen ones, are fetched for the forward pass, and again for the
        backward pass if stage 3 cannot keep them until then.
        """
        counts, part, width = self.counts, self.part, self.width
        to_host = to_gpu = 0
        if self.choice.offload_optimizer:
            sums = counts.micros if self.stage == 3 else counts.micros - 1
            to_host += (width * (counts.micros if sums else 0) + 4) * part
            to_gpu += width * (sums + (not self.choice.offload_param)) * part
        if self.choice.offload_param:
            used = self.total + counts.passed
            to_host += 0 if self.choice.offload_optimizer else width * part
            to_gpu += width * (2 * counts.micros if used > REUSE_DISTANCE // 2 else 1) * self._part(used)
        return {"to_host": to_host, "to_gpu": to_gpu}

    def step_buffers(self) -> int:
        """Return the bytes of an optimizer step besides states and gradients: flat copies, some float32."""
        if self.choice.offload_optimizer:
            return 0
        if self.is_torch:
            return self._torch_step()
        if self.stage == 0:  # gradients that are sent to the other workers
            return 4 * min(self.total, REDUCE_BUCKET) if self.world > 1 else 0
        return (self.width * (self.stage < 3) + 4 * self.counts.mixed) * self.part

    def starting(self) -> int:
        """Return the bytes besides the frozen parts before the first step.

        Weights that ZeRO shards stay in host memory, except while class images are generated. When stages 1 and 2
        start, DeepSpeed holds all weights and clones its partition of them.
        """
        counts, weights = self.counts, self.width * self.sharded
        drawing = weights + counts.class_drawing if counts.class_drawing else 0
        cloned = self.width * (self.total + self.part) if self.stage in (1, 2) else 0
        return max(drawing, cloned, counts.encoding + (0 if self.stage else weights))

    def _torch_step(self) -> int:
        """Return the bytes that torch's step needs besides states and gradients.

        They are those of the largest tensor, or of all if the optimizer steps them together.
        """
        kind = self.counts.kind
        stepped = self.largest if kind.steps_alone else self.total
        if self.counts.bf16_weights:
            return (NARROW_COPIES + max(kind.scratch, ROUNDING_BITS)) * stepped
        return kind.scratch * stepped

    def _part(self, elements: int) -> int:
        return -(-elements // self.world)
