"""Tests the seconds of a step against values computed by hand."""

from dataclasses import replace

import pytest

from dreamfleet.trainers.engines.gradient_exchange import BUCKET_BYTES
from dreamfleet.trainers.scale.cluster import Cluster
from dreamfleet.trainers.scale.communication import (
    MESSAGE,
    Sizes,
    exchange_traffic,
    ring_bytes,
    step_time,
    zero_traffic,
)

SIZES = Sizes(trained=1_000, passed=600, width=4, micros=2, flops=1.0, images=8)


def test_bytes_of_a_ring() -> None:
    assert ring_bytes(4_000, 1) == 0
    assert ring_bytes(4_000, 4) == 3_000
    assert ring_bytes(4_000, 10**6) == pytest.approx(4_000, rel=1e-5)  # its limit: the whole size once


def test_bytes_of_every_engine() -> None:
    """Rajbhandari et al. 2020: 2 sizes for data parallelism and stages 1 and 2, 3 for stage 3, on many GPUs."""
    one = Sizes(trained=1_000, width=4)
    every = [exchange_traffic(one, 10**6), exchange_traffic(replace(one, by_unit=True), 10**6)]
    every += [zero_traffic(one, 10**6, stage=stage, bucket=100) for stage in (1, 2, 3)]
    sent = [traffic.total(10**6) / 4_000 for traffic in every]
    assert sent == pytest.approx([2, 2, 2, 2, 3], rel=1e-5)


def test_bytes_with_two_micro_batches_on_four_gpus() -> None:
    once = exchange_traffic(SIZES, 4)
    assert (once.reduced, once.after, once.window) == (2 * 3_000, 0, pytest.approx(1 / 3))
    each = exchange_traffic(
        replace(SIZES, by_unit=True), 4
    )  # gathers once, whatever the number of micro-batches
    assert (each.scattered, each.after, each.window) == (8_000, 3_000, pytest.approx(2 / 3))
    assert each.total(4) == 9_000 and MESSAGE == BUCKET_BYTES
    first = zero_traffic(SIZES, 4, stage=1, bucket=100)
    assert (first.reduced, first.after, first.rings) == (3_000, 3_000, 20)
    second = zero_traffic(SIZES, 4, stage=2, bucket=100)  # reduces in each micro-batch
    assert (second.reduced, second.after, second.rings) == (6_000, 3_000, 30)
    third = zero_traffic(SIZES, 4, stage=3, bucket=100)  # 2 x (reduce 4,000 + gather 2 x 6,400) x 3/4
    assert (third.reduced, third.after, third.rings) == (6_000 + 19_200, 0, 96)


def test_seconds_of_a_step() -> None:
    """2 GPUs on 2 nodes send 4 GB at 1 GB/s while a third of a step of 6 s, at 50% overlap, hides 1 s of it."""
    sizes = Sizes(trained=10**9, width=4, micros=2, images=8)
    cluster = Cluster(2, per_node=1, link=1e9, latency=0.0, bus_latency=0.0, overlap=0.5, step=6.0)
    step = step_time(sizes, exchange_traffic(sizes, 2), cluster)
    assert (step.communication, step.exposed, step.seconds) == pytest.approx((4.0, 3.0, 9.0))
    assert step.images_per_second == pytest.approx(2 * 8 / 9) and step.efficiency == pytest.approx(6 / 9)
    # The exchange by unit sends each micro-batch, and gathers the sums after the step.
    by_unit = replace(sizes, by_unit=True)
    exchanged = step_time(by_unit, exchange_traffic(by_unit, 2), cluster)  # two micro-batches
    assert (exchanged.communication, exchanged.exposed) == pytest.approx((6.0, 4.0 - 2.0 + 2.0))
    # What follows the step is never hidden: half of it for stage 1.
    first = step_time(sizes, zero_traffic(sizes, 2, stage=1, bucket=10**9), cluster)
    assert (first.communication, first.exposed) == pytest.approx((4.0, 2.0 - 1.0 + 2.0))


def test_computation_follows_from_operations_and_alone_a_gpu_sends_nothing() -> None:
    sizes = Sizes(trained=10**9, flops=9.89e13, images=4)
    alone = step_time(sizes, exchange_traffic(sizes, 1), Cluster(1, utilisation=0.5))
    assert alone.seconds == pytest.approx(0.2) and alone.images_per_second == pytest.approx(20)
    assert alone.efficiency == 1 and alone.sent == 0


def test_a_fast_link_costs_nothing_and_a_slow_one_everything() -> None:
    sizes = Sizes(trained=10**9, images=1)
    for link, efficiency in ((1e15, 1.0), (1e3, 0.0)):
        cluster = Cluster(64, link=link, bus=1e15, latency=0.0, bus_latency=0.0, step=1.0)
        assert step_time(sizes, exchange_traffic(sizes, 64), cluster).efficiency == pytest.approx(
            efficiency, abs=1e-6
        )
