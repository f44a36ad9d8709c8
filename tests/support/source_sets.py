"""Writes one set of images for every kind of source, into a folder on disk or in a bucket."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from dreamfleet.datasets.storage.storage import Storage

COUNT = 3  # images of a set
Photos = dict[str, tuple[bytes, str]]  # name of a file -> its bytes, and its caption


def photos(seed: int) -> Photos:
    """Return smooth PNG images of 48 x 40 pixels with captions."""
    rng, found = np.random.default_rng(seed), {}
    for number in range(COUNT):
        buffer = io.BytesIO()
        cells = Image.fromarray(rng.integers(0, 255, (4, 4, 3), dtype=np.uint8))
        cells.resize((48, 40), Image.Resampling.BICUBIC).save(buffer, "PNG")
        found[f"{number}.png"] = buffer.getvalue(), f"a photo of set {seed}, number {number}"
    return found


def _folder(place: Storage, found: Photos) -> str:
    for name, (data, caption) in found.items():
        place.write_bytes(f"images/{name}", data)
        place.write_text(f"images/{name.removesuffix('.png')}.txt", caption)
    return place.path("images")


def _tar(place: Storage, found: Photos) -> str:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, (data, caption) in found.items():
            for member, content in ((name, data), (name.replace(".png", ".txt"), caption.encode())):
                info = tarfile.TarInfo(member)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    place.write_bytes("shard-000.tar", buffer.getvalue())
    return place.path("shard-000.tar")


def _table(found: Photos) -> pa.Table:
    rows = [{"bytes": data, "path": name} for name, (data, _) in found.items()]
    return pa.table({"image": rows, "text": [caption for _, caption in found.values()]})


def _parquet(place: Storage, found: Photos) -> str:
    sink = pa.BufferOutputStream()
    pq.write_table(_table(found), sink, row_group_size=2)
    place.write_bytes("part.parquet", sink.getvalue().to_pybytes())
    return place.path("part.parquet")


def _arrow(place: Storage, found: Photos) -> str:
    sink, table = pa.BufferOutputStream(), _table(found)
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    place.write_bytes("data.arrow", sink.getvalue().to_pybytes())
    return place.path("data.arrow")


def _jsonl(place: Storage, found: Photos) -> str:
    folder = _folder(place, found)
    lines = [
        json.dumps({"url": f"{folder}/{name}", "caption": caption}) for name, (_, caption) in found.items()
    ]
    place.write_text("list.jsonl", "\n".join(lines))
    return place.path("list.jsonl")


def _csv(place: Storage, found: Photos) -> str:
    _folder(place, found)
    lines = ["path,caption", *(f'images/{name},"{caption}"' for name, (_, caption) in found.items())]
    place.write_text("list.csv", "\n".join(lines))
    return place.path("list.csv")


#: Writes a set into a folder and returns its address, by the kind of the source.
WRITERS: dict[str, Callable[[Storage, Photos], str]] = {
    "folder": _folder,
    "tar": _tar,
    "parquet": _parquet,
    "arrow": _arrow,
    "jsonl": _jsonl,
    "csv": _csv,
}


def write_sources(place: str) -> dict[str, str]:
    """Write a set of each kind into a folder of its own in ``place``; return their addresses by kind."""
    return {
        kind: write(Storage(place).child(kind), photos(seed))
        for seed, (kind, write) in enumerate(WRITERS.items())
    }
