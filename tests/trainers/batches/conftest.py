"""Fixtures of the tests of batches: a small Ray on this machine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module")
def two_cpus() -> Iterator[None]:
    """Start a Ray with two CPUs on this machine, unless this process is connected to one."""
    import ray

    started_here = not ray.is_initialized()
    if started_here:
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    if started_here:
        ray.shutdown()
