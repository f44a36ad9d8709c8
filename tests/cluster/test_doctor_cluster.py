"""Tests of what `doctor --address` concludes from the facts of machines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dreamfleet.cluster import doctor_cluster as doctor
from dreamfleet.cluster.finding import Finding
from dreamfleet.datasets.storage.probe import probe_storage
from dreamfleet.trainers.driver.node_facts import expected_workers, node_facts
from dreamfleet.trainers.driver.node_probe import Failed, Transfer
from dreamfleet.trainers.driver.session import Node

GIB = 2**30
ONE, TWO = Node("1" * 8, "10.0.0.1", {"GPU": 1.0}), Node("2" * 8, "10.0.0.2", {"object_store_memory": 4e8})


def facts(**changes: Any) -> dict[str, Any]:
    """Return what this machine reports, with changes; it has enough of everything, and no GPU."""
    room = {"total": 100 * GIB, "free": 50 * GIB}
    return {**node_facts(), "shared_memory": room, "disk": room, "gpus": [], "expected": None, **changes}


def only(found: list[Finding], name: str) -> Finding:
    (finding,) = [each for each in found if each.name == name]
    assert finding.state == "ok" or finding.remedy, "a finding states its remedy"
    return finding


def test_versions_that_differ_are_named_with_their_machines() -> None:
    here = facts()
    other = facts(versions={**here["versions"], "torch": "2.11.0", "peft": None})
    found = doctor.compare_versions({ONE: here, TWO: other})
    torch = only(found, "version of torch")
    assert torch.state == "MISSING" and "2.11.0 on 10.0.0.2" in torch.detail
    assert only(found, "version of peft").state == "note"
    assert only(doctor.compare_versions({ONE: here, TWO: facts()}), "versions").state == "ok"


@pytest.mark.parametrize(
    ("offset", "state"), [(0.4, "ok"), (-2.0, "note"), (2.0, "note"), (900.0, "MISSING"), (-900.0, "MISSING")]
)
def test_clocks(offset: float, state: str) -> None:
    found = doctor.compare_clocks({ONE: (0.0, 0.01), TWO: (offset, 0.01)})
    assert [each.state for each in found] == [state]
    assert state == "ok" or "10.0.0.2" in found[0].detail


def test_a_slow_measurement_is_no_skew() -> None:
    assert doctor.compare_clocks({TWO: (3.0, 4.0)})[0].state == "ok"


def test_memory_gpus_and_drivers() -> None:
    gpu = {"name": "L4", "driver": "570.1", "memory": "24 GiB"}
    small = facts(shared_memory={"total": GIB, "free": GIB // 16}, gpus=[gpu])
    machines = {ONE: small, TWO: facts(gpus=[{**gpu, "driver": "580.2"}])}
    assert "10.0.0.1" in only(doctor.compare_memory(machines), "/dev/shm").detail
    found = doctor.compare_gpus(machines)
    assert only(found, "gpu drivers").state == "note"
    unseen = [each for each in found if each.state == "note" and each.name == "gpus"]
    assert len(unseen) == 1 and "Ray offers 0" in unseen[0].detail


def test_machines_that_are_missing() -> None:
    local = {"provider": {"worker_ips": ["10.0.0.2", "10.0.0.3"]}}
    aws = {"head_node_type": "h", "available_node_types": {"h": {}, "a": {"min_workers": 2}, "b": {}}}
    assert (expected_workers(local), expected_workers(aws), expected_workers({})) == (2, 2, None)
    machines = {ONE: facts(expected=2, has_rsync=False), TWO: Failed("no answer within 120 seconds")}
    found = doctor.compare_numbers(machines, ["10.0.0.9"], None)
    assert "no answer" in only(found, "machine").detail
    missing = only(found, "machines")
    assert missing.state == "MISSING" and "1 of 2" in missing.detail and "rsync" in missing.remedy
    assert "10.0.0.9" in only(found, "lost machines").detail
    assert not doctor.compare_numbers({ONE: facts(), TWO: facts()}, [], 1)


def test_storage(tmp_path: Path) -> None:
    good = probe_storage(str(tmp_path / "store"))
    assert good["error"] is None and set(good["seconds"]) == {"write", "read", "list", "remove"}
    assert not [path for path in (tmp_path / "store").iterdir() if not path.name.startswith(".lock")]
    (tmp_path / "file").write_text("")
    bad = probe_storage(str(tmp_path / "file"))
    assert bad["failed"] == "write" and "file" in bad["error"]
    unsafe = {**good, "conditional": False}
    found = doctor.compare_storage("s3://b/x", {ONE: good, TWO: bad})
    assert [each.state for each in found] == ["ok", "MISSING"]
    assert doctor.compare_storage("s3://b/x", {ONE: unsafe})[0].state == "note"


def test_links() -> None:
    links = [
        Transfer(ONE, TWO, 10**8, 0.1),
        Transfer(TWO, ONE, 10**8, 10.0),
        Failed("10.0.0.1 to 10.0.0.2: lost"),
    ]
    fast, slow, lost = doctor.compare_links(links)
    assert fast.state == "ok" and "8.00 Gbit/s" in fast.detail
    assert slow.state == "note" and slow.remedy and lost.state == "MISSING"
    assert doctor.transfer_size([ONE, TWO]) == 10**8
