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

import pyarrow.parquet as pq
import pytest
from image_files import image, put
from PIL import Image
from tiny_tagger import write_tagger
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


def write_set(folder: Path) -> Path:
    """Write a red, a blue and a noisy image, and one that cannot be read."""
    for name, colour in (("red", (255, 0, 0)), ("blue", (0, 0, 255))):
        folder.mkdir(exist_ok=True)
        Image.new("RGB", (16, 16), colour).save(folder / f"{name}.png")
    put(folder, "noise.png", image(1, size=(32, 32)))
    put(folder, "cut.png", image(5, size=(90, 90))[:2000])
    return folder


def test_caption_and_measure_on_a_cluster_write_what_one_process_writes(
    local_ray: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Actors load the tagger, whose tags are colours; the columns filter the set that was measured."""
    from dreamfleet.trainers.driver import data_workers

    folder, tagger = write_set(tmp_path / "set"), write_tagger(tmp_path / "wd")
    tables = {
        place: [tmp_path / f"{name}-{place}.parquet" for name in ("c", "m")] for place in ("ray", "here")
    }
    for place, (captions, measures) in tables.items():
        if place == "here":
            monkeypatch.setattr(data_workers, "uses_cluster", lambda address: False)
        where = ["--address", local_ray] if place == "ray" else []
        words = ["--tagger", tagger, "--batch-size", 2, "--json", *where]
        made = run("caption", folder, "--out", captions, *words)
        assert len(made["captions"]) == 3 and list(made["failed"]) == ["cut.png"]
        assert run("measure", folder, "--out", measures, "--json", *where)["new"] == 3
    read = {
        place: [sorted(pq.read_table(path).to_pylist(), key=lambda row: row["url"]) for path in paths]
        for place, paths in tables.items()
    }
    assert read["ray"] == read["here"]
    rows = {Path(row["url"]).name: row for row in read["ray"][0]}
    assert rows["blue.png"]["caption"] == "blue sky" and "red hat" in rows["red.png"]["caption"]
    assert {Path(row["url"]).name: row["blur"] > 1000 for row in read["ray"][1]} == {
        "blue.png": False,
        "noise.png": True,
        "red.png": False,
    }


def test_inspect_on_a_cluster_reports_what_one_process_reports(
    local_ray: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dreamfleet.trainers.driver import data_workers

    folder = write_set(tmp_path / "set")
    there = run("inspect", folder, "--resolution", 16, "--json", "--address", local_ray)
    assert there["pictures"] == 3 and "truncated" in next(iter(there["bad"].values()))
    monkeypatch.setattr(data_workers, "uses_cluster", lambda address: False)
    assert run("inspect", folder, "--resolution", 16, "--json") == there
