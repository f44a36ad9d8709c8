"""Seconds of a training step on a cluster: what each engine sends, and how much of it computation hides."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dreamfleet.trainers.scale.cluster import Cluster

MESSAGE = 2**25  # bytes of gradients in a message of the torch engine: BUCKET_BYTES of its gradient exchange
BACKWARD = 2 / 3  # share of a step's computation: a backward pass costs two forward passes


@dataclass(frozen=True)
class Sizes:
    """What a run sends and computes, for one GPU.

    ``trained`` and ``passed``: elements of the parameters that are trained, and of the frozen ones that gradients pass
    through (ZeRO-3 shards these too). ``width``: bytes of a gradient element: 4, or 2 in DeepSpeed's half-precision
    modes and with weights in bfloat16. ``micros``: micro-batches per step; ``flops`` and ``images``: of all of them.
    ``by_unit``: the torch engine exchanges the gradients of each micro-batch (engine.gradient_exchange).
    """

    trained: int
    passed: int = 0
    width: int = 4
    micros: int = 1
    flops: float = 0.0
    images: int = 1
    by_unit: bool = False


@dataclass(frozen=True)
class Traffic:
    """Bytes that one GPU sends in a step, and the number of messages they are in, by operation.

    ``scattered``: to every other GPU a part (all-to-all); ``reduced``: around a ring during the computation; ``after``:
    around a ring after it. ``window``: share of the computation beside which the first two proceed. ``all_reduces`` and
    ``rings``: messages of the other two.
    """

    window: float
    scattered: float = 0.0
    reduced: float = 0.0
    after: float = 0.0
    scatters: int = 0
    all_reduces: int = 0
    rings: int = 0

    def total(self, world: int) -> float:
        """Return the bytes that one of ``world`` GPUs sends in a step."""
        return ring_bytes(self.scattered, world) + self.reduced + self.after


def ring_bytes(size: float, world: int) -> float:
    """Return the bytes that each of ``world`` GPUs sends in a ring's reduce-scatter or all-gather of ``size`` bytes.

    An all-reduce is one after the other, 2 (N - 1) / N: Patarasuk and Yuan 2009, J. Parallel Distrib. Comput. 69.
    """
    return size * (world - 1) / world


def all_reduce_traffic(sizes: Sizes, world: int) -> Traffic:
    """Return the traffic of one all-reduce of the gradients during a step's last backward pass."""
    gradients = sizes.trained * sizes.width
    return Traffic(
        window=BACKWARD / sizes.micros,
        reduced=2 * ring_bytes(gradients, world),
        all_reduces=math.ceil(gradients / MESSAGE),
    )


def exchange_traffic(sizes: Sizes, world: int) -> Traffic:
    """Return the traffic of the torch engine: an all-reduce, or with ``sizes.by_unit`` an exchange of each micro-batch.

    The exchange sends each part of the gradients to its owner, who adds them in the order of the micro-batches,
    whatever the number of workers. After the last one the sums are gathered.
    """
    if not sizes.by_unit:
        return all_reduce_traffic(sizes, world)
    gradients = sizes.trained * sizes.width
    messages = math.ceil(gradients / MESSAGE)
    return Traffic(
        window=BACKWARD,
        scattered=sizes.micros * gradients,
        after=ring_bytes(gradients, world),
        scatters=sizes.micros * messages,
        rings=messages,
    )


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
        rings = math.ceil(sizes.trained / bucket) * ((1 if stage == 1 else sizes.micros) + 1)
        return Traffic(window, reduced=reduced, after=ring_bytes(weights, world), rings=rings)
    gathered = 2 * sizes.micros * ring_bytes(weights + sizes.passed * sizes.width, world)
    rings = math.ceil((sizes.trained + sizes.passed) / bucket) * 3 * sizes.micros
    return Traffic(1.0, reduced=reduced + gathered, rings=rings)


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
    hidden = (
        cluster.all_to_all_seconds(traffic.scattered)
        + traffic.reduced / cluster.rate
        + traffic.scatters * cluster.all_to_all_wait
        + traffic.all_reduces * cluster.all_reduce_wait
        + traffic.rings * cluster.circle
    )
    after = traffic.after / cluster.rate
    exposed = max(0.0, hidden - cluster.overlap * traffic.window * compute) + after
    images = cluster.gpus * sizes.images / (compute + exposed)
    return StepTime(compute, hidden + after, exposed, images, traffic.total(cluster.gpus))
