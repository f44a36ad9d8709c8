"""The report of a search with artificial trials."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from searches import make_recipe, make_searched_folder, make_trials

from dreamfleet.tune.plots import log_ticks
from dreamfleet.tune.report import render
from dreamfleet.tune.trial_store import Trial, TrialStore


def test_the_report_shows_trials_and_previews(tmp_path: Path) -> None:
    page = render(make_searched_folder(tmp_path / "my-search"))
    assert "my-search" in page and "2 completed" in page and "--resume" in page
    sheet = page[page.index('table class="sheet"') : page.index("</table>")]
    assert re.findall(r"<tr><th>(\d)</th>", sheet) == ["1", "2", "4"]
    assert sheet.count("<img") == 3  # two completed trials and a stopped one
    assert sheet.count('class="best"') == 1 and "trial-001" in sheet.split('class="best"')[1]
    table = page[page.index('table class="trials"') :]
    assert table.count("<tr") == 6 and "the loss is &lt;no&gt; number" in table
    assert "trials/trial-001/report.html" in table
    assert "http" not in page.replace("http://www.w3.org", "")


def test_hostile_text_is_escaped(tmp_path: Path) -> None:
    store = make_searched_folder(tmp_path / "s")
    hostile = '"><script>alert(1)</script>'
    store.trials[4].error = hostile
    space = {"method.initializer_token": {"distribution": "choice", "values": [hostile, "cat"]}}
    store = TrialStore(make_recipe(tmp_path / "s", space=space), store.trials)
    for trial in store.trials:
        trial.point = {"method.initializer_token": hostile}
    page = render(store)
    assert "<script>alert" not in page and page.count("&lt;script&gt;alert(1)") >= 5
    assert '=""' not in page and page.count("<script>") == 1


def test_the_image_sheet_has_bins_for_many_learning_rates(tmp_path: Path) -> None:
    store = make_searched_folder(tmp_path / "s")
    for number in range(20):
        rate = 1e-4 * 10 ** (3 * number / 20)
        rounds = [{"step": 20, "holdout_loss": 1.0}]
        point = {"optimizer.learning_rate": rate, "method.num_vectors": 1}
        store.trials.append(Trial(f"more-{number}", point, "completed", rounds))
    page = render(store)
    head = page[page.index("<thead>") : page.index("</thead>")]
    assert head.count("<th>") == 7 and "1e-4 – 3.2e-4" in head and "best of 4" in page


def test_the_report_of_a_search_without_measurements(tmp_path: Path) -> None:
    store = TrialStore(make_recipe(tmp_path / "s"), make_trials()[4:])
    page = render(store)
    assert "1 failed" in page and 'table class="sheet"' not in page
    assert "0 trials" in render(TrialStore(make_recipe(tmp_path / "s")))


def test_a_diverged_loss_does_not_flatten_the_other_trials(tmp_path: Path) -> None:
    store = make_searched_folder(tmp_path / "s")
    store.trials[2].rounds[-1]["holdout_loss"] = 1e6
    ticks = re.findall(r'class="y" style="[^"]*"><i>([^<]*)<', render(store))
    assert ticks and all(float(tick) < 2 for tick in ticks)


def test_text_and_booleans_are_axes_of_the_image_sheet(tmp_path: Path) -> None:
    space = {
        "optimizer.lr_scheduler": {"distribution": "choice", "values": ["constant", "cosine"]},
        "data.random_flip": {"distribution": "choice", "values": [True, False]},
    }
    store = make_searched_folder(tmp_path / "s", space=space)
    for trial, word in zip(store.trials, ("constant", "cosine", "constant", "cosine", "cosine"), strict=True):
        trial.point = {"optimizer.lr_scheduler": word, "data.random_flip": word == "cosine"}
    page = render(store)
    assert "lr_scheduler&nbsp;→" in page and "random_flip&nbsp;↓" in page


def test_log_ticks_are_round_and_few() -> None:
    assert log_ticks(9e-4, 2.1e-2) == pytest.approx([1e-3, 2e-3, 5e-3, 1e-2, 2e-2])
    assert log_ticks(1e-6, 1.0) == pytest.approx([10.0**k for k in range(-6, 1)])
