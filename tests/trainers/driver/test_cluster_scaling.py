"""Tests of the resources of each worker, and of requests that no cluster can fill; no cluster is started."""

import pytest

from dreamfleet.datasets.errors import ResourceError
from dreamfleet.trainers.config.scaling import (
    ScalingConfig,
    describe,
    refuse_impossible,
    refuse_shared_gpus,
    worker_resources,
    workers_that_fit,
)

GPU_NODE = {"CPU": 8.0, "GPU": 1.0, "memory": 1e10, "node:10.0.0.2": 1.0}


def scaling(**fields: object) -> ScalingConfig:
    return ScalingConfig.model_validate(fields)


@pytest.mark.parametrize(
    ("cpus", "workers", "reserved", "threads"),
    [
        ([2], 1, 1, 2),  # one CPU is left for Ray's tasks; torch uses both
        ([2], 2, 1, 1),
        ([1], 2, 0.5, 1),
        ([2], 3, 0.66, 1),
        ([16], 2, 7, 8),
        ([64], 2, 28, 32),
        ([4, 8], 2, 3, 4),  # 6 each would not fit on the smaller machine
        ([3, 3, 3], 3, 2, 3),
    ],
)
def test_cpu_workers_get_equal_shares(cpus: list[int], workers: int, reserved: float, threads: int) -> None:
    nodes = [{"CPU": float(count)} for count in cpus]
    share = worker_resources(scaling(num_workers=workers), nodes)
    assert share.resources == {"CPU": pytest.approx(reserved)}
    assert share.threads == threads
    assert not share.uses_gpu
    assert workers_that_fit(share.resources, nodes) >= workers


def test_gpu_workers_leave_cpus_for_decoding() -> None:
    share = worker_resources(scaling(num_workers=2), [GPU_NODE, GPU_NODE])
    assert share.resources == {"CPU": 1.0, "GPU": 1.0}
    assert share.threads == 8
    assert share.uses_gpu


def test_gpus_of_an_autoscaler_count_before_they_exist() -> None:
    head = [{"CPU": 0.0}]
    assert not worker_resources(scaling(), head).uses_gpu
    assert worker_resources(scaling(num_workers=4), head, limit={"CPU": 32, "GPU": 4}).uses_gpu


def test_too_few_gpus_are_an_error_with_remedies() -> None:
    with pytest.raises(ResourceError, match=r"scaling\.num_workers=1"):
        worker_resources(scaling(num_workers=2), [GPU_NODE])
    with pytest.raises(ResourceError, match="has no GPU"):
        worker_resources(scaling(use_gpu=True), [{"CPU": 2.0}])
    assert not worker_resources(scaling(num_workers=2, use_gpu=False), [GPU_NODE]).uses_gpu


def test_explicit_resources_take_precedence() -> None:
    shared = worker_resources(scaling(num_workers=2, resources_per_worker={"GPU": 0.5, "CPU": 2}), [GPU_NODE])
    assert shared.resources == {"CPU": 2.0, "GPU": 0.5}
    assert shared.threads == 2
    assert worker_resources(scaling(cpus_per_worker=3), [{"CPU": 8.0}]).resources == {"CPU": 3.0}


def test_impossible_requests_are_errors_with_numbers() -> None:
    nodes = [{"CPU": 4.0}, {"CPU": 4.0}]
    wants = scaling(num_workers=2, cpus_per_worker=5)
    with pytest.raises(ResourceError, match=r"2 with 5 CPU .* 2 machines \(4 CPU; 4 CPU\).* 0"):
        refuse_impossible(wants, {"CPU": 5.0}, nodes)
    refuse_impossible(scaling(num_workers=2), {"CPU": 4.0}, nodes)
    with pytest.raises(ResourceError, match="STRICT_PACK"):
        refuse_impossible(scaling(num_workers=2, placement_strategy="STRICT_PACK"), {"CPU": 4.0}, nodes)
    with pytest.raises(ResourceError, match="1 GPU"):
        refuse_impossible(scaling(num_workers=2), {"GPU": 1.0}, [], limit={"GPU": 1})
    refuse_impossible(scaling(num_workers=2), {"GPU": 1.0}, [], limit={"GPU": 2})


def test_resources_are_described_without_internal_ones() -> None:
    assert describe(GPU_NODE) == "8 CPU, 1 GPU"
    assert describe({}) == "nothing"


@pytest.mark.parametrize(
    ("gpus", "workers", "backend", "share"),
    [
        (1.0, 2, "nccl", 1.0),
        (0.5, 2, "gloo", 0.5),
        (0.5, 1, "nccl", 0.5),
        (2.0, 2, "nccl", 1.0),
        (0.0, 2, "gloo", 1.0),
    ],
)
def test_workers_that_share_a_gpu_use_gloo(gpus: float, workers: int, backend: str, share: float) -> None:
    resources = {"CPU": 1, "GPU": gpus}
    given = worker_resources(
        scaling(num_workers=workers, use_gpu=gpus > 0, resources_per_worker=resources), [GPU_NODE]
    )
    assert (given.backend(workers), given.gpu_share) == (backend, share)


def test_sharding_over_a_shared_gpu_is_an_error() -> None:
    share = worker_resources(scaling(num_workers=2, resources_per_worker={"GPU": 0.5}), [GPU_NODE])
    two = scaling(num_workers=2)
    with pytest.raises(ResourceError, match=r"engine\.zero_stage: 2 .*0\.5"):
        refuse_shared_gpus(two, share, engine="engine.zero_stage: 2")
    refuse_shared_gpus(scaling(num_workers=1), share, engine="engine.zero_stage: 2")
