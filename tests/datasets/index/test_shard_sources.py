"""Test sources other than folders: tar shards, Parquet, Arrow, tables of addresses, with bad input of each kind."""

from __future__ import annotations

import hashlib
import http.server
import io
import json
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from image_files import image, put

from dreamfleet.datasets.config import DataConfig
from dreamfleet.datasets.errors import DataError, StorageError
from dreamfleet.datasets.index import table_source, tar_source, url_policy
from dreamfleet.datasets.index.set_store import OpenSet, open_set
from dreamfleet.datasets.index.sources import find_source, read_image_file
from dreamfleet.datasets.index.url_source import fetch


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DREAMFLEET_CACHE", str(tmp_path_factory.mktemp("cache")))


def opened(url: str | Path, **data: Any) -> OpenSet:
    """Open a set, and check that the counts add up and each image is read with the hash in the table."""
    found = open_set(str(url), DataConfig.model_validate({"instance_data_dir": str(url), **data}))
    counts = found.counts
    assert counts.seen == counts.used + counts.bad + counts.excluded
    for row in found.table.to_pylist():
        assert hashlib.sha256(read_image_file(row["uri"])).hexdigest() == row["sha256"]
    return found


def write_tar(path: Path, members: dict[str, bytes], *others: tarfile.TarInfo) -> Path:
    with tarfile.open(path, "w") as tar:
        for info in others:
            tar.addfile(info)
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def link(name: str, target: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = tarfile.SYMTYPE, target
    return info


def reasons(found: OpenSet) -> str:
    return "\n".join(f"{row['uri']}: {row['reason']}" for row in found.errors.to_pylist())


# ---- tar shards ------------------------------------------------------------------------------------------------------


def test_tar_shards_are_read_by_ranges_with_captions_masks_and_facts(tmp_path: Path) -> None:
    for shard in range(2):
        members: dict[str, bytes] = {}
        for number in range(3):
            key = f"{shard}{number}"
            members |= {
                f"{key}.png": image(shard * 10 + number),
                f"{key}.mask.png": image(50 + number),
                f"{key}.json": json.dumps({"score": number, "text": "from json"}).encode(),
            }
        members["00.txt"] = b"from text"
        write_tar(tmp_path / f"s-{shard:02d}.tar", members)
    found = opened(tmp_path)
    rows = {row["name"]: row for row in found.table.to_pylist()}
    assert len(rows) == 6 and found.counts.bad == 0
    assert rows["s-00/00.png"]["caption"] == "from text" and rows["s-00/01.png"]["caption"] == "from json"
    assert rows["s-01/12.png"]["score"] == 2 and rows["s-01/12.png"]["mask"].endswith("#12.mask.png")
    assert opened(f"{tmp_path}/s-{{00..01}}.tar", where="score >= 1").counts.used == 4
    assert opened(f"{tmp_path}/*.tar").counts.used == 6
    assert opened(tmp_path / "s-01.tar").counts.used == 3


def test_bad_members_of_a_tar_are_named_and_the_others_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tar_source, "MOST_IMAGE", 100_000)
    path = write_tar(
        tmp_path / "x.tar",
        {
            "/abs/a.png": image(1),
            "../up/b.png": image(2),
            "caf\u00e9.png": image(3),
            "cafe\u0301.txt": b"not this one's",
            "broken.png": b"no image",
            "inner.tar": b"x",
            "photo.heic": b"x",
            "huge.png": bytes(200_000),
            "bad.txt": b"\xff\xfe\x00",
            "bad.json": b"[" * 100_000,
            "notes.md": b"x",
        },
        link("link.png", "/etc/passwd"),
    )
    found = opened(path)
    assert sorted(found.table.column("name").to_pylist()) == [
        "x/abs/a.png",
        "x/caf\u00e9.png",
        "x/up/b.png",
    ]
    text = reasons(found)
    for name, reason in {
        "link.png": "a link to '/etc/passwd'",
        "broken.png": "not an image",
        "inner.tar": "inside a tar file",
        "photo.heic": "Convert",
        "huge.png": "200,000 bytes",
        "bad.txt": "not UTF-8",
        "bad.json": "not JSON",
    }.items():
        assert any(name in line and reason in line for line in text.splitlines()), (name, text)
    assert found.counts.bad == 7 and found.listing.others[".md"] == 1


def test_a_damaged_or_compressed_tar_is_named_and_what_precedes_the_damage_is_used(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "w.tar", {f"{n}.png": image(n) for n in range(4)}).read_bytes()
    put(tmp_path / "cut", "a.tar", whole[:2600])
    put(tmp_path / "cut", "b.tar", whole)
    found = opened(tmp_path / "cut")
    assert found.counts.used == 6 and "a.tar" in reasons(found)
    put(tmp_path / "z", "c.tar", b"\x1f\x8b" + whole)
    with pytest.raises(DataError, match=r"compressed by gzip"):
        open_set(str(tmp_path / "z" / "c.tar")).require_images()


def test_sparse_members_and_huge_headers_are_refused(tmp_path: Path) -> None:
    sparse = tarfile.TarInfo("s.png")
    sparse.type = tarfile.GNUTYPE_SPARSE
    found = opened(write_tar(tmp_path / "s.tar", {"a.png": image(1)}, sparse))
    assert found.counts.used == 1 and "sparse" in reasons(found)
    pax = tarfile.TarInfo("p")
    pax.type, pax.size = tarfile.XHDTYPE, 8 * 2**30
    put(tmp_path, "p.tar", pax.tobuf(tarfile.GNU_FORMAT) + bytes(2**20))
    with pytest.raises(DataError, match="header of"):
        open_set(str(tmp_path / "p.tar")).require_images()


def test_an_unchanged_shard_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    path = write_tar(tmp_path / "x.tar", {f"{n}.png": image(n) for n in range(3)})
    os.utime(path, (1_000_000, 1_000_000))
    first = open_set(str(path), verify=False)
    monkeypatch.setattr(tar_source, "members", None)
    assert open_set(str(path), verify=False).rows.equals(first.rows)
    os.utime(path, (1_000_001, 1_000_001))
    with pytest.raises(TypeError):
        open_set(str(path), verify=False)


# ---- Parquet and Arrow -----------------------------------------------------------------------------------------------


def hugging_face_table(count: int) -> pa.Table:
    images = [{"bytes": image(n), "path": f"{n}.png"} for n in range(count)]
    return pa.table(
        {"image": images, "text": [f"number {n}" for n in range(count)], "score": list(range(count))}
    )


def test_parquet_with_images_is_read_row_by_row(tmp_path: Path) -> None:
    bad = pa.table(
        {
            "image": [{"bytes": None, "path": "none"}, {"bytes": b"junk", "path": "junk"}, None],
            "text": ["a", "b", "c"],
            "score": [7, 8, 9],
        },
        hugging_face_table(1).schema,
    )
    table = pa.concat_tables([hugging_face_table(5), bad])
    (tmp_path / "set").mkdir()
    pq.write_table(table, tmp_path / "set" / "part.parquet", row_group_size=3)
    found = opened(tmp_path / "set", where="score != 1")
    assert found.counts == (8, 4, 3, 1)
    assert {row["caption"] for row in found.table.to_pylist()} == {f"number {n}" for n in (0, 2, 3, 4)}
    for row in (6, 7, 8):
        assert f"row {row}:" in reasons(found)


def test_parquet_without_images_or_with_wrong_types_is_explained(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [[1, 2]], "x": [{"a": {"b": 1}}]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"no column with images.*image \(list.*x \(struct"):
        open_set(str(tmp_path / "a.parquet"))
    pq.write_table(pa.table({"one": [b"x"], "two": [b"y"]}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match="one, two all contain bytes"):
        open_set(str(tmp_path / "b.parquet"))
    put(tmp_path, "c.parquet", b"PAR1 no")
    with pytest.raises(DataError, match="not a readable Parquet"):
        open_set(str(tmp_path / "c.parquet"))
    pq.write_table(pa.table({"url": ["a.png"], "text": [5]}), tmp_path / "d.parquet")
    assert "row 1" in reasons(opened(tmp_path / "d.parquet"))


def test_arrow_files_are_read_by_ranges(tmp_path: Path) -> None:
    table = hugging_face_table(6)
    with (
        pa.OSFile(str(tmp_path / "data-0.arrow"), "wb") as sink,
        pa.ipc.new_stream(sink, table.schema) as writer,
    ):
        writer.write_table(table, max_chunksize=4)
    with (
        pa.OSFile(str(tmp_path / "data-1.arrow"), "wb") as sink,
        pa.ipc.new_file(sink, table.schema) as writer,
    ):
        writer.write_table(table.slice(1, 3))
    found = opened(tmp_path)
    assert found.counts == (9, 9, 0, 0)
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with (
        pa.OSFile(str(tmp_path / "z.arrow"), "wb") as sink,
        pa.ipc.new_stream(sink, table.schema, options=options) as w,
    ):
        w.write_table(table)
    with pytest.raises(DataError, match="compressed"):
        open_set(str(tmp_path / "z.arrow"))


def test_a_folder_of_images_with_a_parquet_table_stays_a_folder(tmp_path: Path) -> None:
    put(tmp_path, "a.png", image(1))
    pq.write_table(pa.table({"file_name": ["a.png"], "text": ["x"]}), tmp_path / "metadata.parquet")
    assert find_source(str(tmp_path)).name == "folder"
    assert opened(tmp_path).table.column("caption").to_pylist() == ["x"]


# ---- tables of addresses ---------------------------------------------------------------------------------------------


@pytest.fixture
def web(tmp_path: Path) -> Iterator[tuple[str, Path, list[str]]]:
    folder, asked = tmp_path / "web", []
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            if self.path.startswith("/away"):
                self.send_response(302)
                self.send_header("Location", self.path.partition("?to=")[2])
                self.end_headers()
            else:
                super().do_GET()

        def translate_path(self, path: str) -> str:
            return str(folder / path.strip("/"))

        def log_message(self, *args: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}", folder, asked
    server.shutdown()
    server.server_close()
    thread.join()


def test_images_on_the_web_are_fetched_once_and_private_addresses_only_if_allowed(
    tmp_path: Path, web: tuple[str, Path, list[str]]
) -> None:
    address, folder, asked = web
    put(folder, "a.png", image(1))
    put(tmp_path, "b.png", image(2))
    rows = [
        {"url": f"{address}/a.png", "text": "web"},
        {"url": "b.png", "text": "local"},
        {"url": "https://user:word@example.org/a.png"},
        {"url": f"{address}/none.png"},
        {"text": "no address"},
        {"url": 7},
    ]
    put(tmp_path, "t.jsonl", "\n".join(map(json.dumps, rows)) + "\n{bad\n[1]\n")
    found = opened(tmp_path / "t.jsonl", allow_private_urls=True)
    assert found.counts == (8, 2, 6, 0)
    assert asked.count("/a.png") == 1
    text = reasons(found)
    assert "row 3" in text and "login" in text and "word" not in text
    assert "404" in text and "(row 4 of its table)" in text
    for row in (5, 6, 7, 8):
        assert f"row {row}:" in text
    refused = opened(tmp_path / "t.jsonl")
    assert refused.counts.used == 1 and "private network" in reasons(refused)
    put(folder, "t.csv", "url,caption\na.png,x\n")
    assert opened(f"{address}/t.csv", allow_private_urls=True).table.column("caption").to_pylist() == ["x"]


def test_redirects_and_damaged_copies_in_the_cache(
    tmp_path: Path, web: tuple[str, Path, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    address, folder, asked = web
    put(folder, "a.png", image(1))
    assert fetch(f"{address}/away?to={address}/a.png", allow_private=True) == image(1)
    with pytest.raises(StorageError, match="redirects"):
        fetch(f"{address}/away?to=file:///etc/passwd", allow_private=True)
    with pytest.raises(StorageError, match="login"):
        fetch(f"{address}/away?to=http://u:p@127.0.0.1/", allow_private=True)
    fetch(f"{address}/a.png", allow_private=True)
    (copy,) = (
        p
        for p in (Path(__import__("os").environ["DREAMFLEET_CACHE"]) / "urls").rglob("*")
        if p.is_file() and p.name == hashlib.sha256(f"{address}/a.png".encode()).hexdigest()
    )
    copy.write_bytes(copy.read_bytes()[:-1])
    assert fetch(f"{address}/a.png", allow_private=True) == image(1)
    assert asked.count("/a.png") == 3


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "10.1.2.3",
        "169.254.169.254",
        "[::1]",
        "[::ffff:10.0.0.1]",
        "[64:ff9b::a00:1]",
        "0.0.0.0",
        "LOCALHOST.",
    ],
)
def test_private_addresses_are_recognised_in_every_form(host: str) -> None:
    with pytest.raises(DataError, match="private network"):
        url_policy.check_url(f"http://{host}/a.png", allow_private=False)
    url_policy.check_url(f"http://{host}/a.png", allow_private=True)


def test_a_name_that_resolves_to_a_private_address_is_refused() -> None:
    with pytest.raises(StorageError, match="private network"):
        url_policy.resolve("localhost", 80, allow_private=False)


def test_rows_of_csv_with_wrong_cells_are_named(tmp_path: Path) -> None:
    put(tmp_path, "1990.png", image(1))
    put(
        tmp_path, "t.csv", b'path,caption,score\n1990.png,1990,0.5\n1990.png,x,1,2\n\xff.png,y,1\n"open,z,1\n'
    )
    found = opened(tmp_path / "t.csv", where="score < 1")
    assert found.table.column("caption").to_pylist() == ["1990"] and found.counts.bad == 3
    put(tmp_path, "u.csv", "caption\nx\n")
    with pytest.raises(DataError, match="no column with addresses"):
        open_set(str(tmp_path / "u.csv"))


def test_a_line_that_is_too_long_is_skipped_without_holding_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table_source, "MOST_LINE", 1000)
    put(tmp_path, "a.png", image(1))
    line = json.dumps({"url": "a.png", "text": "x" * 5000})
    put(tmp_path, "t.jsonl", f"{line}\n" + json.dumps({"url": "a.png"}) + "\n")
    found = opened(tmp_path / "t.jsonl")
    assert found.counts == (2, 1, 1, 0) and "row 1: a line of more than" in reasons(found)
