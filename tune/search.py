"""Runs a hyperparameter search: its trials in a pool of workers, and the search's result files."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from dreamfleet.datasets.errors import Errors, RecipeError, RunFailed, UserError
from dreamfleet.datasets.storage.retry import patience
from dreamfleet.trainers.config.search import SearchConfig
from dreamfleet.trainers.driver.preflight import check_inputs
from dreamfleet.trainers.driver.progress import Display
from dreamfleet.trainers.recipe import Recipe, load_recipe
from dreamfleet.trainers.run.disk import require_search_disk
from dreamfleet.trainers.run.fence import Fence
from dreamfleet.trainers.run.ownership import Ownership
from dreamfleet.trainers.run.run_folder import own
from dreamfleet.trainers.run.signals import Stop, stop_on_signal
from dreamfleet.trainers.tracking.tracker import check_trackers
from dreamfleet.tune.limits import describe_end, out_of_patience, used_up
from dreamfleet.tune.live import SearchDisplay
from dreamfleet.tune.open_search import open_store
from dreamfleet.tune.pool.pool import run_pool
from dreamfleet.tune.result import SearchResult
from dreamfleet.tune.results import BEST, TABLE, write_best, write_table
from dreamfleet.tune.retention import Retention, describe_freed
from dreamfleet.tune.trial_store import RECIPE, Trial, TrialStore, error_class
from dreamfleet.tune.unpacked import describe_unpacked
from dreamfleet.tune.warm_start import describe_earlier

if TYPE_CHECKING:
    pass

UNKNOWN_TOTAL = 32  # trials that are assumed where a search ends by other limits

Progress = Callable[[Trial], None]


def search(
    recipe: Recipe | str | os.PathLike[str],
    *,
    overrides: Sequence[str] = (),
    resume: bool = False,
    address: str | None = None,
    shared: Sequence[str] = (),
    on_progress: Progress | None = None,
    continues: bool = False,
    take_over: bool = False,
) -> SearchResult:
    """Run the search in the ``search:`` section of a recipe or a recipe file.

    Each trial is an ordinary run in ``output_dir/trials/``. Trials whose method allows it share processes and one copy
    of the frozen model; others have a process each, or ``search.workers_per_trial`` (``scaling.num_workers``). The
    search writes ``best.yaml``, ``trials.parquet`` and ``report.html`` into ``output_dir``. ``resume`` continues a
    search: finished trials are kept, interrupted ones continue from their checkpoints, and the next points are the same
    as without the interruption. ``shared`` names folders that all machines of the cluster can access. ``continues``:
    continue the search in ``output_dir`` if there is one, and wait if another process runs it; ``take_over``: take it
    from that process, which ends at its next write.

    A trial that fails, including for lack of memory, is recorded with its error and the others continue. If the first
    trials fail with the same UserError, the search ends and its files are removed.

    ``on_progress`` is called with a trial when it starts, after each validation round, and when it ends; by default a
    line is written to stderr. In the main thread, SIGINT and SIGTERM make the running trials save a checkpoint and end
    the search (``exit_reason`` "interrupted").

    Raises UserError for errors that the user can fix, also if every trial failed with one, and RunFailed if every trial
    failed otherwise.
    """
    recipe = _load(recipe, overrides)
    open_folder = partial(open_store, recipe, resume=resume or continues or take_over)
    errors = Errors()
    with errors.collect():
        check_trackers(recipe)
    with errors.collect():
        check_inputs(recipe)
    with errors.collect():
        folder = open_folder().folder
    errors.refuse()
    disk = require_search_disk(recipe)
    say = Display().say
    waiting = open_folder if continues else None
    with (
        patience(recipe.storage.patience_seconds),
        own(folder, take_over=take_over, wait=waiting, say=say) as lease,
    ):
        store = open_folder()  # again: another process may have changed it until now
        store.folder = folder.guarded(lease.check)
        display = SearchDisplay(store)
        display.say(disk)
        is_interrupted = _search(
            store, lease, display=display, address=address, shared=shared, on_progress=on_progress
        )
    return _result(store, interrupted=is_interrupted)


def _search(
    store: TrialStore,
    lease: Fence | Ownership,
    *,
    display: SearchDisplay,
    address: str | None,
    shared: Sequence[str],
    on_progress: Progress | None,
) -> bool:
    """Run the trials of a search and write its results; return whether it was interrupted."""
    is_interrupted = True
    with stop_on_signal(store.folder, display.say) as stop:
        store.folder.write_text(RECIPE, store.recipe.to_yaml())
        store.save()
        try:
            is_interrupted = _run_trials(
                store,
                lease,
                stop=stop,
                display=display,
                address=address,
                shared=shared,
                on_progress=on_progress,
            )
        finally:
            display.close()
            if store.trials:
                write_results(store, export=not is_interrupted)
                for line in (describe_end(store), describe_freed(store)):
                    if line:
                        display.say(line)
            else:
                store.remove()
    return is_interrupted


def _load(recipe: Recipe | str | os.PathLike[str], overrides: Sequence[str]) -> Recipe:
    """Return the recipe of a search. Raises RecipeError for one without a ``search:`` section."""
    if isinstance(recipe, str | os.PathLike):
        recipe = load_recipe(recipe, list(overrides))
    elif overrides:
        raise RecipeError(
            "overrides change a recipe file; this recipe is an object: change the object instead"
        )
    if recipe.search is None:
        raise RecipeError(
            "this recipe has no search: section; add one (docs/recipes.md#search), such as {num_trials: 12, "
            "space: {optimizer.learning_rate: {distribution: loguniform, lower: 1.0e-5, upper: 1.0e-2}}}"
        )
    return recipe


def write_results(store: TrialStore, *, export: bool) -> None:
    """Remove the weights that are not kept, and write the result files of a search from the trials so far.

    ``export``: also export the best trials from their best checkpoints.
    """
    from dreamfleet.tune.report import write_search_report

    for trial in store.trials:
        if trial.status == "running":
            trial.status = "interrupted"
    Retention(store).finish(export=export)
    store.save()
    write_table(store)
    write_best(store)
    write_search_report(store)


def _run_trials(
    store: TrialStore,
    lease: Fence | Ownership,
    *,
    stop: Stop,
    display: SearchDisplay,
    address: str | None,
    shared: Sequence[str],
    on_progress: Progress | None,
) -> bool:
    """Run the trials that remain; return whether the search was interrupted."""
    from dreamfleet.tune.algorithm import SearchAlgorithm
    from dreamfleet.tune.asha import make_scheduler
    from dreamfleet.tune.search_source import SearchSource

    recipe, section = store.recipe, store.search
    workers = recipe.scaling.pool_size if section.workers_per_trial is None else section.workers_per_trial
    algorithm = SearchAlgorithm(store, should_stop=stop.requested.is_set)
    is_over = not algorithm.unfinished and (algorithm.remaining == 0 or out_of_patience(store))
    if is_over or algorithm.interrupts:
        algorithm.suggest()  # records why nothing is run
        return False
    source = SearchSource(
        store,
        algorithm,
        make_scheduler(store),
        workers=workers if workers > 1 else 0,
        on_progress=on_progress or display.show,
    )
    left = algorithm.remaining
    count = [] if left is None else [f"{left} trial{'s' * (left > 1)}"]
    for line in [*describe_earlier(store), *count, *([] if workers > 1 else describe_unpacked(recipe))]:
        display.say(line)
    ended = run_pool(
        source,
        recipe,
        stop=stop,
        say=display.say,
        tasks=algorithm.remaining,
        max_concurrent=section.max_concurrent_trials,
        max_packed=most_packed(section, algorithm.total),
        workers_per_task=workers,
        resources=section.resources_per_trial,
        address=address,
        shared=shared,
        should_stop=lambda: source.error is not None or algorithm.interrupts or lease.is_lost,
        owner=lease.owner,
        on_room=source.times.set_room,
    )
    if source.error is not None:
        if not any(trial.rounds for trial in store.trials):
            store.trials.clear()
        raise source.error
    if ended == "completed":
        return False
    store.state.end_reason = used_up(store) or "interrupted"
    return store.state.end_reason == "interrupted"


def most_packed(section: SearchConfig, total: int | None) -> int | None:
    """Return the most trials that run at once only because they share processes; None without a limit.

    Optuna proposes points from the results of earlier trials, so trials have to end before others start.
    """
    if section.algorithm != "optuna" or section.max_concurrent_trials is not None:
        return None
    return -(-(UNKNOWN_TOTAL if total is None else total) // 4)


def _result(store: TrialStore, *, interrupted: bool) -> SearchResult:
    folder, ranking = store.folder, store.ranking()
    failed = [trial for trial in store.trials if trial.status == "failed"]
    if failed and len(failed) == len(store.trials):
        first = failed[0]
        error = (
            error_class(first) if all(issubclass(error_class(t), UserError) for t in failed) else RunFailed
        )
        raise error(
            f"all {len(failed)} trials failed, the first with: {first.error}. Their logs and a report are in "
            f"{folder.path()}; to search again, give another output_dir"
        )
    return SearchResult(
        exit_reason="interrupted" if interrupted else "completed",
        trials=ranking,
        best=store.best,
        metric=store.search.objective,
        metrics=store.search.metrics,
        folder=folder.path(),
        best_recipe=folder.path(BEST) if store.best else None,
        table=folder.path(TABLE),
        report=folder.path("report.html"),
    )
