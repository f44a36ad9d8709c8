"""The command `dreamfleet compare`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pyarrow.parquet
from local_pages import served_page
from searches import make_searched_folder
from typer.testing import CliRunner

from dreamfleet.cluster.cli import program
from dreamfleet.tune.blind import BlindPage
from dreamfleet.tune.votes import EQUAL, append_vote


def page_data(html: str) -> Any:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)
    assert found is not None
    return json.loads(found[1])


def test_the_command_saves_votes_and_writes_the_report(tmp_path: Path) -> None:
    store = make_searched_folder(tmp_path / "s")
    store.folder.write_text("search.yaml", store.recipe.to_yaml())
    store.save()
    comparison = BlindPage(store).comparisons[0]
    moved = (tmp_path / "s").rename(tmp_path / "moved")
    with served_page("compare", moved, ends_within=60) as page:
        html = page.get()
        assert page_data(html)["is_served"] and "Save votes" not in html
        answer = page.act(json.dumps({"id": comparison.id, "choice": "left"}))
        assert json.loads(answer.read()) == {"votes": 1}
    found = json.loads(page.output)
    assert found["votes"] == 1 and found["trials"][0]["trial"] == comparison.left
    table = pyarrow.parquet.read_table(moved / "trials.parquet").to_pylist()
    assert {row["trial"]: row["wins"] for row in table}[comparison.left] == 1 and sum(
        row["votes"] for row in table
    ) == 2
    assert "1 vote" in (moved / "report.html").read_text() and (moved / "compare.html").exists()
    assert json.loads((moved / "votes.jsonl").read_text())["winner"] == comparison.left


def test_votes_are_continued_after_a_kill(tmp_path: Path) -> None:
    store = make_searched_folder(tmp_path / "s")
    first, second, _ = BlindPage(store).comparisons
    append_vote(store.folder, first, "left")
    with open(tmp_path / "s" / "votes.jsonl", "a") as file:
        file.write('{"left": "trial-0')  # the command was killed while it wrote
    page = BlindPage(store)
    assert page_data(page.html("nonce"))["votes"] == {first.id: "left"}
    assert page.answer({"id": second.id, "choice": EQUAL}) == {"votes": 2}
    assert page_data(BlindPage(store).html("nonce"))["votes"] == {first.id: "left", second.id: "equal"}


def test_a_folder_without_a_search_is_reported(tmp_path: Path) -> None:
    result = CliRunner().invoke(program.app, ["compare", str(tmp_path), "--no-browser"])
    assert result.exit_code == 2 and "holds no search" in result.output
