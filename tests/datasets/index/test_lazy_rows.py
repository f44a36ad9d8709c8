"""Test that rows of an index are made when they are used, and equal those of lists."""

from __future__ import annotations

import re
import tracemalloc

import numpy as np
import pyarrow as pa
import pytest

from dreamfleet.datasets.index import lazy_rows
from dreamfleet.datasets.index.image_index import SCHEMA, Index, Row
from dreamfleet.datasets.index.lazy_rows import LazyRows
from dreamfleet.datasets.shard_order import shard_numbers


def index_of(count: int) -> Index:
    digests = [f"{number:064x}" for number in range(count)]
    columns = {
        "id": [digest[-16:] for digest in digests],
        "uri": [f"/images/{number}.png" for number in range(count)],
        "caption": [f"number {number}" if number % 3 else None for number in range(count)],
        "sha256": digests,
        "role": ["instance"] * count,
    }
    constants = {"width": 40, "height": 30, "concept": 0, "repeats": 2, "fraction": 0.25}
    arrays = [
        pa.array(columns.get(field.name, [constants.get(field.name)] * count), field.type) for field in SCHEMA
    ]
    return Index(pa.Table.from_arrays(arrays, schema=SCHEMA))


def test_lazy_rows_are_a_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lazy_rows, "AT_ONCE", 7)
    index = index_of(30)
    rows = index.lazily(SCHEMA.names, Row)
    assert isinstance(rows, LazyRows) and len(rows) == 30
    assert list(rows) == index.rows() and rows[29] == rows[-1] == index.row(29)
    assert rows[3:9:2] == index.rows()[3:9:2]
    with pytest.raises(IndexError):
        rows[30]
    assert index.sizes()[4] == (40, 30) and list(index.sizes()) == [(40, 30)] * 30
    assert index.uses().tolist() == [2.25] * 30


def test_a_large_index_makes_few_objects() -> None:
    index = index_of(20_000)
    tracemalloc.start()
    samples = index.lazily(("id", "caption", "uri"), lambda *values: values)
    assert sum(caption is None for _, caption, _ in samples) == 6667 and samples[19_999][0].endswith("4e1f")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4_000_000  # a list of the samples has 8 MB


def test_shards_are_numbered_in_the_order_of_their_names() -> None:
    uris = [
        "tar://b.tar#0-1#x",
        "/z.png",
        "edited://0,0,1,1/tar://a.tar#5-9#y",
        "tar://b.tar#7-9#z",
        "tar://a.tar#1-2#w",
    ]
    files = [re.sub(r"^edited://[^/]*/", "", uri).partition("#")[0] for uri in uris]
    assert (
        shard_numbers(iter(uris)).tolist()
        == np.unique(files, return_inverse=True)[1].tolist()
        == [2, 0, 1, 2, 1]
    )
