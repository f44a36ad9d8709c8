"""Where the memory of a run goes, per GPU and per host, for every engine: arithmetic on counts alone.

Sources: Rajbhandari et al. 2020 (ZeRO, arXiv 1910.02054), section 3; DeepSpeed 0.19's ``stage_1_and_2.py`` and
``stage3.py`` for the copies and buffers beside what the paper counts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from dreamfleet.datasets.errors import ResourceError

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


@dataclass(frozen=True)
class Pass:
    """Bytes that forward and backward of one micro-batch hold, beside the model.

    ``held``: between forward and backward. ``activations``: the most at any moment, gradients of weights aside.
    ``together``: the most of activations and gradients at any moment, when there were no gradients before: these come
    as activations go. ``casts``: of ``activations``, autocast's low-precision copies of the learning weights.
    """

    held: int
    activations: int
    together: int
    casts: int = 0

    def peak(self, gradients: int, share: float, *, accumulates: bool) -> int:
        """Bound activations and the ``share`` of the ``gradients`` that this worker keeps, at their worst moment.

        With gradients left from an earlier micro-batch both are whole at once. Otherwise A + share * G is a mean
        of A and A + G at every moment, so it stays below the same mean of their peaks.
        """
        if accumulates:
            return self.activations + round(share * gradients)
        return round((1 - share) * self.activations + share * self.together)


@dataclass(frozen=True)
class Counts:
    """What one worker's run is made of, counted without loading anything; sizes in bytes, on the GPU unless said.

    ``learning``: elements of each learning tensor. ``frozen``: parts that do not learn, and buffers. ``full``: a pass
    with the learning weights in float32, ``half``: in 16 bits, where ``mixed`` (DeepSpeed's half-precision modes).
    ``model``: the whole model in float32, as it is first loaded. ``encoding``: encoding pictures before the first step,
    or drawing class pictures; ``drawing``: drawing previews. ``latents``: resident latents, on the host. ``bucket``:
    elements of the buffers that ZeRO sends from.
    """

    learning: tuple[int, ...]
    frozen: int
    model: int
    full: Pass
    half: Pass
    bucket: int
    mixed: bool = False
    optimizer: str = "adamw"
    average: bool = False
    accumulates: bool = False
    encoding: int = 0
    drawing: int = 0
    text_embeddings: int = 0
    latents: int = 0

    @property
    def total(self) -> int:
        """How many numbers learn."""
        return sum(self.learning)


@dataclass(frozen=True)
class EngineChoice:
    """One way to run the engine; ``zero_stage`` None is torch alone (with DDP when there are several workers)."""

    name: str
    zero_stage: int | None = None
    offload_optimizer: bool = False
    offload_param: bool = False


#: From the cheapest in time per step to the dearest, in the order of Hugging Face's DeepSpeed guide ("ZeRO": stage 1,
#: 2, 2 with offload, 3, 3 with offload): stage 3 sends the weights in every pass, offload moves states over PCIe and
#: steps on the CPU. Stage 0 shards nothing and only goes through another library, so it follows plain torch; stage 1
#: with offload is left out, as stage 2 sends as much and holds less.
CHOICES = (
    EngineChoice("torch"),
    EngineChoice("ZeRO-0", 0),
    EngineChoice("ZeRO-1", 1),
    EngineChoice("ZeRO-2", 2),
    EngineChoice("ZeRO-2, optimizer on host", 2, offload_optimizer=True),
    EngineChoice("ZeRO-3", 3),
    EngineChoice("ZeRO-3, optimizer on host", 3, offload_optimizer=True),
    EngineChoice("ZeRO-3, optimizer and weights on host", 3, offload_optimizer=True, offload_param=True),
)


@dataclass(frozen=True)
class Estimate:
    """The bytes of one choice: named lines in a training step, and the totals at other moments of a run.

    ``gpu`` and ``host`` are one worker's lines while it trains; ``gpu_moments`` one GPU's totals, ``host_moments``
    those of the host that rank 0 is on, all its workers together.
    """

    choice: EngineChoice
    gpu: dict[str, int]
    gpu_moments: dict[str, int]
    host: dict[str, int]
    host_moments: dict[str, int]

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

    def fits(self, gpu_memory: int | None, host_memory: int | None) -> bool:
        """Say whether it stays within both limits (None: no limit)."""
        return (gpu_memory is None or self.gpu_total <= gpu_memory) and (
            host_memory is None or self.host_total <= host_memory
        )


def estimate_all(counts: Counts, *, world: int = 1, workers_per_host: int = 1) -> list[Estimate]:
    """Estimate every choice open to these counts, cheapest first; ZeRO shards no 8-bit optimizer."""
    choices = CHOICES if counts.optimizer == "adamw" else CHOICES[:1]
    return [estimate(counts, choice, world=world, workers_per_host=workers_per_host) for choice in choices]


def cheapest_fit(
    estimates: Sequence[Estimate], *, gpu_memory: int | None, host_memory: int | None = None
) -> Estimate | None:
    """Return the first that fits, None when none does; :func:`estimate_all` gives them in the right order."""
    return next((one for one in estimates if one.fits(gpu_memory, host_memory)), None)


def estimate(counts: Counts, choice: EngineChoice, *, world: int = 1, workers_per_host: int = 1) -> Estimate:
    """Estimate one choice for ``world`` workers, one GPU each."""
    gpu, host = _gpu_lines(counts, choice, world), _host_lines(counts, choice, world)
    passing = gpu["activations"] + gpu["gradients"] + gpu["buffers"]
    resting = sum(gpu.values()) - passing
    idle = resting + (gpu["gradients"] + gpu["buffers"] if _keeps_gradients(choice, world) else 0)
    stage, total = choice.zero_stage, counts.total
    # Averaged weights, and the whole ones of stage 3, are lent to the model beside its own.
    lent = _width(counts, choice) * total if counts.average or stage == 3 else 0
    # Rank 0 gathers ZeRO's states whole; torch alone copies the weights, and the states one tensor at a time.
    saved = 4 * total if stage is None else (4 + 8 + 4 * counts.average) * total
    training = workers_per_host * sum(host.values())
    return Estimate(
        choice,
        gpu,
        {
            "starting": CUDA_CONTEXT + KERNEL_WORKSPACE + 4 * total + counts.frozen + counts.encoding,
            "training": resting + passing,
            "optimizer step": resting + gpu["gradients"] + _step_buffers(counts, choice, world),
            "previews": idle + lent + counts.drawing if counts.drawing else 0,
        },
        host,
        {
            "starting": workers_per_host * (host["process"] + counts.model),
            "training": training,
            "saving": training + saved,
        },
    )


def optimizer_bytes(learning: Sequence[int], name: str = "adamw") -> int:
    """Return the bytes of Adam's two moments and step counts; ``adamw8bit`` keeps a byte each in large tensors."""
    if name == "adamw":
        return sum(8 * numel + 4 for numel in learning)
    return sum(
        8 * numel if numel < SMALL_8BIT else 2 * numel + 2 * 4 * -(-numel // BLOCK_8BIT) for numel in learning
    )


def parse_size(text: str, *, option: str) -> int:
    """Read ``12GiB``, ``24GB``, ``8192MiB`` or ``12G`` (GiB) as bytes. Raises ResourceError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)(b?)\s*", text, re.IGNORECASE)
    if not match or not match[2] or float(match[1]) == 0:
        raise ResourceError(f"{option} {text!r} is no size of memory; write it like 12GiB, 24GB or 8192MiB")
    number, prefix, binary, unit = match.groups()
    base = 1000 if unit and not binary else 1024
    return int(float(number) * base ** ("kmgt".index(prefix.lower()) + 1))


def _gpu_lines(counts: Counts, choice: EngineChoice, world: int) -> dict[str, int]:
    stage, total, part = choice.zero_stage or 0, counts.total, _part(counts.total, world)
    width = _width(counts, choice)
    weights, gathered = width * total, 0
    if stage == 3:
        weights = 0 if choice.offload_param else width * part
        if choice.offload_param or world > 1:  # with one worker stage 3 lends its own weights
            gathered = width * min(total, REUSE_DISTANCE // 2 + PREFETCH_BUCKET)
    optimizer, master = optimizer_bytes(counts.learning, counts.optimizer), 0
    if stage:
        on_gpu = 0 if choice.offload_optimizer else part
        master, optimizer = 4 * on_gpu, 8 * on_gpu  # DeepSpeed steps on a copy of the weights even in float32
    share = _gradient_share(choice, world)
    step = counts.half if counts.mixed and stage else counts.full
    together = step.peak(
        width * total, share, accumulates=counts.accumulates or _keeps_gradients(choice, world)
    )
    gradients = round(share * width * total)
    buffers = width * min(counts.bucket, total) if stage else 0
    if choice.offload_optimizer and stage < 3:
        buffers += width * max(counts.learning)
    return {
        "weights": weights,
        "gathered": gathered,
        "master": master,
        "frozen": counts.frozen,
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
    if not choice.offload_optimizer:
        return lines
    part, width = _part(counts.total, world), _width(counts, choice)
    # Stages 1 and 2 stage weights on their way back, 3 gradients on their way in; accumulation keeps a sum besides.
    staging = width * part * (2 if counts.accumulates and choice.zero_stage != 3 else 1)
    return lines | {
        "master": 4 * part,
        "optimizer": 8 * part,
        "gradients": 4 * part,
        "staging": staging + width * max(counts.learning),
        "weights": width * part if choice.offload_param else 0,
        "average": 4 * part if counts.average else 0,
    }


def _step_buffers(counts: Counts, choice: EngineChoice, world: int) -> int:
    """Return what the optimizer step holds beside states and gradients: copies end to end, and in float32."""
    if choice.zero_stage is None or choice.offload_optimizer:
        return 0
    if choice.zero_stage == 0:  # the gradients on their way to the other workers
        return 4 * min(counts.total, REDUCE_BUCKET) if world > 1 else 0
    part = _part(counts.total, world)
    flat = _width(counts, choice) * part if choice.zero_stage < 3 else 0
    return flat + (4 * part if counts.mixed else 0)


def _width(counts: Counts, choice: EngineChoice) -> int:
    """Return the bytes of a weight that the model computes with: ZeRO's half-precision modes keep 16 bits."""
    return 2 if counts.mixed and choice.zero_stage else 4


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
