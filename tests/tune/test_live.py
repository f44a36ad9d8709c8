"""The trials of a search on the terminal."""

from __future__ import annotations

import io
import logging
import re
from pathlib import Path

import pytest
from searches import make_recipe, make_trials

from dreamfleet.tune.live import Column, SearchDisplay, fit_columns, total_width
from dreamfleet.tune.trial_store import Trial, TrialStore, format_trial


class Terminal(io.StringIO):
    """A stream that is a terminal."""

    def isatty(self) -> bool:
        return True


def last_table(terminal: io.StringIO) -> str:
    """Return the text of the last table that was drawn, without escape sequences."""
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", terminal.getvalue())
    return text[text.rindex("my-search:") :]


@pytest.fixture
def store(tmp_path: Path) -> TrialStore:
    store = TrialStore(make_recipe(tmp_path / "my-search"), make_trials())
    store.trials.append(
        Trial("trial-005", store.trials[0].point, rounds=[{"step": 10, "holdout_loss": 0.25}])
    )
    return store


@pytest.fixture
def size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("LINES", "14")
    monkeypatch.setenv("TERM", "xterm-256color")


def test_without_a_terminal_every_change_is_a_line(store: TrialStore) -> None:
    stream = io.StringIO()
    display = SearchDisplay(store, stream=stream)
    display.say("4 trials")
    for trial in store.trials[:2]:
        display.show(trial)
    display.close()
    lines = [format_trial(trial, ["holdout_loss"]) for trial in store.trials[:2]]
    assert stream.getvalue().splitlines() == ["4 trials", *lines]


@pytest.mark.usefixtures("size")
def test_a_terminal_shows_running_trials_and_the_best(store: TrialStore) -> None:
    terminal = Terminal()
    display = SearchDisplay(store, stream=terminal)
    display.show(store.trials[5])
    table = last_table(terminal)
    assert "4 of 6 trials, 1 running, 1 stopped, 1 failed" in table
    rows = [line.split() for line in table.splitlines() if line.startswith("trial-")]
    assert [row[0] for row in rows] == ["trial-005", "trial-001", "trial-000", "trial-002"]
    assert rows[0][3:5] == ["0.25", "10/100"] and rows[0][-1] == "best"
    assert (
        rows[1][3:5] == ["0.3", "20"] and rows[1][-1] == "completed" and "best held-out loss 0.25," in table
    )
    store.trials[5].add_round({"step": 20, "holdout_loss": 0.1})
    store.trials[5].status = "completed"
    display.show(store.trials[5])
    display.close()
    final = last_table(terminal)
    assert "5 of 6 trials" in final and "best held-out loss 0.1," in final and " running" not in final


@pytest.mark.usefixtures("size")
def test_a_table_of_many_trials_fits_the_terminal(store: TrialStore) -> None:
    terminal = Terminal()
    for n in range(6, 40):
        store.trials.append(Trial(f"trial-{n:03d}", store.trials[0].point, rounds=[]))
    display = SearchDisplay(store, stream=terminal)
    display.show(store.trials[5])
    display.close()
    lines = last_table(terminal).rstrip().splitlines()
    assert len(lines) <= 14 and sum(line.startswith("trial-") for line in lines) == 7
    assert lines[-1].startswith("trial-00") and "35 running" in lines[0]


@pytest.mark.usefixtures("size")
def test_messages_and_failures_appear_above_the_table(store: TrialStore) -> None:
    terminal = Terminal()
    log = logging.getLogger("dreamfleet")
    handler = logging.StreamHandler(terminal)
    log.addHandler(handler)
    try:
        display = SearchDisplay(store, stream=terminal)
        display.show(store.trials[0])
        log.warning("a [bold]warning[/bold]")
        display.show(store.trials[4])
        display.close()
        assert handler.stream is terminal
    finally:
        log.removeHandler(handler)
    text = terminal.getvalue()
    # The table is erased before a message is printed.
    assert text[: text.index("a [bold]warning[/bold]")].endswith("\x1b[2K")
    assert "trial-004 failed: the loss is <no> number" in text
    assert "warning" not in last_table(terminal)


@pytest.mark.parametrize("width", [60, 80, 120])
def test_no_value_is_cut_on_a_narrow_terminal(
    width: int, store: TrialStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("LINES", "20")
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    display = SearchDisplay(store, stream=terminal)
    display.show(store.trials[5])
    display.close()
    table = last_table(terminal)
    rows = [line.split() for line in table.splitlines() if line.startswith("trial-")]
    assert rows[1][:5] == ["trial-001", "0.002", "2", "0.3", "20"] and rows[1][-1] == "completed"
    assert "…" not in table and max(map(len, table.splitlines())) <= width


def test_columns_are_left_out_only_if_narrow_titles_do_not_suffice() -> None:
    columns = [
        Column("train_batch_size", ["16"]),
        Column("held-out loss", ["0.4142"]),
        Column("CLIP-I", ["0.5031"], is_optional=True),
        Column("time", ["12 s"], is_optional=True),
    ]
    assert fit_columns(columns, 47) == columns
    broken = fit_columns(columns, 46)
    assert [column.title for column in broken[:2]] == ["train_\nbatch_\nsize", "held-out\nloss"]
    assert len(broken) == 4 and total_width(broken) == 6 + 8 + 6 + 4 + 8
    assert [column.title for column in fit_columns(columns, 31)][2:] == ["CLIP-I"]
    assert len(fit_columns(columns, 10)) == 2
