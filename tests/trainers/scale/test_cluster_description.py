"""Tests the description of a cluster on the command line."""

import math

import pytest

from dreamfleet.datasets.errors import ResourceError
from dreamfleet.trainers.scale.cluster import EXAMPLE, GPUS, Cluster, parse_cluster


def test_the_short_and_the_long_form_are_the_same() -> None:
    short = parse_cluster("64xA100@400Gb,per_node=4,mtbf=12h")
    long = parse_cluster("gpus=64, gpu=a100, link=50GB/s, per_node=4, mtbf=43200s")
    assert short == long == Cluster(64, GPUS["a100"], per_node=4, link=50e9, mtbf=43_200.0)
    assert short.nodes == 16 and short.failure_interval == 2_700.0
    assert parse_cluster("8") == Cluster(8) and parse_cluster(EXAMPLE).gpus == 64


def test_every_setting_is_read() -> None:
    text = (
        "2x4090@10Gb,per_node=1,bus=20GB,latency=5ms,bus_latency=1us,mtbf=never,storage=100MB/s,restart=20s,"
        "regroup=500ms,overlap=0,utilisation=0.3,step=1.5m"
    )
    assert parse_cluster(text) == Cluster(
        2, GPUS["4090"], 1, 1.25e9, 20e9, 5e-3, 1e-6, math.inf, 1e8, 20.0, 0.5, 0.0, 0.3, 90.0
    )  # fmt: skip


def test_the_slowest_edge_carries_the_ring() -> None:
    assert Cluster(8).rate == GPUS["h100"].bus and Cluster(16).rate == 50e9
    assert Cluster(16, link=1e12).rate == GPUS["h100"].bus
    # 16 GPUs on 2 nodes: 14 hops inside and 2 on the network; 8 on one node: 8 inside.
    assert Cluster(16, latency=1e-3, bus_latency=1e-5).circle == pytest.approx(14e-5 + 2e-3)
    assert Cluster(8, latency=1e-3, bus_latency=1e-5).circle == pytest.approx(8e-5)


def test_a_small_all_reduce_takes_the_shorter_way() -> None:
    # 64 nodes of 8: up and down a tree of 6 levels on the network and a chain of 7 inside; the ring would take 0.137 s.
    large = Cluster(512, latency=1e-3, bus_latency=1e-5)
    assert large.all_reduce_wait == pytest.approx(2 * (6e-3 + 7e-5))
    # 2 nodes of 1: twice the one level, not twice around the ring with its two crossings.
    assert Cluster(2, per_node=1, latency=1e-3).all_reduce_wait == pytest.approx(2e-3)
    assert Cluster(8, bus_latency=1e-5).all_reduce_wait == pytest.approx(14e-5)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("many", "many"),
        ("link=400Gb", "number of GPUs"),
        ("64xH101", "H101"),
        ("64@400", "400"),
        ("64,link=0Gb", "link"),
        ("64,pernode=8", "per_node"),
        ("64,per_node=0", "per_node"),
        ("64,mtbf=0s", "mtbf"),
        ("64,mtbf=3", "mtbf"),
        ("64,overlap=80%", "overlap"),
        ("64,gpus=8", "twice"),
        ("64,", "known"),
    ],
)
def test_an_error_names_the_part(text: str, named: str) -> None:
    with pytest.raises(ResourceError, match=named):
        parse_cluster(text)


def test_an_all_to_all_shares_the_link_of_its_node() -> None:
    # 4 GPUs in 2 nodes: each sends 3/4 of 8 GB at 1 GB/s at most; two send half of theirs over a link of 2 GB/s.
    cluster = Cluster(4, per_node=2, bus=1e9, link=2e9, latency=1e-3, bus_latency=1e-5)
    assert cluster.all_to_all_seconds(8e9) == pytest.approx(max(6.0, 2 * 4 / 2))
    assert Cluster(4, per_node=2, bus=1e12, link=2e9).all_to_all_seconds(8e9) == pytest.approx(4.0)
    assert Cluster(4, per_node=4, bus=1e9, link=1.0).all_to_all_seconds(8e9) == pytest.approx(6.0)  # one node
    assert cluster.all_to_all_wait == pytest.approx(1e-3 + 3e-5)
