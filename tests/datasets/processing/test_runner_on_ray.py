"""Test the `data` commands on a local Ray: the same results as in one process, errors of workers, and continuation."""

from __future__ import annotations

import functools
import json
import os
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from image_files import image, put
from typer.testing import CliRunner

from dreamfleet.cluster.cli import program
from dreamfleet.datasets.errors import ModelError, RunFailed
from dreamfleet.datasets.index import facts, tar_source
from dreamfleet.datasets.index.set_store import open_set
from dreamfleet.datasets.processing import mapping
from dreamfleet.datasets.processing.mapping import in_threads
from dreamfleet.datasets.processing.runner import Row, Workers, process
from dreamfleet.datasets.storage.storage import Storage

pytestmark = pytest.mark.cluster


def run(*words: Any) -> Any:
    done = CliRunner().invoke(program.app, ["data", *(str(word) for word in words)])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def local_ray() -> Iterator[str]:
    import ray

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import the tests
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


class Double:
    """Doubles numbers, and names its process."""

    def __init__(self, broken: str = "") -> None:
        if broken == "model":
            raise ModelError("there is no such model")
        self.broken = broken

    def __call__(self, rows: list[Row]) -> list[Row]:
        if self.broken:
            raise ZeroDivisionError(self.broken)
        return [{"number": 2 * row["number"], "process": os.getpid()} for row in rows]


def test_rows_are_processed_by_tasks_and_actors_in_several_windows(
    local_ray: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dreamfleet.datasets.processing.runner.WINDOW_ROWS", 20)
    workers = Workers(2, True, {"CPU": 1.0})
    rows = [{"number": number} for number in range(30)]
    for keeps in (False, True):
        found = list(process(iter(rows), Double, workers, batch_size=4, keeps=keeps))
        assert sorted(row["number"] for row in found) == list(range(0, 60, 2))
        assert os.getpid() not in {row["process"] for row in found}


def test_errors_of_workers_keep_their_kind(local_ray: str) -> None:
    workers = Workers(1, True, {"CPU": 1.0})
    with pytest.raises(ModelError, match="no such model"):
        list(process([{"number": 1}], functools.partial(Double, "model"), workers, batch_size=1, keeps=True))
    with pytest.raises(RunFailed, match=r"ZeroDivisionError: lost.* same command"):
        list(process([{"number": 1}], functools.partial(Double, "lost"), workers, batch_size=1))


def test_prepare_on_a_cluster_writes_what_one_process_writes(local_ray: str, tmp_path: Path) -> None:
    for number in range(9):
        put(tmp_path, f"in/{number}.png", image(number, size=(40 + number, 30)))
        put(tmp_path, f"in/{number}.txt", f"number {number}".encode())
    put(tmp_path, "in/cut.png", image(5, size=(90, 90))[:2000])
    words = ["prepare", tmp_path / "in", "--size", 16, "--json"]
    there = run(*words[:2], tmp_path / "there", *words[2:], "--address", local_ray)
    assert "truncated" in there["pictures"]["cut.png"]["reason"] and len(there["pictures"]) == 10
    assert (tmp_path / "there" / "3.txt").read_text() == "number 3\n"
    assert not (tmp_path / "there" / ".in-progress").exists()
    shards = ["--to", "shards", "--shard-format", "parquet", "--address", local_ray]
    sharded = run(*words[:2], tmp_path / "shards", *words[2:], *shards)
    names = {one["outputs"][0]["shard"] for one in sharded["pictures"].values() if one["outputs"]}
    assert names == {path.name for path in (tmp_path / "shards").glob("*.parquet")} == {"000001.parquet"}


def test_an_index_is_built_by_tasks_as_in_one_process(
    local_ray: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DREAMFLEET_CACHE", str(tmp_path / "cache"))
    for number in range(40):
        put(tmp_path, f"set/{number}.png", image(number, size=(40 + number, 30)))
        put(tmp_path, f"set/{number}.txt", f"number {number}".encode())
    put(tmp_path, "set/cut.png", image(5, size=(90, 90))[:2000])
    for shard in range(3):
        with tarfile.open(put(tmp_path, f"shards/{shard}.tar", b""), "w") as tar:
            for number in range(3):
                tar.add(tmp_path / "set" / f"{3 * shard + number}.png", f"{number}.png")
    sets = {name: str(tmp_path / name) for name in ("set", "shards")}
    how = {"set": {"verify": True, "phash": True}, "shards": {"verify": False}}
    one = {
        name: open_set(url, store=Storage(tmp_path / "one" / name), mapper=in_threads, **how[name])
        for name, url in sets.items()
    }

    def refuse(*words: Any) -> Any:
        raise AssertionError("read in this process")

    monkeypatch.setattr(mapping, "MANY_IMAGES", 2)
    monkeypatch.setattr(mapping, "MANY_SHARDS", 2)
    monkeypatch.setattr(mapping, "FREE_SECONDS", 300.0)
    monkeypatch.setenv("DREAMFLEET_CACHE", str(tmp_path / "other cache"))
    monkeypatch.setattr(facts, "read_image_file", refuse)
    monkeypatch.setattr(tar_source, "members", refuse)
    for name, url in sets.items():
        found = open_set(url, store=Storage(tmp_path / "two" / name), **how[name])
        assert found.rows.equals(one[name].rows) and found.errors.equals(one[name].errors)
        assert found.counts == one[name].counts and found.counts.bad == (name == "set")
    assert open_set(sets["shards"], verify=False).rows.equals(one["shards"].rows)  # from this machine's cache

    import ray

    @ray.remote(num_cpus=2)
    class Hog:
        def here(self) -> bool:
            return True

    hog = Hog.remote()  # as workers of a training that hold all CPUs
    ray.get(hog.here.remote())
    monkeypatch.undo()
    monkeypatch.setattr(mapping, "MANY_IMAGES", 2)
    monkeypatch.setattr(mapping, "FREE_SECONDS", 0.0)
    found = open_set(sets["set"], store=Storage(tmp_path / "three"), **how["set"])
    assert found.rows.equals(one["set"].rows)
    ray.kill(hog)
