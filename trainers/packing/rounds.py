"""The validation rounds of a run, read from its metrics, and the end of a run that its source has stopped."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from dreamfleet.datasets.json_text import json_text
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.report.metrics_log import read_metrics
from dreamfleet.trainers.run.summary import Summary

STOPPED = "stopped by the scheduler"


class NewRounds:
    """Returns each validation round of a run once, from the one after ``last_step`` on.

    ``figures``: the keys of a round; without any there are no rounds.
    """

    def __init__(self, run: Storage, figures: Sequence[str], *, last_step: int = -1):
        self.run, self.figures, self.last_step = run, figures, last_step
        self.has_news = True  # whether the metrics may hold a round that was not returned

    def note(self, line: dict[str, Any]) -> None:
        """Receive a line of metrics."""
        self.has_news = self.has_news or any(name in line for name in self.figures)

    def take(self) -> list[dict[str, Any]]:
        """Return the rounds since the last call, ``step`` and figures."""
        if not self.has_news or not self.figures:
            return []
        self.has_news = False
        found = [r for r in rounds_of(self.run, self.figures) if r["step"] > self.last_step]
        if found:
            self.last_step = found[-1]["step"]
        return found


def rounds_of(run: Storage, figures: Sequence[str]) -> list[dict[str, Any]]:
    """Return the validation rounds in a run's metrics, ``step`` and figures, in the order of their steps."""
    rounds: dict[int, dict[str, Any]] = {}
    for line in read_metrics(run):
        if found := {name: line[name] for name in figures if line.get(name) is not None}:
            rounds.setdefault(line["step"], {"step": line["step"]}).update(found)
    return [rounds[step] for step in sorted(rounds)]


def write_end(run: Storage, summary: Summary, exit_reason: str) -> Summary:
    """Rewrite the summary and report of a run with an exit reason that only its source knows; return the summary."""
    from dreamfleet.trainers.artifacts.usage import describe
    from dreamfleet.trainers.report.report import write_report

    summary = dataclasses.replace(summary, exit_reason=exit_reason)
    run.write_text("summary.json", json_text(dataclasses.asdict(summary), indent=1))
    write_report(run, describe=describe)
    return summary
