"""The command `dreamfleet compare`."""

from __future__ import annotations

import http.client
import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet
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
    command = [
        sys.executable,
        "-m",
        "dreamfleet.cluster.cli",
        "compare",
        str(moved),
        "--no-browser",
        "--json",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        first = process.stderr.readline()
        match = re.search(r"http://127\.0\.0\.1:(\d+)/([\w-]+)/", first)
        assert match, first + process.stderr.read()
        connection = http.client.HTTPConnection("127.0.0.1", int(match[1]), timeout=10)
        connection.request("GET", f"/{match[2]}/")
        html = connection.getresponse().read().decode()
        assert page_data(html)["is_served"] and "Save votes" not in html
        body = json.dumps({"id": comparison.id, "choice": "left"})
        connection.request("POST", f"/{match[2]}/act", body, {"Content-Type": "application/json"})
        assert json.loads(connection.getresponse().read()) == {"votes": 1}
        connection.close()
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    found = json.loads(out)
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
