"""Tests of the copy of a training's state in host memory."""

from __future__ import annotations

from typing import Any

import torch

from dreamfleet.trainers.run.host_copy import HostCopy


def test_a_copy_keeps_the_values_of_its_moment_in_buffers_that_are_used_again() -> None:
    weights = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    moments = {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(5, dtype=torch.bfloat16)}}
    groups = [{"lr": 0.1, "params": [0]}]
    state: dict[str, Any] = {
        "learned": {"w": weights},
        "engine": {"state": moments, "groups": groups, "t": (1, 2)},
    }
    before, copier = weights.clone(), HostCopy()
    first = copier.take(state)
    copier.wait()
    weights.add_(1)
    moments[0]["step"].add_(1)
    groups[0]["lr"] = 0.2
    assert torch.equal(first["learned"]["w"], before) and first["engine"]["state"][0]["step"] == 3
    assert first["engine"]["groups"] == [{"lr": 0.1, "params": [0]}] and first["engine"]["t"] == (1, 2)
    assert first["learned"]["w"].stride() == weights.stride(), "so that the copy moves one block"
    assert first["engine"]["state"][0]["exp_avg"].dtype == torch.bfloat16
    places = [first["learned"]["w"].data_ptr(), first["engine"]["state"][0]["step"].data_ptr()]
    second = copier.take(state)
    assert [second["learned"]["w"].data_ptr(), second["engine"]["state"][0]["step"].data_ptr()] == places
    assert torch.equal(second["learned"]["w"], weights)
    assert copier.nbytes == weights.nbytes + 4 + 10


def test_a_tensor_that_changes_its_shape_gets_a_new_buffer() -> None:
    copier = HostCopy()
    assert copier.take({"a": torch.zeros(2)})["a"].shape == (2,)
    assert torch.equal(copier.take({"a": torch.ones(3)})["a"], torch.ones(3))
