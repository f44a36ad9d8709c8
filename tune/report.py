"""Writes a search's report.html: its trials, their measurements and previews, in one self-contained file.

Beside it, compare.html shows pairs of the trials' images without their names.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any

from dreamfleet.datasets.errors import DataError
from dreamfleet.trainers.config.method import method_title
from dreamfleet.trainers.config.metrics import figure_title
from dreamfleet.trainers.report import formatting
from dreamfleet.trainers.report.html import environment
from dreamfleet.tune import blind
from dreamfleet.tune.cost import cost
from dreamfleet.tune.importance import importances
from dreamfleet.tune.limits import describe_end
from dreamfleet.tune.parallel import parallel_plot
from dreamfleet.tune.results import BEST
from dreamfleet.tune.sheet import LONGEST_SIDE, TEMPLATES, image_sheet
from dreamfleet.tune.trial_plots import is_higher_better, trial_plots
from dreamfleet.tune.trial_store import Trial, TrialStore, format_value
from dreamfleet.tune.votes import Preference, Vote, agreement, preferences, read_votes

STATUS = {"stopped": "stopped early", "running": "interrupted"}


def write_search_report(store: TrialStore) -> None:
    """Write ``report.html`` into the folder of a search, and ``compare.html`` if two trials have previews."""
    try:
        store.folder.write_text(blind.FILE, blind.BlindPage(store).html())
    except DataError:
        store.folder.remove(blind.FILE)
    store.folder.write_text("report.html", render(store))


def render(store: TrialStore) -> str:
    """Return the report of a search as HTML, without references to files other than the trials' pages."""
    ranking = store.ranking()
    measured = [trial for trial in ranking if trial.figure(store.search.objective) is not None]
    votes = read_votes(store.folder)
    preferred = preferences(votes)
    return environment(TEMPLATES).get_template("search.html").render(
        title=store.recipe.run_name,
        method=method_title(store.recipe.method.name),
        facts=_facts(store),
        end=describe_end(store),
        is_interrupted=any(not trial.is_over for trial in store.trials),
        metric=store.search.objective,
        best=store.best,
        best_recipe=store.folder.path(BEST),
        figures=_figures(store, measured),
        sheet=image_sheet(store),
        longest_side=LONGEST_SIDE,
        plots=list(trial_plots(store, measured)),
        parallel=parallel_plot(store, measured),
        importances=_importances(store),
        front=_front(store),
        cost=cost(store),
        folder=store.folder.path(),
        has_comparison=store.folder.exists(blind.FILE),
        votes=_vote_facts(store, votes),
        columns=_columns(store, preferred),
        trials=[_row(store, trial, preferred) for trial in ranking],
        recipe_text=store.recipe.to_yaml(),
    )  # fmt: skip


def _facts(store: TrialStore) -> list[str]:
    counts = Counter(STATUS.get(trial.status, trial.status) for trial in store.trials)
    earlier = [f"{len(store.state.earlier)} of earlier searches"] if store.state.earlier else []
    return [
        f"{len(store.trials)} trials",
        *earlier,
        *(f"{count} {status}" for status, count in counts.most_common()),
        f"{formatting.seconds(sum(trial.seconds for trial in store.trials))} of compute time",
    ]


def _figures(store: TrialStore, measured: Sequence[Trial]) -> list[tuple[str, str, str]]:
    """Return (name, value, note) of the best trial's metrics and of its searched values."""
    best, metric = store.best, store.search.objective
    if best is None:
        return []
    median = statistics.median(value for trial in measured if (value := trial.figure(metric)) is not None)
    cards = []
    for name in sorted(store.figures, key=lambda name: name != metric):
        if (value := best.figure(name)) is not None:
            note = f"median {formatting.number(median, 4)}" if name == metric else ""
            cards.append((figure_title(name), formatting.number(value, 4), note))
    for path, chosen in best.point.items():
        section, _, key = path.rpartition(".")
        cards.append((key, format_value(chosen), section))
    return cards


def _importances(store: TrialStore) -> list[tuple[str, list[tuple[str, float]]]]:
    """Return (metric, shares of the searched keys) for each metric of the search."""
    found = [(name, importances(store, name)) for name in store.search.metrics]
    return [
        (figure_title(name), [(path.rpartition(".")[2], share) for path, share in shares.items()])
        for name, shares in found
        if shares
    ]


def _front(store: TrialStore) -> dict[str, Any] | None:
    """Return the columns and rows of the Pareto front's table; None for a search with one metric."""
    names, keys = store.search.metrics, list(store.search.space)
    if len(names) < 2:
        return None
    rows = [
        (
            trial,
            [
                *(_format(trial.figure(name)) for name in names),
                *(format_value(trial.point[key]) for key in keys),
            ],
        )
        for trial in store.front()
    ]
    return {
        "columns": ["trial", *map(figure_title, names), *(key.rpartition(".")[2] for key in keys)],
        "rows": rows,
    }


def _vote_facts(store: TrialStore, votes: Sequence[Vote]) -> list[str]:
    """Return sentences on the votes: their number, and how often each metric agrees with them."""
    if not votes:
        return []
    facts = [f"{len(votes)} votes" if len(votes) > 1 else "1 vote"]
    figures = {trial.name: trial for trial in store.trials}
    agreements = []
    for name in store.figures:

        def is_better(a: str, b: str, name: str = name) -> bool | None:
            x, y = (figures[one].figure(name) if one in figures else None for one in (a, b))
            return None if x is None or y is None or x == y else (x > y) == is_higher_better(store, name)

        agreed, decided = agreement(votes, is_better)
        if decided:
            agreements.append(f"{figure_title(name)} {agreed} of {decided}")
    if agreements:
        facts.append(f"Decided votes with which each metric agrees: {', '.join(agreements)}")
    return facts


def _columns(store: TrialStore, preferred: dict[str, Preference]) -> list[str]:
    keys = [path.rpartition(".")[2] for path in store.search.space]
    voted = ["preferred"] if preferred else []
    return ["trial", *keys, *map(figure_title, store.figures), *voted, "steps", "time", "status"]


def _row(
    store: TrialStore, trial: Trial, preferred: dict[str, Preference]
) -> tuple[Trial, list[tuple[Any, str]], str]:
    """Return a trial with its columns, each as a value to sort by and text, and its status."""
    cells: list[tuple[Any, str]] = [
        (trial.point[path], format_value(trial.point[path])) for path in store.search.space
    ]
    cells += [(trial.figure(name), _format(trial.figure(name))) for name in store.figures]
    if preferred:
        votes = preferred.get(trial.name)
        text = (
            f"{formatting.share(votes.chance)}, {formatting.number(votes.wins)} of {votes.votes}"
            if votes
            else ""
        )
        cells.append((votes.chance if votes else None, text))
    cells += [
        (trial.steps, formatting.number(trial.steps)),
        (trial.seconds, formatting.seconds(trial.seconds)),
    ]
    status = STATUS.get(trial.status, trial.status)
    is_pruned = any(not other.kept for other in store.trials)
    return trial, cells, f"{status}, weights kept" if trial.kept and is_pruned and trial.steps else status


def _format(value: float | None) -> str:
    return "" if value is None else formatting.number(value, 4)
