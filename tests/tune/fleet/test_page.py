"""The page of a fleet: its files, its data, and what an update writes."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pyarrow.parquet
import pytest
from fleets import HOSTILE, make_failed, make_row

from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.tune.fleet import page
from dreamfleet.tune.fleet.page import FleetPage, render_index, render_part
from dreamfleet.tune.fleet.rows import SubjectRow

VOID = {"meta", "input", "img", "br"}


class Reader(HTMLParser):
    """Collects tags, text and scripts; fails if tags are not closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in {"p", "option"}:
            assert tag in self.open, tag
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.text += data

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for found, attributes in self.tags if found == tag]


def data(script: str, number: int) -> dict[str, Any]:
    match = re.fullmatch(r"fleet\.add\((\d+), (\{.*\})\);\n", script)
    assert match and int(match[1]) == number
    return json.loads(match[2])  # type: ignore[no-any-return]


def make_page(folder: Path) -> FleetPage:
    return FleetPage(Storage(folder), title="my fleet", method="Textual Inversion")


def written(folder: Path) -> set[str]:
    """Return the files that were written since the last call."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "fleet.parquet"]
    changed = {path.relative_to(folder).as_posix() for path in files if path.stat().st_mtime_ns != 1}
    for path in files:
        os.utime(path, ns=(1, 1))
    return changed


class Slices(Sequence[SubjectRow]):
    """Rows of which only slices can be read, as those of a large fleet."""

    def __init__(self, rows: list[SubjectRow]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: Any) -> Any:
        assert isinstance(place, slice)
        return self.rows[place]


def test_the_index_loads_every_part_and_no_other_file() -> None:
    index = render_index(2, title=HOSTILE, method="Textual Inversion")
    reader = Reader(index)
    sources = [tag.get("src") for tag in reader.named("script")]
    assert [source for source in sources if source] == ["page/subjects-000.js", "page/subjects-001.js"]
    assert sources.index("page/subjects-000.js") > 0, "fleet is defined before the parts are loaded"
    assert HOSTILE.split(" \u2028")[0] in reader.text and not reader.named("img")
    assert index.count("onerror") == index.count("&lt;img src=x onerror") == 2  # the title and the heading
    assert "innerHTML" not in index and "fetch(" not in index
    labels = [tag for tag in reader.named("button") if tag.get("id") in ("first", "previous", "next", "last")]
    assert len(labels) == 4 and all(tag.get("aria-label") for tag in labels)
    assert reader.named("meta")[1]["name"] == "viewport"


def test_a_part_contains_the_rows_safely() -> None:
    rows = [
        make_row(3, name=HOSTILE.replace("/", "|")),
        make_failed(4, reason=HOSTILE),
        make_row(5, scores={"clip_i": float("nan"), "dino": 0.123456789}),
    ]
    script = render_part(0, rows, written=1.5e9)
    assert "<" not in script and "\u2028" not in script
    part = data(script, 0)
    assert part["scores"] == [
        ["clip_i", "CLIP-I", True],
        ["holdout_loss", "held-out loss", False],
        ["dino", "DINO", True],
    ]
    first, second, third = part["rows"]
    assert first[0] == rows[0].name and second[:3] == ["cat 4", "failed", HOSTILE]
    assert first[5] == [0.03, 0.97, None] and third[5] == [None, None, 0.123457]
    # Links keep their meaning for every character of a name.
    for url, path in ((first[6], rows[0].report), (first[7], rows[0].images and rows[0].images.thumbnail)):
        assert unquote(url) == path and not re.search(r'[#?%"<> ](?![0-9A-F]{2})', url) and ":" not in url
    assert first[8] == ["base", "tuned", "real"] and second[6:9] == [None, None, []]


def test_an_update_writes_the_changed_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "PART", 10)
    rows = [SubjectRow(f"cat {n}", n) for n in range(25)]
    fleet = make_page(tmp_path)
    fleet.update(Slices(rows), [])
    assert written(tmp_path) == {"index.html", *(f"page/subjects-00{n}.js" for n in range(3))}
    rows[12] = make_row(12)
    fleet.update(Slices(rows), [12])
    assert written(tmp_path) == {"page/subjects-001.js"}
    part = data((tmp_path / "page/subjects-001.js").read_text(), 1)
    assert [row[1] for row in part["rows"]].count("completed") == 1 and len(part["rows"]) == 10
    rows += [SubjectRow(f"more {n}", 25 + n) for n in range(10)]  # a resume with a longer table
    fleet.update(Slices(rows), range(25, 35), final=True)
    assert written(tmp_path) == {"index.html", "page/subjects-002.js", "page/subjects-003.js"}
    assert (
        sum(len(data((tmp_path / f"page/subjects-00{n}.js").read_text(), n)["rows"]) for n in range(4)) == 35
    )
    statuses = pyarrow.parquet.read_table(tmp_path / "fleet.parquet")["status"].to_pylist()
    assert statuses.count("completed") == 1 and len(statuses) == 35


def test_the_table_takes_a_small_share_of_the_time_while_a_fleet_runs(tmp_path: Path) -> None:
    now = [0.0]

    def clock() -> float:
        now[0] += 1.0  # so that writing the table takes a second
        return now[0]

    fleet = FleetPage(Storage(tmp_path), title="f", method="m", clock=clock)
    fleet.update([SubjectRow("a")])

    def count() -> int:
        return pyarrow.parquet.read_table(tmp_path / "fleet.parquet").num_rows

    two = [SubjectRow("a"), SubjectRow("b")]
    fleet.update(two, [1])
    assert count() == 1
    now[0] += 100
    fleet.update(two, [1])
    assert count() == 2
    fleet.update([*two, SubjectRow("c")], [2], final=True)
    assert count() == 3


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
@pytest.mark.parametrize(
    ("address", "names"),
    [
        ("#sort=clip_i", ["cat 10", "cat 1", "cat 0", HOSTILE]),  # higher is better; without a score last
        ("#sort=clip_i&order=ascending", ["cat 0", "cat 1", "cat 10", HOSTILE]),
        ("#sort=holdout_loss", ["cat 10", "cat 1", "cat 0", HOSTILE]),  # lower is better
        ("#status=failed&find=100%25+QUOTED", [HOSTILE]),
        ("#find=CAT+1&sort=name&order=descending&page=9", ["cat 10", "cat 1"]),
    ],
)
def test_a_browser_sorts_and_filters_the_subjects(tmp_path: Path, address: str, names: list[str]) -> None:
    rows = [make_row(0), make_failed(4, HOSTILE, HOSTILE), make_row(1), make_row(10)]
    make_page(tmp_path).update(rows)
    command = ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=2000"]
    command += [
        f"--user-data-dir={tmp_path / 'browser'}",
        "--dump-dom",
        f"file://{tmp_path}/index.html{address}",
    ]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert [html.unescape(name) for name in re.findall(r"<bdi>(.*?)</bdi>", shown)] == names
    assert "<img src=x" not in shown.replace('"', "")
