"""Where the memory of a run goes, per GPU and per host, for every engine: arithmetic on counts alone.

Sources: Rajbhandari et al. 2020 (ZeRO, arXiv 1910.02054), section 3; DeepSpeed 0.19's ``stage_1_and_2.py`` and
``stage3.py`` for the copies and buffers beside what the paper counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dreamfleet.trainers.config.deepspeed import SWAPPED_GROUP
from dreamfleet.trainers.memory.inputs import Counts
from dreamfleet.trainers.memory.strategies import ALTERING, CHOICES, NVME_CHOICES, EngineChoice

GIB = 2**30
# Not counted but assumed: what a process takes before its first tensor. The GPU's part is the CUDA context with the
# kernels of torch, cuBLAS and cuDNN; the host's is Python with torch, diffusers and Ray (0.5 GiB) and CUDA's libraries.
CUDA_CONTEXT = GIB // 2
KERNEL_WORKSPACE = GIB // 4
HOST_PROCESS = 3 * GIB // 2

# DeepSpeed's defaults, in elements: how far ahead stage 3 keeps weights that come again, and fetches; stage 0's sends.
REUSE_DISTANCE, PREFETCH_BUCKET, REDUCE_BUCKET = 1_000_000_000, 50_000_000, 500_000_000
# The 8-bit optimizer keeps small tensors whole, and a scale for every block of the others (bitsandbytes, AdamW8bit).
SMALL_8BIT, BLOCK_8BIT = 4096, 256
# Bytes an element beside state and gradient while one tensor is stepped: Adafactor's update; for a bfloat16 weight its
# wide copy, the wide gradient, and the update or the random bits.
ADAFACTOR_STEP, NARROW_STEP = 4, 12


@dataclass(frozen=True)
class Estimate:
    """The bytes of one choice: named lines in a training step, and the totals at other moments of a run.

    ``gpu`` and ``host`` are one worker's lines while it trains; ``gpu_moments`` one GPU's totals, ``host_moments``
    those of the host that rank 0 is on, all its workers together. ``traffic``: what offload sends in a step over PCIe;
    ``disk``: what it reads and writes of an NVMe disk.
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
        """The most that a GPU holds at any moment."""
        return max(self.gpu_moments.values())

    @property
    def peak(self) -> str:
        """The moment at which a GPU holds the most."""
        return max(self.gpu_moments, key=lambda name: self.gpu_moments[name])

    @property
    def host_total(self) -> int:
        """The most that a host holds at any moment."""
        return max(self.host_moments.values())

    def traffic_seconds(self, bytes_per_second: float) -> float:
        """Return what a step's traffic takes at least; both directions go at once."""
        return max(self.traffic.values()) / bytes_per_second

    def fits(self, gpu_memory: int | None, host_memory: int | None) -> bool:
        """Say whether it stays within both limits (None: no limit)."""
        return (gpu_memory is None or self.gpu_total <= gpu_memory) and (
            host_memory is None or self.host_total <= host_memory
        )


def estimate_all(counts: Counts, *, world: int = 1, workers_per_host: int = 1) -> list[Estimate]:
    """Estimate every choice open to these counts, cheapest first; those that alter the run come last.

    ZeRO shards AdamW alone, with float32 weights, outside of backward; altering choices are for one GPU.
    """
    plain = counts.optimizer == "adamw" and not counts.fused and not counts.bf16_weights
    zero = [*CHOICES[1:], *(NVME_CHOICES if counts.nvme else ())]
    choices = [CHOICES[0], *(zero if plain else [])]
    if world == 1 and not counts.accumulates:
        # Narrow weights were traced only where the recipe computes in 16 bits.
        open_ = [choice for choice in ALTERING if counts.mixed or not choice.bf16_weights]
        choices += [choice for choice in open_ if counts.under(choice) != counts]
    return [estimate(counts, choice, world=world, workers_per_host=workers_per_host) for choice in choices]


def cheapest_fit(
    estimates: Sequence[Estimate], *, gpu_memory: int | None, host_memory: int | None = None
) -> Estimate | None:
    """Return the first that fits and alters nothing, None when none does; :func:`estimate_all` orders them."""
    fitting = (one for one in estimates if one.fits(gpu_memory, host_memory))
    return next((one for one in fitting if not one.choice.alters), None)


def estimate(counts: Counts, choice: EngineChoice, *, world: int = 1, workers_per_host: int = 1) -> Estimate:
    """Estimate one choice for ``world`` workers, one GPU each."""
    counts = counts.under(choice)
    gpu, host = _gpu_lines(counts, choice, world), _host_lines(counts, choice, world)
    passing = gpu["activations"] + gpu["gradients"] + gpu["buffers"]
    resting = sum(gpu.values()) - passing
    idle = resting + (gpu["gradients"] + gpu["buffers"] if _keeps_gradients(choice, world) else 0)
    stage, total, width = choice.zero_stage, counts.total, _width(counts, choice)
    # Averaged weights are lent to the model beside its own; stage 3 exchanges them in place, and torch lends the
    # average itself where it is as wide as the weights.
    lends = counts.average and stage != 3 and (stage is not None or counts.bf16_weights)
    # Rank 0 gathers ZeRO's states whole; torch alone copies the weights, and the states one tensor at a time.
    saved = width * total if stage is None else (4 + 8 + 4 * counts.average) * total
    training = workers_per_host * sum(host.values())
    return Estimate(
        choice,
        gpu,
        {
            "starting": CUDA_CONTEXT + KERNEL_WORKSPACE + gpu["frozen"] + _starting(counts, choice),
            "training": resting + passing,
            "optimizer step": resting + gpu["gradients"] + _step_buffers(counts, choice, world),
            "previews": idle + lends * width * total + counts.drawing if counts.drawing else 0,
        },
        host,
        {
            "starting": workers_per_host * (host["process"] + counts.model),
            "training": training,
            "saving": training + saved,
            "exporting": training + (stage is not None) * 4 * total + (stage == 3) * width * counts.passed,
        },
        traffic(counts, choice, world),
        # Weights, moments and gradients are read, and all but the gradients written back; these were written before.
        32 * _part(total, world) if choice.nvme else 0,
    )


def optimizer_bytes(learning: Sequence[int], name: str = "adamw", factors: int = 0) -> int:
    """Return the bytes of an optimizer's states: Adam's two moments, a byte each in ``adamw8bit``'s large tensors;
    ``adafactor``'s ``factors``; and step counts."""
    if name == "adamw":
        return sum(8 * numel + 4 for numel in learning)
    if name == "adafactor":
        return 4 * factors + 4 * len(learning)
    return sum(
        8 * numel if numel < SMALL_8BIT else 2 * numel + 2 * 4 * -(-numel // BLOCK_8BIT) for numel in learning
    )


def traffic(counts: Counts, choice: EngineChoice, world: int) -> dict[str, int]:
    """Return the bytes that offload sends in an optimizer step of one worker: ``to_host`` and ``to_gpu``.

    Gradients go out in float32, widened before they leave; a sum that waits for further micro-batches goes to and fro
    as wide as the weights. Stage 3 sends it in any case, and sends it back to widen it. Stepped weights come back as
    wide as they compute; those kept on the host, frozen ones too, come for the forward pass, and for the backward pass
    again where more of them lie between than stage 3 keeps.
    """
    part, width = _part(counts.total, world), _width(counts, choice)
    to_host = to_gpu = 0
    if choice.offload_optimizer:
        # Sums that are added to, on the GPU.
        again = counts.micros if choice.zero_stage == 3 else counts.micros - 1
        to_host += (width * (counts.micros if again else 0) + 4) * part
        to_gpu += width * again * part
        to_gpu += 0 if choice.offload_param else width * part
    if choice.offload_param:
        to_host += 0 if choice.offload_optimizer else width * part
        fetches = 2 * counts.micros if counts.total + counts.passed > REUSE_DISTANCE // 2 else 1
        to_gpu += width * fetches * _part(counts.total + counts.passed, world)
    return {"to_host": to_host, "to_gpu": to_gpu}


def _gpu_lines(counts: Counts, choice: EngineChoice, world: int) -> dict[str, int]:
    stage, total, part = choice.zero_stage or 0, counts.total, _part(counts.total, world)
    width = _width(counts, choice)
    weights, gathered, frozen = width * total, 0, counts.frozen
    if stage == 3:
        sharded = total + counts.passed
        weights = 0 if choice.offload_param else width * _part(sharded, world)
        frozen -= width * counts.passed
        if choice.offload_param or world > 1:  # with one worker stage 3 lends its own weights
            gathered = width * min(sharded, REUSE_DISTANCE // 2 + PREFETCH_BUCKET)
    optimizer, master = optimizer_bytes(counts.learning, counts.optimizer, counts.factors), 0
    if stage:
        on_gpu = 0 if choice.offload_optimizer else part
        master, optimizer = 4 * on_gpu, 8 * on_gpu  # DeepSpeed steps on a copy of the weights even in float32
    share = _gradient_share(choice, world)
    step = counts.half if width == 2 else counts.full
    if counts.fused:  # one gradient at a time
        gradients = width * max(counts.learning)
        together = step.activations + gradients
    else:
        gradients = round(share * width * total)
        together = step.peak(
            width * total, share, accumulates=counts.accumulates or _keeps_gradients(choice, world)
        )
    buffers = width * min(counts.bucket, total) if stage else 0
    if choice.offload_optimizer and stage < 3:
        buffers += width * max(counts.learning)
    if counts.fused:
        buffers += _one_step(counts)
    return {
        "weights": weights,
        "gathered": gathered,
        "master": master,
        "frozen": frozen,
        "gradients": gradients,
        "optimizer": optimizer,
        "average": 0 if not counts.average or choice.offload_optimizer else 4 * (part if stage else total),
        "activations": together - gradients,
        "buffers": buffers,
        "text_embeddings": counts.text_embeddings,
        "context": CUDA_CONTEXT,
        "workspace": KERNEL_WORKSPACE,
    }


def _host_lines(counts: Counts, choice: EngineChoice, world: int) -> dict[str, int]:
    lines = {"process": HOST_PROCESS, "latents": counts.latents}
    part, width = _part(counts.total, world), _width(counts, choice)
    if choice.offload_param:
        lines["weights"] = width * _part(counts.total + counts.passed, world)
    if not choice.offload_optimizer:
        return lines
    # Stages 1 and 2 stage weights on their way back, 3 gradients on their way in; accumulation keeps a sum besides.
    staging = width * part * (2 if counts.accumulates and choice.zero_stage != 3 else 1)
    held = part
    if choice.nvme:  # one sub-group of them, which ends with a tensor
        held = min(part, SWAPPED_GROUP + _part(max(counts.learning), world))
    return lines | {
        "master": 4 * held,
        "optimizer": 8 * held,
        "gradients": 4 * held,
        "staging": staging + width * max(counts.learning),
        "average": 4 * part if counts.average else 0,
    }


def _step_buffers(counts: Counts, choice: EngineChoice, world: int) -> int:
    """Return what the optimizer step holds beside states and gradients: copies end to end, and in float32."""
    if choice.offload_optimizer:
        return 0
    if choice.zero_stage is None:
        return _one_step(counts)
    if choice.zero_stage == 0:  # the gradients on their way to the other workers
        return 4 * min(counts.total, REDUCE_BUCKET) if world > 1 else 0
    part = _part(counts.total, world)
    flat = _width(counts, choice) * part if choice.zero_stage < 3 else 0
    return flat + (4 * part if counts.mixed else 0)


def _one_step(counts: Counts) -> int:
    """Return what torch's step of the largest tensor holds beside its state and gradient."""
    if counts.bf16_weights:
        return NARROW_STEP * max(counts.learning)
    return ADAFACTOR_STEP * max(counts.learning) if counts.optimizer == "adafactor" else 0


def _starting(counts: Counts, choice: EngineChoice) -> int:
    """Return what is held beside the frozen parts before the first step.

    What ZeRO shards waits on the host, but to draw class pictures; then it comes as wide as it computes.
    """
    sharded = counts.total + (counts.passed if choice.zero_stage == 3 else 0)
    weights = _width(counts, choice) * sharded
    drawing = weights + counts.class_drawing if counts.class_drawing else 0
    return max(drawing, counts.encoding + (0 if choice.zero_stage else weights))


def _width(counts: Counts, choice: EngineChoice) -> int:
    """Return the bytes of a weight that the model computes with: ZeRO's half-precision modes keep 16 bits."""
    return 2 if counts.bf16_weights or (counts.mixed and choice.zero_stage) else 4


def _gradient_share(choice: EngineChoice, world: int) -> float:
    """Return which part of the gradients stays on this GPU until the step."""
    stage = choice.zero_stage or 0
    if stage < 2:
        return 1.0
    return 0.0 if choice.offload_optimizer else 1 / world


def _keeps_gradients(choice: EngineChoice, world: int) -> bool:
    # DDP's buckets outlive the step, and stage 3 allocates gradients and buffers once.
    return choice.zero_stage == 3 or (choice.zero_stage is None and world > 1)


def _part(total: int, world: int) -> int:
    return -(-total // world)
