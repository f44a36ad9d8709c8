"""Shows a search's trials on the terminal: a live table, or a line for each change where there is no terminal."""

from __future__ import annotations

import logging
import sys
import time
from collections import Counter
from typing import Any, TextIO

from dreamfleet.trainers.config.metrics import figure_title
from dreamfleet.trainers.report import formatting
from dreamfleet.tune.trial_store import Trial, TrialStore, format_trial, format_value

REFRESHES_PER_SECOND = 2
BEST_SHOWN = 5  # finished trials in the table
BORDER_ROWS = 4  # headline, heading, rule and a spare line


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

        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
        keys = list(self.store.search.space)
        for name in ("trial", *(path.rpartition(".")[2] for path in keys)):
            table.add_column(Text(name), no_wrap=True, justify="left" if name == "trial" else "right")
        for name in (*map(figure_title, self.store.figures), "step", "time"):
            table.add_column(Text(name), no_wrap=True, justify="right")
        table.add_column("", no_wrap=True)
        for trial in self._shown():
            style = "bold" if trial is self.store.best else "" if trial.status == "running" else "dim"
            table.add_row(*map(Text, self._cells(trial, keys)), style=style)
        return Group(Text(self._headline(), no_wrap=True, overflow="ellipsis"), table)

    def _shown(self) -> list[Trial]:
        """Return the running trials and the best finished ones, as many as the terminal has rows for."""
        room = max(3, self._console.size.height - BORDER_ROWS)
        running = [trial for trial in self.store.trials if trial.status == "running"]
        over = [trial for trial in self.store.ranking() if trial.is_over and trial.status != "failed"]
        best = over[: min(BEST_SHOWN, max(1, room - len(running)))]
        return [*running[: room - len(best)], *best]

    def _cells(self, trial: Trial, keys: list[str]) -> list[str]:
        last = trial.rounds[-1] if trial.rounds else {}
        is_running = trial.status == "running"
        # A running trial shows its last round, a finished one the round that counts.
        values = [last.get(name) if is_running else trial.figure(name) for name in self.store.figures]
        planned = trial.point.get("train.max_train_steps", self.store.recipe.train.max_train_steps)
        seconds = trial.seconds
        if trial.name in self._started:
            seconds = max(seconds, time.monotonic() - self._started[trial.name])
        return [
            trial.name,
            *(format_value(trial.point[path]) for path in keys),
            *("" if value is None else formatting.number(value, 4) for value in values),
            f"{trial.steps}/{planned}" if is_running else str(trial.steps),
            formatting.seconds(seconds) if seconds >= 1 else "",
            f"{trial.status}, best" if trial is self.store.best else trial.status,
        ]

    def _headline(self) -> str:
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
        return self.store.recipe.run_name + ": " + ", ".join(parts)
