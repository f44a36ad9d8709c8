"""Test the record of a fleet: files that are merged, and what an interruption may leave."""

from __future__ import annotations

from pathlib import Path

import pytest

from dreamfleet.datasets.errors import StorageError
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.tune.fleet import records
from dreamfleet.tune.fleet.records import Records


def write(fleet: Storage, count: int) -> Records:
    found = Records(fleet)
    for number in range(count):
        found.append([{"name": f"s{number}", "text": "a\u2028b"}])
    return found


@pytest.mark.parametrize("count", [0, 1, 7, 9, 40])
def test_lines_come_back_in_order_from_few_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    monkeypatch.setattr(records, "MERGED", 3)
    fleet = Storage(tmp_path)
    written = write(fleet, count)
    names = [f"s{number}" for number in range(count)]
    assert [line["name"] for line in written] == names
    again = Records(fleet)
    assert [line["name"] for line in again] == names
    assert all(line["text"] == "a\u2028b" for line in again)
    assert len(fleet.list("records")) <= 9
    again.append([{"name": "new"}, {"name": "newer"}])
    assert [line["name"] for line in Records(fleet)] == [*names, "new", "newer"]


def test_an_interrupted_merge_repeats_no_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "MERGED", 3)
    fleet = Storage(tmp_path)
    with monkeypatch.context() as patch:  # killed before it removes the small files
        patch.setattr(Storage, "remove", lambda self, name: None)
        write(fleet, 3)
    assert len(fleet.list("records")) == 4
    found = Records(fleet)
    assert [line["name"] for line in found] == ["s0", "s1", "s2"]
    found.append([{"name": "s3"}])
    assert [line["name"] for line in Records(fleet)] == ["s0", "s1", "s2", "s3"]


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    fleet = Storage(tmp_path)
    write(fleet, 1)
    (tmp_path / "records/00000000-00000000.jsonl").write_text("{\n")
    with pytest.raises(StorageError, match=r"00000000-00000000\.jsonl"):
        list(Records(fleet))
