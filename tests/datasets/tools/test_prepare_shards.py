"""Test shards of `data prepare`, and that a killed call is continued: nothing is lost, repeated or left over."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from image_files import image, put
from PIL import Image

from dreamfleet.datasets.errors import DataError, StorageError
from dreamfleet.datasets.images.crops import Cutting
from dreamfleet.datasets.index.sources import SourceImage
from dreamfleet.datasets.processing.journal import Journal
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.datasets.tools.image_set import names_of
from dreamfleet.datasets.tools.outputs import Sample, ShardOutput, Shards
from dreamfleet.datasets.tools.prepare import MANIFEST, prepare
from dreamfleet.datasets.tools.prepare_options import Preparing

HOW = Preparing(Cutting((512, 512)), flip=True)  # random pixels: 0.8 MB for each PNG
ONE_MB = Shards("tar", 2)


def write_set(folder: Path, count: int = 4) -> Path:
    for number in range(count):
        put(folder, f"{number % 2}_cats/{number}.png", image(number, size=(520, 512)))
        put(folder, f"{number % 2}_cats/{number}.txt", f"number {number}".encode())
    put(folder, "0_cats/0.mask.png", image(9, size=(520, 512)))
    put(folder, "broken.png", b"x")
    return folder


def members(shard: Path) -> dict[str, bytes]:
    with tarfile.open(shard) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]


def shards_of(made: dict[str, Any], name: str) -> set[str]:
    return {output["shard"] for output in made["pictures"][name]["outputs"]}


def test_tar_shards_hold_image_caption_and_mask_under_one_key(tmp_path: Path) -> None:
    source, out = write_set(tmp_path / "in"), tmp_path / "out"
    made = prepare(str(source), str(out), HOW, shards=ONE_MB)
    files = sorted(out.glob("*.tar"))
    assert len(files) > 1 and all(file.stat().st_size <= 2 * 2**20 for file in files)
    assert {file.name for file in files} == {
        shard for name in made["pictures"] for shard in shards_of(made, name)
    }
    found: dict[str, bytes] = {}
    for file in files:
        found |= members(file)
    assert {name.partition(".")[2] for name in found} == {"png", "txt", "mask.png", "json"}
    assert len(found) == 8 * 3 + 2 and found["1_cats/3-flip.txt"] == b"number 3"
    with Image.open(io.BytesIO(found["0_cats/2.png"])) as opened:
        pixels = np.asarray(opened)
    facts = json.loads(found["0_cats/2.json"])
    assert pixels.shape == (512, 512, 3) and facts["box"] == [4.0, 0.0, 516.0, 512.0] and not facts["flip"]
    assert "not an image" in made["pictures"]["broken.png"]["reason"]


def test_parquet_shards_are_images_of_hugging_face_datasets(tmp_path: Path) -> None:
    source = write_set(tmp_path / "in")
    prepare(str(source), str(tmp_path / "out"), HOW, shards=Shards("parquet", 100))
    (file,) = (tmp_path / "out").glob("*.parquet")
    table = pq.read_table(file)
    features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    assert features["image"] == {"_type": "Image"} and set(features) == set(table.column_names)
    rows = {row["image"]["path"]: row for row in table.to_pylist()}
    row = rows["0_cats/0.png"]
    assert row["text"] == "number 0" and row["mask"]["path"] == "0_cats/0.mask.png" and row["width"] == 512
    assert Image.open(io.BytesIO(row["image"]["bytes"])).size == (512, 512)
    assert pq.ParquetFile(file).metadata.num_row_groups == 1 and len(rows) == 8


def test_only_shards_with_changed_images_are_written_again(tmp_path: Path) -> None:
    source, out = write_set(tmp_path / "in"), tmp_path / "out"
    first = prepare(str(source), str(out), HOW, shards=ONE_MB)
    before = {file.name: file.stat().st_mtime_ns for file in out.glob("*.tar")}
    assert prepare(str(source), str(out), HOW, shards=ONE_MB) == first
    assert {file.name: file.stat().st_mtime_ns for file in out.glob("*.tar")} == before
    (source / "0_cats" / "2.txt").write_text("changed")
    put(source, "new.png", image(20, size=(512, 512)))
    put(out, "000999-1.tar", b"left by a killed call")
    again = prepare(str(source), str(out), HOW, shards=ONE_MB)
    after = {file.name: file.stat().st_mtime_ns for file in out.glob("*.tar")}
    changed = shards_of(first, "0_cats/2.png")
    assert changed.isdisjoint(after) and "000999-1.tar" not in after
    kept = before.keys() - changed
    assert kept and all(after[name] == before[name] for name in kept)
    assert shards_of(again, "new.png") <= after.keys() and len(again["pictures"]) == 6
    texts = [members(out / shard)["0_cats/2.txt"] for shard in shards_of(again, "0_cats/2.png")]
    assert texts[0] == b"changed"
    with pytest.raises(DataError, match="other settings"):
        prepare(str(source), str(out), HOW)
    put(source, "0_cats/a.b.png", image(20, size=(512, 512)))
    put(source, "0_cats/a_b.png", image(21, size=(512, 512)))
    with pytest.raises(DataError, match=r"both become 0_cats/a_b"):
        prepare(str(source), str(tmp_path / "other"), HOW, shards=ONE_MB)


def test_a_group_that_was_estimated_too_small_continues_in_another_shard(tmp_path: Path) -> None:
    output = ShardOutput(Storage(str(tmp_path)), "tar", 100_000)
    with output.open(7) as write:
        written = [
            write(Sample(f"{number}", "png", bytes(40_000), None, None, {"size": [8, 8]}))["shard"]
            for number in range(5)
        ]
    assert written == ["000007.tar"] * 2 + ["000007-1.tar"] * 2 + ["000007-2.tar"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(set(written))
    with pytest.raises(TypeError), output.open(8) as write:
        write(Sample("a", "png", b"x", None, None, {"size": b"no JSON"}))  # fails after the shard was opened
    assert not (tmp_path / "000008.tar").exists()


KILLED = """
import os, signal, sys
from dreamfleet.datasets.images.crops import Cutting
from dreamfleet.datasets.processing import journal
from dreamfleet.datasets.tools import prepare as module
from dreamfleet.datasets.tools.prepare_options import Preparing
module.Journal = lambda folder, name: journal.Journal(folder, name, seconds=0)
module.BATCH = 1
def progress(done, total):
    if done == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
shards = module.Shards("tar", 2) if sys.argv[4] == "shards" else None
how = Preparing(Cutting((512, 512)), flip=True)
module.prepare(sys.argv[1], sys.argv[2], how, shards=shards, progress=progress)
"""


@pytest.mark.parametrize("to", ["folder", "shards"])
def test_a_killed_call_is_continued(tmp_path: Path, to: str) -> None:
    source, out = write_set(tmp_path / "in"), tmp_path / "out"
    script = textwrap.dedent(KILLED)
    killed = subprocess.run([sys.executable, "-c", script, source, out, "3", to], check=False)
    assert killed.returncode == -9
    assert json.loads((out / MANIFEST).read_text())["pictures"] == {}
    done_at: list[int] = []
    shards = ONE_MB if to == "shards" else None
    made = prepare(str(source), str(out), HOW, shards=shards, progress=lambda done, _: done_at.append(done))
    assert done_at[0] >= 2 and done_at[-1] == 5, "the images of the killed call are not prepared again"
    whole = prepare(str(source), str(tmp_path / "whole"), HOW, shards=shards)
    assert {name: len(one["outputs"]) for name, one in made["pictures"].items()} == {
        name: len(one["outputs"]) for name, one in whole["pictures"].items()
    }
    if to == "folder":
        assert made == whole
    left = {path.name for path in out.iterdir() if path.is_file()} - {MANIFEST, "broken.png"}
    used = (
        {output["shard"] for one in made["pictures"].values() for output in one["outputs"]}
        if shards
        else set()
    )
    assert left == used and not (out / ".in-progress").exists()


def test_a_journal_survives_its_process_and_reports_broken_parts(tmp_path: Path) -> None:
    folder = Storage(str(tmp_path))
    first = Journal(folder, "tags", seconds=1e9, rows=2)
    for number in range(5):
        first.add({"number": number})
    assert [row["number"] for row in Journal(folder, "tags").read()] == [0, 1, 2, 3]
    second = Journal(folder, "tags", seconds=0)
    second.add({"number": 9})
    assert [row["number"] for row in Journal(folder, "tags").read()] == [0, 1, 2, 3, 9]
    assert list(Journal(folder, "other").read()) == []
    put(tmp_path, ".in-progress/tags-000002.jsonl", b'{"number": 1}\n{"numb')
    with pytest.raises(StorageError, match="tags-000002"):
        list(Journal(folder, "tags").read())
    Journal(folder, "tags").clear()
    assert not list(tmp_path.iterdir())


def test_images_of_any_source_get_different_names() -> None:
    uris = ["tar:///d/a.tar#0/x.jpg", "tar:///d/b.tar#0/x.jpg", "tar:///d/b.tar#1/../y z.jpg"]
    assert names_of([SourceImage(uri) for uri in uris]) == [
        "a.tar/0/x.jpg",
        "b.tar/0/x.jpg",
        "b.tar/1/_/y z.jpg",
    ]
    same = names_of([SourceImage("t://a/x?.png"), SourceImage("t://a/x#.png")])
    assert len(set(same)) == 2
    assert names_of([SourceImage("/a/b/é.png"), SourceImage("/a/c/é.png")]) == ["b/é.png", "c/é.png"]
