"""Test that a set's index is the same table whoever builds it: this process, or processes of this machine."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from image_files import image, put

from dreamfleet.datasets.config import DataConfig
from dreamfleet.datasets.errors import DataError
from dreamfleet.datasets.index.set_store import OpenSet, open_set
from dreamfleet.datasets.processing import mapping
from dreamfleet.datasets.processing.mapping import InProcesses, in_threads, mapper_of
from dreamfleet.datasets.processing.runner import Workers


@pytest.fixture(autouse=True)
def _small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapping, "MANY_IMAGES", 2)
    monkeypatch.setattr(mapping, "MANY_SHARDS", 2)
    monkeypatch.setenv("DREAMFLEET_CACHE", str(tmp_path / "cache"))


def fill(folder: Path, count: int = 7) -> str:
    """Write images, some with captions and masks, and two that cannot be used."""
    for number in range(count):
        put(folder, f"{number}.png", image(number, size=(40 + number, 30)))
        put(folder, f"{number}.txt", f"number {number}".encode())
    put(folder, "3.mask.png", image(1, size=(43, 30)))
    put(folder, "cut.png", image(5, size=(90, 90))[:2000])
    put(folder, "zero.png", b"")
    return str(folder)


def opened(url: str, mapper: mapping.Mapper, store: Path, **how: Any) -> OpenSet:
    from dreamfleet.datasets.storage.storage import Storage

    return open_set(url, DataConfig(instance_data_dir=url), store=Storage(store), mapper=mapper, **how)


def test_processes_build_the_same_table(tmp_path: Path) -> None:
    url = fill(tmp_path / "set")
    one = opened(url, in_threads, tmp_path / "one", verify=True, phash=True)
    two = opened(url, InProcesses(2), tmp_path / "two", verify=True, phash=True)
    assert one.rows.equals(two.rows) and one.rows.num_rows == 7 and one.counts.bad == 2
    assert one.errors.equals(two.errors) and "truncated" in str(two.errors.to_pylist())
    assert Path(one.address).read_bytes() == Path(two.address).read_bytes()


class Square(NamedTuple):
    """Squares numbers; raises for one of them."""

    broken: int = -1

    def of(self, text: str) -> tuple[int, int]:
        if int(text) == self.broken:
            raise DataError(f"{text} is broken")
        return int(text) ** 2, os.getpid()


def test_processes_keep_the_order_and_the_error_of_an_item() -> None:
    texts = [str(number) for number in range(300)]
    found = []
    with pytest.raises(DataError, match="290 is broken"):
        found.extend(InProcesses(2)(Square(290).of, texts))
    assert [square for square, _ in found] == [number**2 for number in range(len(found))] and len(found) > 200
    assert os.getpid() not in {process for _, process in found}
    assert {process for _, process in InProcesses(2)(Square().of, texts[:1])} == {os.getpid()}  # few


def test_workers_of_a_command_choose_the_mapper() -> None:
    assert mapper_of(Workers(1)) is in_threads
    assert mapper_of(Workers(3)) == InProcesses(3)
    assert isinstance(mapper_of(Workers(1, True)), mapping.OnCluster)


@pytest.mark.parametrize(
    ("uri", "seen"),
    [
        ("{here}", True),
        ("{here}.gone", False),
        ("file://{here}", True),
        ("tar://{here}#0-10#a.png", True),
        ("tar:///gone/a.tar#0-10#a.png", False),
        ("s3://bucket/a.png", True),
        ("tar://s3://bucket/a.tar#0-10#a.png", True),
        ("https://host/a.png", True),
        ("edited://0,0,0.5,1/{here}", False),  # not certain
    ],
)
def test_a_task_computes_only_what_its_machine_sees(tmp_path: Path, uri: str, seen: bool) -> None:
    uri = uri.format(here=put(tmp_path, "a.tar", b"x"))
    answer = mapping._call_there(len, [uri], {})
    assert answer.results == ([len(uri)] if seen else None)


def test_a_task_returns_an_error_that_users_can_fix(tmp_path: Path) -> None:
    def fail(error: Callable[[str], Exception], item: str) -> None:
        raise error(item)

    path = str(put(tmp_path, "a.png", b"x"))
    assert isinstance(mapping._call_there(partial(fail, DataError), [path], {}).error, DataError)
    with pytest.raises(ZeroDivisionError):
        mapping._call_there(partial(fail, ZeroDivisionError), [path], {})
