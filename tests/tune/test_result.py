"""The results of searches and runs in a notebook."""

from __future__ import annotations

import re
from pathlib import Path

from searches import make_searched_folder

from dreamfleet.tune.result import SearchResult
from dreamfleet.tune.trial_store import TrialStore


def make_result(store: TrialStore, folder: Path) -> SearchResult:
    return SearchResult(
        exit_reason="completed",
        trials=store.ranking(),
        best=store.best,
        metric="holdout_loss",
        metrics=["holdout_loss", "clip_i"],
        folder=str(folder),
        best_recipe=None,
        table=str(folder / "trials.parquet"),
        report=str(folder / "report.html"),
    )


def test_a_search_shows_images_and_its_trials(tmp_path: Path) -> None:
    store = make_searched_folder(tmp_path / "my-search")
    html = make_result(store, tmp_path / "my-search")._repr_html_()
    assert "my-search" in html and "completed · 5 trials" in html and "report.html" in html
    assert html.count("<img") == 3 and html.count("data:image/webp;base64,") == 3
    rows = re.findall(r"<tr>\s*(.*?)</tr>", html, re.S)
    assert len(rows) == 6 and "held-out loss" in rows[0] and "CLIP-I" in rows[0]
    assert (
        "trial-001" in rows[1] and "font-weight:600" in rows[1] and "font-weight:600" not in "".join(rows[2:])
    )
    assert "best.yaml" not in html and "<style" not in html and "<script" not in html
    assert html.count("<div") == html.count("</div>")


def test_the_table_remains_when_the_folder_is_gone(tmp_path: Path) -> None:
    store = make_searched_folder(tmp_path / "s")
    html = make_result(store, tmp_path / "moved")._repr_html_()
    assert "<img" not in html and "trial-001" in html
    (tmp_path / "moved").write_text("a file where the folder was")
    html = make_result(store, tmp_path / "moved")._repr_html_()
    assert "<img" not in html and "trial-001" in html


def test_hostile_text_is_escaped(tmp_path: Path) -> None:
    store = make_searched_folder(tmp_path / "s")
    for trial in store.trials:
        trial.point = {"method.initializer_token": "<script>alert(1)</script>"}
    html = make_result(store, tmp_path / "s")._repr_html_()
    assert "<script" not in html and "&lt;script&gt;" in html
