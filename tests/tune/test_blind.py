"""The blind comparison of trials: which pairs are shown, the page, and the server of `dreamfleet compare`."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from searches import make_recipe, make_searched_folder, make_trials

from dreamfleet.datasets.errors import DataError, UserError
from dreamfleet.tune.blind import BlindPage, plan_comparisons
from dreamfleet.tune.report import render
from dreamfleet.tune.trial_store import TrialStore
from dreamfleet.tune.votes import read_votes

CELLS = [("a <x>", 0), ("a <x>", 1), ("a <x> at night", 0)]


def make_cells(*names: str) -> dict[str, dict[tuple[str, int], Any]]:
    return {name: dict.fromkeys(CELLS) for name in names}


def page_data(html: str) -> Any:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)
    assert found is not None
    return json.loads(found[1])


def test_every_pair_is_shown_once_before_any_is_shown_again() -> None:
    names = [f"trial-{n:03d}" for n in range(6)]
    plan = plan_comparisons(make_cells(*names), seed=0)
    pairs = [frozenset((one.left, one.right)) for one in plan]
    all_pairs = {frozenset(pair) for pair in itertools.combinations(names, 2)}
    for start in range(0, 45, 15):
        assert set(pairs[start : start + 15]) == all_pairs
    assert len(plan) == len({one.id for one in plan}) == 15 * len(CELLS)
    sides = Counter(one.left < one.right for one in plan)
    assert 10 < sides[True] < 35, "the better trial is not always on the same side"
    assert (
        plan
        == plan_comparisons(make_cells(*names[::-1]), seed=0)
        != plan_comparisons(make_cells(*names), seed=1)
    )


def test_a_longer_search_inserts_pairs_and_changes_none() -> None:
    before = plan_comparisons(make_cells("a", "b", "c"), seed=0)
    after = plan_comparisons(make_cells("a", "b", "c", "d"), seed=0)
    assert [one for one in after if "d" not in (one.left, one.right)] == before


def test_only_common_prompts_and_seeds_are_compared() -> None:
    cells = make_cells("a", "b") | {"c": {("another prompt", 0): None}}
    assert {(one.left, one.right) for one in plan_comparisons(cells, seed=0)} <= {("a", "b"), ("b", "a")}


def test_the_page_contains_everything_and_shows_no_names(tmp_path: Path) -> None:
    store = make_searched_folder(tmp_path / "s")
    html = BlindPage(store).html()  # trial-003 has measured the untuned model only
    data = page_data(html)
    assert len(data["images"]) == len(data["comparisons"]) == 3 and data["votes"] == {}
    assert all(image.startswith("data:image/webp;base64,") for image in data["images"])
    assert not re.search(r'(?:src|href)="|https?://|@import|url\(', html)
    assert "trial-0" not in html.replace(json.dumps(data["comparisons"]), "").split("<script")[0]
    assert "localStorage" in html and html.count("data-choice=") == 5


def test_answers_become_votes_that_the_page_remembers(tmp_path: Path) -> None:
    store = make_searched_folder(tmp_path / "s")
    page = BlindPage(store)
    first, second = page.comparisons[:2]
    assert page.answer({"id": first.id, "choice": "right"}) == {"votes": 1}
    page.answer({"id": second.id, "choice": "equal"})
    assert page.answer({"id": first.id, "choice": "left"}) == {"votes": 2}, (
        "an answer replaces the one before"
    )
    assert {vote.winner for vote in read_votes(store.folder)} == {first.left, "equal"}
    assert page_data(BlindPage(store).html())["votes"] == {first.id: "left", second.id: "equal"}
    for wrong in ({"id": "0" * 16, "choice": "left"}, {"id": first.id, "choice": "both"}):
        with pytest.raises(UserError, match="reload"):
            page.answer(wrong)
    assert page.report()["votes"] == 2


def test_hostile_prompts_stay_text(tmp_path: Path) -> None:
    store = make_searched_folder(tmp_path / "s")
    hostile = "</script><script>alert(1)</script>"
    for trial in store.trials[:4]:
        path = tmp_path / "s" / trial.folder / "samples" / "step-000020.jsonl"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"prompt": hostile}))
    html = BlindPage(store).html()
    assert "<script>alert" not in html and page_data(html)["comparisons"][0]["prompt"] == hostile


def test_the_report_shows_wins_and_how_often_the_metric_agrees(tmp_path: Path) -> None:
    store = make_searched_folder(tmp_path / "s")
    page = BlindPage(store)
    # The lower number is always preferred, so that trial-000 wins both its votes.
    for one in page.comparisons:
        page.answer({"id": one.id, "choice": "left" if one.left < one.right else "right"})
    html = render(store)
    assert "3 votes" in html and re.search(r"metric agrees: held-out loss \d of \d\.", html)
    row = next(row for row in html.split("<tr") if "trial-000</a></td>" in row and "2 of 2" in row)
    assert "preferred</button>" in html and re.search(r">\d\d %, 2 of 2<", row)


def test_trials_without_common_previews_are_reported(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"validation\.prompts"):
        BlindPage(TrialStore(make_recipe(tmp_path / "s"), make_trials()))


def test_the_best_trials_are_compared(tmp_path: Path) -> None:
    page = BlindPage(make_searched_folder(tmp_path / "s"), most=2)
    assert [{one.left, one.right} for one in page.comparisons] == [{"trial-000", "trial-001"}]
