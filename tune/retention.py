"""Keeps the weights of a search's best trials and removes those of the others; exports the best when the search ends.

A trial that ended keeps one checkpoint, that of its best round, without optimizer state, as long as it is among the
best; its metrics, previews and report stay. Every step can be repeated, so that a search whose process was killed
finishes the rest when it is resumed.
"""

from __future__ import annotations

import json
import logging
from typing import Any

from dreamfleet.datasets.errors import UserError
from dreamfleet.datasets.json_text import json_text
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.report import formatting
from dreamfleet.tune.trial_store import Trial, TrialStore, trial_recipe

SUMMARY = "summary.json"

log = logging.getLogger(__name__)


class Retention:
    """Removes and exports the weights of a store's trials; records what is kept, exported and freed in the store.

    Files that cannot be removed or exported are reported as warnings: they do not end a search.
    """

    def __init__(self, store: TrialStore):
        self.store = store

    def after_end(self, trial: Trial) -> None:
        """Remove the optimizer state of a trial that ended, and the weights that are not among the best any more.

        Reports are rendered later, by :meth:`finish`, since other trials wait meanwhile.
        """
        best = best_trials(self.store, [other for other in self.store.trials if other.is_over])
        fallen = [other for other in self.store.trials if other.is_over and other.kept and other not in best]
        for other in [trial, *(other for other in fallen if other is not trial)]:
            if other.is_over:
                self._prune(other, keeps=other in best)
        self.store.save()

    def finish(self, *, export: bool = True) -> list[Trial]:
        """Prune all trials that ended; with ``export``, export the best trials from their best checkpoints.

        Returns the trials that have exports. An interrupted search does not export, since it will be continued.
        """
        ended = [trial for trial in self.store.trials if trial.is_over]
        best = best_trials(self.store, ended)
        for trial in ended:
            if trial.kept:
                self._prune(trial, keeps=trial in best)
        self.store.save()
        for trial in best_trials(self.store, self.store.trials) if export else ():
            if trial.kept:
                self._export(trial)
                self.store.save()
        self._render_reports()
        return [trial for trial in self.store.trials if trial.name in self.store.state.exported]

    def _prune(self, trial: Trial, *, keeps: bool) -> None:
        run = self.store.folder.child(trial.folder)
        before = _size(run)
        try:
            has_ema = trial_recipe(self.store.recipe, trial.point, run.path()).keeps_average
            kept = _prune_checkpoints(run, trial.best_step if keeps else None, has_ema=has_ema)
            if not keeps:
                run.remove("exports")
                self.store.state.exported.pop(trial.name, None)
            if freed := before - _size(run):
                self.store.state.freed_bytes += freed
                self._update(trial, best_checkpoint=kept, **({} if keeps else {"exports": []}))
        except (UserError, ValueError) as error:
            log.warning("%s: not all of its weights could be removed: %s", trial.name, error)
            return
        trial.kept = kept is not None

    def _export(self, trial: Trial) -> None:
        from dreamfleet.trainers.run.checkpoint import Checkpoints, folder_name
        from dreamfleet.trainers.run.export import export_run

        run, step, state = self.store.folder.child(trial.folder), trial.best_step, self.store.state
        if step is None or state.exported.get(trial.name) == step:
            return
        try:
            if step not in Checkpoints(run).steps():
                raise UserError(f"the checkpoint of its best round, step {step}, is missing")
            run.remove("exports")
            formats = self.store.recipe.train.export_formats or ()
            paths = export_run(run.path("checkpoints", folder_name(step)), formats)
            self._update(trial, exports=[path.rpartition("/")[2] for path in paths])
        except (UserError, ValueError) as error:
            log.warning("%s could not be exported: %s", trial.name, error)
            return
        state.exported[trial.name] = step

    def _update(self, trial: Trial, **changes: Any) -> None:
        """Change values in a trial's summary, and note that its report has to be rendered; not without a summary."""
        run, stale = self.store.folder.child(trial.folder), self.store.state.stale_reports
        if run.exists(SUMMARY):
            if trial.name not in stale:
                stale.append(trial.name)
            summary = {**json.loads(run.read_text(SUMMARY)), **changes}
            run.write_text(SUMMARY, json_text(summary, indent=1))

    def _render_reports(self) -> None:
        from dreamfleet.trainers.artifacts.usage import describe
        from dreamfleet.trainers.report.report import write_report

        state = self.store.state
        for name in state.stale_reports:
            try:
                write_report(self.store.folder.child(self.store.trial(name).folder), describe=describe)
            except (UserError, ValueError) as error:
                log.warning("the report of %s could not be written: %s", name, error)
        state.stale_reports.clear()
        self.store.save()


def best_trials(store: TrialStore, trials: list[Trial]) -> list[Trial]:
    """Return those of ``trials`` whose weights are kept: ``search.keep_best``, and with several metrics the front."""
    among = TrialStore(store.recipe, trials)
    ranked = [trial for trial in among.ranking() if trial.status != "failed" and trial.best_round is not None]
    best = ranked[: store.search.keep_best]
    return [*best, *(trial for trial in among.front() if trial not in best)]


def describe_freed(store: TrialStore) -> str:
    """Return a sentence on what was kept and removed; "" if nothing was removed."""
    if not store.state.freed_bytes:
        return ""
    kept = ", ".join(trial.name for trial in store.trials if trial.name in store.state.exported) or "no trial"
    return f"{kept} exported; {formatting.size(store.state.freed_bytes)} of other checkpoints freed"


def _prune_checkpoints(run: Storage, step: int | None, *, has_ema: bool) -> str | None:
    """Remove all checkpoints but that of ``step``, and its optimizer state; return the folder that is left.

    Without a checkpoint of ``step``, the newest one is left. None removes all.
    """
    from dreamfleet.trainers.run.checkpoint import Checkpoints, folder_name

    checkpoints = Checkpoints(run)
    steps = checkpoints.steps() if step is not None else []
    if not steps:
        run.remove("checkpoints")
        return None
    left = step if step in steps else steps[-1]
    checkpoints.drop_optimizer(left, has_ema=has_ema)
    for name in checkpoints.storage.list_dirs():
        if name != folder_name(left):
            checkpoints.storage.remove(name)
    return folder_name(left)


def _size(run: Storage) -> int:
    """Return the bytes of a run's checkpoints and exports."""
    return sum(run.size(part) for part in ("checkpoints", "exports") if run.exists(part))
