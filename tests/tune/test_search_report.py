"""The report of a search with artificial trials."""

from __future__ import annotations

import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
from searches import (
    make_many_trials,
    make_recipe,
    make_recipe_of_two_metrics,
    make_searched_folder,
    make_trials,
)

from dreamfleet.tune.plots import log_ticks
from dreamfleet.tune.report import render, write_search_report
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


class Outline(HTMLParser):
    """Checks that the tags of a page are balanced, and collects headings and the marks of each trial."""

    VOID = frozenset({"meta", "img", "br", "input", "link", "hr"})

    def __init__(self, page: str):
        super().__init__()
        self.open: list[str] = []
        self.headings: list[str] = []
        self.keys: Counter[str] = Counter()
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        self.keys.update(value for name, value in attrs if name == "data-key" and value)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


def test_a_report_of_100_trials_has_every_section(tmp_path: Path) -> None:
    recipe = make_recipe_of_two_metrics(tmp_path / "s")
    store = TrialStore(recipe, make_many_trials(100))
    page = render(store)
    outline = Outline(page)
    wanted = [
        "Best trial",
        "Pareto front",
        "Measurements",
        "Importance of the keys",
        "Cost",
        "All trials",
        "Recipe",
    ]
    assert outline.headings == wanted
    # Each trial: two curves, two axes plots, a Pareto plot, a line through all keys, and its row of the table.
    assert len(outline.keys) == 100 and all(count >= 7 for count in outline.keys.values())
    front = page[page.index("Pareto front</h2>") : page.index("Measurements</h2>")]
    assert re.findall(r">(trial-\d+)</a>", front) == [trial.name for trial in store.front()]
    curves = page[page.index("Held-out loss of the trials") :].split("</figure>")[0]
    assert curves.count('class="key') == 4 and curves.count('class="faint c4"') == 96
    assert curves.index('class="faint c4"') < curves.index('class="dots c0"')
    shares = re.findall(r"(\d+) %</td>", page[page.index("Importance") : page.index("Cost</h2>")])
    assert len(shares) == 4 and int(shares[0]) > 80


def test_the_table_can_be_sorted(tmp_path: Path) -> None:
    page = render(TrialStore(make_recipe(tmp_path / "s"), make_trials()))
    table = page[page.index('table class="trials"') :]
    assert table.count("<th data-sorts") == 7
    assert '<td data-value="0.001">0.001</td>' in table and '<td data-value="10">10</td>' in table


def test_the_report_names_the_trials_whose_weights_are_kept(tmp_path: Path) -> None:
    store = TrialStore(make_recipe(tmp_path / "s"), make_trials())
    assert "weights kept" not in render(store), "before anything was removed"
    for trial in store.trials:
        trial.kept = trial is store.best
    rows = [row for row in render(store).split("<tr") if "completed, weights kept" in row]
    assert len(rows) == 1 and "trial-001" in rows[0]


def test_the_report_of_one_metric_has_no_pareto_front(tmp_path: Path) -> None:
    outline = Outline(render(make_searched_folder(tmp_path / "s")))
    assert "Pareto front" not in outline.headings and "Previews" in outline.headings


def test_writing_the_report_writes_the_comparison_if_there_are_previews(tmp_path: Path) -> None:
    store = make_searched_folder(tmp_path / "s")
    write_search_report(store)
    page = (tmp_path / "s" / "report.html").read_text()
    assert 'href="compare.html"' in page and (tmp_path / "s" / "compare.html").exists()
    Outline((tmp_path / "s" / "compare.html").read_text())
    for trial in store.trials:
        store.folder.remove(f"{trial.folder}/samples")
    write_search_report(store)
    assert not (tmp_path / "s" / "compare.html").exists()
    assert "compare.html" not in (tmp_path / "s" / "report.html").read_text()
