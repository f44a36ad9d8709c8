"""Shows a search's trials on the terminal: a live table, or a line for each change where there is no terminal."""

from __future__ import annotations

import logging
import re
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TextIO

from dreamfleet.trainers.config.metrics import figure_title
from dreamfleet.trainers.report import formatting
from dreamfleet.tune.trial_store import Trial, TrialStore, format_trial, format_value

REFRESHES_PER_SECOND = 2
GAP = 2  # spaces between columns; 1 if the table is too wide otherwise
BEST_SHOWN = 5  # finished trials in the table
BORDER_ROWS = 7  # two lines of headline, three of titles, the rule and a spare one


@dataclass(frozen=True)
class Column:
    """A column of the table; ``is_text`` aligns it to the left, ``is_optional`` lets a narrow terminal leave it out."""

    title: str
    cells: Sequence[str]
    is_text: bool = False
    is_optional: bool = False

    @property
    def width(self) -> int:
        """The characters of its widest line."""
        return max(map(len, [*self.title.splitlines(), *self.cells]), default=0)

    def with_broken_title(self) -> Column:
        """Return the column with its title in several lines, as wide as its cells or its longest word."""
        words = re.findall(r"[^_ ]+[_ ]?", self.title)
        most = max(map(len, [*self.cells, *words]), default=0)
        lines = [""]
        for word in words:
            if lines[-1] and len(lines[-1] + word.rstrip()) > most:
                lines.append("")
            lines[-1] += word
        return replace(self, title="\n".join(line.rstrip() for line in lines))


class SearchDisplay:
    """Shows the trials of a search on ``stream`` until :meth:`close`.

    On a terminal: the running trials, then the best finished ones, redrawn in place. Elsewhere: one line of text for
    each call of :meth:`show`, as for the logs of a cluster.
    """

    def __init__(self, store: TrialStore, *, stream: TextIO | None = None):
        self.store, self.stream = store, stream or sys.stderr
        self.began = time.monotonic()
        self._started: dict[str, float] = {}  # when each running trial started in this session
        self._live: Any = None
        self._console: Any = None
        self._redirected: list[tuple[logging.StreamHandler[Any], TextIO]] = []

    def show(self, trial: Trial) -> None:
        """Show a trial that has started, measured a round or ended."""
        if trial.status == "running":
            self._started.setdefault(trial.name, time.monotonic())
        else:
            self._started.pop(trial.name, None)
        if not self.stream.isatty():
            print(format_trial(trial, self.store.figures), file=self.stream, flush=True)
            return
        if self._live is None:
            self._open()
        if trial.status == "failed":
            self.say(f"{trial.name} failed: {trial.error}")
        self._live.refresh()

    def say(self, text: str) -> None:
        """Print one line of text, above the table if there is one."""
        if self._live is not None:
            self._console.print(text, markup=False, highlight=False)
        else:
            print(text, file=self.stream, flush=True)

    def close(self) -> None:
        """Leave the last table on the terminal."""
        if self._live is not None:
            self._live.stop()
            self._live = None
        for handler, stream in self._redirected:
            handler.setStream(stream)
        self._redirected.clear()

    def _open(self) -> None:
        from rich.console import Console
        from rich.file_proxy import FileProxy
        from rich.live import Live

        self._console = Console(file=self.stream, highlight=False)
        self._live = Live(
            console=self._console,
            get_renderable=self._table,
            refresh_per_second=REFRESHES_PER_SECOND,
            redirect_stdout=False,
            redirect_stderr=False,
            vertical_overflow="crop",
        )
        # Log messages are printed above the table instead of into it.
        for handler in logging.getLogger("dreamfleet").handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream is self.stream:
                proxy: Any = FileProxy(self._console, self.stream)
                self._redirected.append((handler, self.stream))
                handler.setStream(proxy)
        self._live.start()

    def _table(self) -> Any:
        from rich import box
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        shown, best = self._shown(), self.store.best
        columns = fit_columns(self._columns(shown, best), self._console.width)
        room = total_width(columns) <= self._console.width
        # The box has one space between columns.
        table = Table(
            box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, GAP - 1 if room else 0, 0, 0)
        )
        for column in columns:
            table.add_column(Text(column.title), no_wrap=True, justify="left" if column.is_text else "right")
        for number, trial in enumerate(shown):
            style = "bold" if trial is best else "" if trial.status == "running" else "dim"
            table.add_row(*(Text(column.cells[number]) for column in columns), style=style)
        return Group(self._headline(), table)

    def _shown(self) -> list[Trial]:
        """Return the running trials and the best finished ones, as many as the terminal has rows for."""
        room = max(3, self._console.size.height - BORDER_ROWS)
        running = [trial for trial in self.store.trials if trial.status == "running"]
        over = [trial for trial in self.store.ranking() if trial.is_over and trial.status != "failed"]
        best = over[: min(BEST_SHOWN, max(1, room - len(running)))]
        return [*running[: room - len(best)], *best]

    def _columns(self, shown: Sequence[Trial], best: Trial | None) -> list[Column]:
        search = self.store.search
        return [
            Column("trial", [trial.name for trial in shown], is_text=True),
            *(
                Column(path.rpartition(".")[2], [format_value(t.point[path]) for t in shown])
                for path in search.space
            ),
            *(
                Column(
                    figure_title(name),
                    [_figure(t, name) for t in shown],
                    is_optional=name not in search.metrics,
                )
                for name in self.store.figures
            ),
            Column("step", [self._step(trial) for trial in shown]),
            Column("time", [self._time(trial) for trial in shown], is_optional=True),
            Column("", ["best" if t is best else t.status for t in shown], is_text=True),
        ]

    def _step(self, trial: Trial) -> str:
        planned = trial.point.get("train.max_train_steps", self.store.recipe.train.max_train_steps)
        return f"{trial.steps}/{planned}" if trial.status == "running" else str(trial.steps)

    def _time(self, trial: Trial) -> str:
        seconds = trial.seconds
        if trial.name in self._started:
            seconds = max(seconds, time.monotonic() - self._started[trial.name])
        return formatting.seconds(seconds) if seconds >= 1 else ""

    def _headline(self) -> Any:
        from rich.text import Text

        counts = Counter(trial.status for trial in self.store.trials)
        planned = self.store.search.num_trials
        over = sum(trial.is_over for trial in self.store.trials)
        parts = [f"{over} of {planned} trials" if planned else f"{over} trials"]
        parts += [
            f"{counts[status]} {status}" for status in ("running", "stopped", "failed") if counts[status]
        ]
        best = self.store.best
        if best is not None and (value := best.figure(self.store.search.objective)) is not None:
            parts.append(f"best {figure_title(self.store.search.objective)} {formatting.number(value, 4)}")
        parts.append(formatting.seconds(time.monotonic() - self.began))
        return Text(self.store.recipe.run_name + ": " + ", ".join(parts))


def total_width(columns: Sequence[Column]) -> int:
    """Return the width of a table in characters."""
    return sum(column.width + GAP for column in columns)


def fit_columns(columns: Sequence[Column], width: int) -> list[Column]:
    """Return the columns that fit into ``width`` characters.

    Titles are broken after underscores and at spaces if the table is too wide; if that is not enough, optional columns
    are left out, the last ones first.
    """

    kept = list(columns)
    if total_width(kept) > width:
        kept = [column.with_broken_title() for column in kept]
    for column in [column for column in kept if column.is_optional][::-1]:
        if total_width(kept) > width:
            kept.remove(column)
    return kept


def _figure(trial: Trial, name: str) -> str:
    """Return a figure of a running trial's last round, or of the round by which a finished trial counts."""
    last = trial.rounds[-1] if trial.rounds else {}
    value = last.get(name) if trial.status == "running" else trial.figure(name)
    return "" if value is None else formatting.number(value, 4)
