"""Seconds of a training step on a cluster: what each engine sends, and how much of it computation hides."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dreamfleet.trainers.scale.cluster import Cluster

DDP_BUCKET = 25 * 2**20  # bytes of one all-reduce: torch's DistributedDataParallel, bucket_cap_mb
BACKWARD = 2 / 3  # share of a step's computation: a backward pass costs two forward passes


@dataclass(frozen=True)
class Sizes:
    """What a run sends and computes, for one GPU.

    ``trained`` and ``passed``: elements of the parameters that are trained, and of the frozen ones that gradients pass
    through (ZeRO-3 shards these too). ``width``: bytes of a gradient element: 4, or 2 in DeepSpeed's half-precision
    modes and with weights in bfloat16. ``micros``: micro-batches per step; ``flops`` and ``images``: of all of them.
    """

    trained: int
    passed: int = 0
    width: int = 4
    micros: int = 1
    flops: float = 0.0
    images: int = 1


@dataclass(frozen=True)
class Traffic:
    """Bytes that one GPU sends in a step: ``hidden`` can proceed beside the computation, ``after`` follows it.

    ``window``: share of the computation beside which it proceeds. ``all_reduces``: number of their messages;
    ``rounds``: how often a message of another operation goes around the ring.
    """

    hidden: float
    after: float
    window: float
    all_reduces: int = 0
    rounds: int = 0

    @property
    def total(self) -> float:
        """Bytes that one GPU sends in a step."""
        return self.hidden + self.after


def ring_bytes(size: float, world: int) -> float:
    """Return the bytes that each of ``world`` GPUs sends in a ring's reduce-scatter or all-gather of ``size`` bytes.

    An all-reduce is one after the other, 2 (N - 1) / N: Patarasuk and Yuan 2009, J. Parallel Distrib. Comput. 69.
    """
    return size * (world - 1) / world


def ddp_traffic(sizes: Sizes, world: int) -> Traffic:
    """Return the traffic of DDP: one all-reduce of the gradients in the last micro-batch of a step."""
    gradients = sizes.trained * sizes.width
    buckets = math.ceil(gradients / DDP_BUCKET)
    return Traffic(2 * ring_bytes(gradients, world), 0, BACKWARD / sizes.micros, all_reduces=buckets)


def zero_traffic(sizes: Sizes, world: int, *, stage: int, bucket: int) -> Traffic:
    """Return the traffic of ZeRO stage 1, 2 or 3 (Rajbhandari et al. 2020, arXiv:1910.02054, section 7).

    Stage 1 reduces the gradients once a step, stages 2 and 3 in each micro-batch. Stages 1 and 2 gather the updated
    weights after the step. Stage 3 gathers the weights for the forward and again for the backward pass of each
    micro-batch. ``bucket``: elements of a message.
    """
    gradients, weights = sizes.trained * sizes.width, sizes.trained * sizes.width
    reduced = ring_bytes(gradients, world) * (1 if stage == 1 else sizes.micros)
    window = BACKWARD / sizes.micros if stage == 1 else BACKWARD
    if stage < 3:
        after = ring_bytes(weights, world)
        rounds = math.ceil(sizes.trained / bucket) * ((1 if stage == 1 else sizes.micros) + 1)
        return Traffic(reduced, after, window, rounds=rounds)
    gathered = 2 * sizes.micros * ring_bytes(weights + sizes.passed * sizes.width, world)
    rounds = math.ceil((sizes.trained + sizes.passed) / bucket) * 3 * sizes.micros
    return Traffic(reduced + gathered, 0, 1.0, rounds=rounds)


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step: computation, communication, the part of it that nothing hides, and their images per second.

    ``efficiency``: images per second compared with as many GPUs that need not communicate.
    """

    compute: float
    communication: float
    exposed: float
    images_per_second: float
    sent: float

    @property
    def seconds(self) -> float:
        """Seconds of the step."""
        return self.compute + self.exposed

    @property
    def efficiency(self) -> float:
        """Share of the step in which GPUs compute."""
        return self.compute / self.seconds


def step_time(sizes: Sizes, traffic: Traffic, cluster: Cluster) -> StepTime:
    """Return the seconds of a step, with constant work for each GPU (weak scaling)."""
    compute = (
        sizes.flops / (cluster.gpu.flops * cluster.utilisation) if cluster.step is None else cluster.step
    )
    if cluster.gpus == 1:
        return StepTime(compute, 0.0, 0.0, sizes.images / compute, 0.0)
    waits = traffic.rounds * cluster.circle + traffic.all_reduces * cluster.all_reduce_wait
    hidden = traffic.hidden / cluster.rate + waits
    after = traffic.after / cluster.rate
    exposed = max(0.0, hidden - cluster.overlap * traffic.window * compute) + after
    total = compute + exposed
    return StepTime(compute, hidden + after, exposed, cluster.gpus * sizes.images / total, traffic.total)
