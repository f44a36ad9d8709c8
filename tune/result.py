"""The result of a search, which notebooks display as HTML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from dreamfleet.datasets.errors import UserError
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.config.metrics import figure_title
from dreamfleet.trainers.report import formatting
from dreamfleet.trainers.report.notebook import fragment, preview_mosaic
from dreamfleet.tune.sheet import trial_previews
from dreamfleet.tune.trial_store import Trial, format_value

MOST_TRIALS = 10  # rows of the table in a notebook
MOST_IMAGES = 4  # trials whose previews are shown


@dataclass(frozen=True)
class SearchResult:
    """The result of a search: exit reason, trials from the best to the worst, and files."""

    exit_reason: str  # completed or interrupted
    trials: list[Trial]
    best: Trial | None
    metric: str  # the first of ``metrics``
    metrics: list[str]
    folder: str
    best_recipe: str | None
    table: str
    report: str

    def _repr_html_(self) -> str:
        # What a notebook displays: previews of the best trials, a table, and the files.
        shown = self.trials[:MOST_TRIALS]
        facts = [self.exit_reason, f"{len(self.trials)} trials"]
        facts += [f"the best {len(shown)} are shown"] if len(shown) < len(self.trials) else []
        rows = [_row(trial, self.metrics) for trial in shown]
        files = [("best", self.best_recipe), ("trials", self.table), ("report", self.report)]
        keys = [key.rpartition(".")[2] for key in shown[0].point] if shown else []
        return fragment(
            self.folder.rstrip("/").rpartition("/")[2],
            facts,
            images=_images(self.folder, shown[:MOST_IMAGES], self.metric),
            columns=[
                "trial",
                *(key.rpartition(".")[2] for key in keys),
                *map(figure_title, self.metrics),
                "steps",
                "time",
                "",
            ],
            rows=rows,
            bold=rows[0] if self.best is not None else None,
            files=[(name, path) for name, path in files if path is not None],
        )


def _row(trial: Trial, metrics: Sequence[str]) -> list[str]:
    values = ["" if (v := trial.figure(name)) is None else formatting.number(v, 4) for name in metrics]
    point = [format_value(value) for value in trial.point.values()]
    return [trial.name, *point, *values, str(trial.steps), formatting.seconds(trial.seconds), trial.status]


def _images(folder: str, trials: Sequence[Trial], metric: str) -> list[tuple[str, Image.Image]]:
    images = []
    for trial in trials:
        value = trial.figure(metric)
        try:
            cells = trial_previews(Storage(folder), trial)
        except UserError:  # the folder is gone or cannot be reached; the table remains
            return []
        if cells and value is not None:
            caption = f"{trial.name}, {figure_title(metric)} {formatting.number(value, 4)}"
            images.append((caption, preview_mosaic(cells)))
    return images
