"""Runs a hyperparameter search: trials by Ray Tune on a local Ray or a cluster, and the search's result files."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

from dreamfleet.datasets.environment import environment, secrets_hidden, variables_to_send
from dreamfleet.datasets.errors import RecipeError, ResourceError, RunFailed, UserError
from dreamfleet.trainers.config.engines import engine_spec
from dreamfleet.trainers.config.scaling import (
    Resources,
    ScalingConfig,
    WorkerShare,
    describe,
    worker_resources,
    workers_that_fit,
)
from dreamfleet.trainers.driver.preflight import check_inputs, this_machine
from dreamfleet.trainers.driver.session import ray_session, starts_private_ray
from dreamfleet.trainers.driver.shared_paths import check_machines, shared_paths, written_paths
from dreamfleet.trainers.launch import run_in_thread
from dreamfleet.trainers.recipe import Recipe, load_recipe
from dreamfleet.trainers.run.run_folder import locked
from dreamfleet.trainers.run.signals import Stop, stop_on_signal
from dreamfleet.tune.live import SearchDisplay
from dreamfleet.tune.open_search import open_store
from dreamfleet.tune.result import SearchResult
from dreamfleet.tune.results import BEST, TABLE, write_best, write_table
from dreamfleet.tune.trial_store import RECIPE, Trial, TrialStore, error_class

# Environment variables while Tune runs.
TUNE_SWITCHES = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # do not write Tune's result files
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a failed trial reports an error instead of the metric
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # dreamfleet reports the errors itself
    "RAY_AIR_NEW_OUTPUT": "0",  # the newer output prints tables at verbose=0 too
}

Progress = Callable[[Trial], None]


def search(
    recipe: Recipe | str | os.PathLike[str],
    *,
    overrides: Sequence[str] = (),
    resume: bool = False,
    address: str | None = None,
    shared: Sequence[str] = (),
    on_progress: Progress | None = None,
) -> SearchResult:
    """Run the search in the ``search:`` section of a recipe or a recipe file.

    Each trial is an ordinary run in ``output_dir/trials/``, in one process. The search writes ``best.yaml``,
    ``trials.parquet`` and ``report.html`` into ``output_dir``. ``resume`` continues a search: finished trials are kept,
    interrupted ones continue from their checkpoints, and the next points are the same as without the interruption.
    ``shared`` names folders that all machines of the cluster can access.

    A trial that fails, including for lack of memory, is recorded with its error and the others continue. If the first
    trials fail with the same UserError, the search ends and its files are removed.

    ``on_progress`` is called with a trial when it starts, after each validation round, and when it ends; by default a
    line is written to stderr. In the main thread, SIGINT and SIGTERM make the running trials save a checkpoint and end
    the search (``exit_reason`` "interrupted").

    Raises UserError for errors that the user can fix, also if every trial failed with one, and RunFailed if every trial
    failed otherwise.
    """
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
    check_inputs(recipe)
    store = open_store(recipe, resume=resume)
    display = SearchDisplay(store)
    with locked(store.folder), stop_on_signal(store.folder, display.say) as stop:
        store.folder.write_text(RECIPE, recipe.to_yaml())
        store.save()
        try:
            _run_trials(
                store, stop=stop, display=display, address=address, shared=shared, on_progress=on_progress
            )
        finally:
            display.close()
            if store.trials:
                write_results(store)
            else:
                store.remove()
    return _result(store, interrupted=stop.requested.is_set())


def write_results(store: TrialStore) -> None:
    """Write the result files of a search from the trials so far."""
    from dreamfleet.tune.report import write_search_report

    for trial in store.trials:
        if trial.status == "running":
            trial.status = "interrupted"
    store.save()
    write_table(store)
    write_best(store)
    write_search_report(store)


def trial_room(
    recipe: Recipe, nodes: Sequence[Resources], *, limit: Resources | None = None
) -> tuple[WorkerShare, int]:
    """Return the resources of a trial and the number of concurrent trials on machines with the resources ``nodes``.

    Without ``search.resources_per_trial`` a trial gets one GPU if there are any, else an equal share of the CPUs among
    ``search.max_concurrent_trials``, else one CPU. ``limit`` is the maximum size of an autoscaling cluster. Raises
    ResourceError if a trial fits on no machine.
    """
    search = recipe.search
    assert search is not None
    machines = [limit] if limit else list(nodes)
    has_gpu = recipe.scaling.use_gpu is not False and any(machine.get("GPU", 0) for machine in machines)
    cpus = int(sum(machine.get("CPU", 0) for machine in machines))
    share = worker_resources(
        ScalingConfig(
            num_workers=1 if has_gpu else search.max_concurrent_trials or max(1, cpus),
            use_gpu=recipe.scaling.use_gpu,
            resources_per_worker=search.resources_per_trial,
        ),
        nodes,
        limit=limit,
    )
    fits = workers_that_fit(share.resources, machines)
    if not fits:
        have = "; ".join(describe(machine) for machine in machines) or "none"
        raise ResourceError(
            f"a trial with {describe(share.resources)} fits on no machine ({have}). "
            "Lower search.resources_per_trial, or use a larger cluster (--address)"
        )
    return share, min(fits, search.max_concurrent_trials or fits)


def can_share_process(recipe: Recipe, *, uses_gpu: bool) -> bool:
    """Return whether successive trials share a process, which saves the imports of each.

    DeepSpeed and compiled blocks leave memory and a process group behind, so trials that may use either run in separate
    processes. So do trials on a GPU, where ``zero_stage: auto`` may select DeepSpeed and where the memory of a failed
    trial would be missing for the next.
    """
    engine, search = recipe.engine, recipe.search
    assert search is not None
    return (
        engine_spec(engine).shares_process(engine)
        and not uses_gpu
        and not any(path.startswith("engine.") for path in search.space)
    )


def _run_trials(
    store: TrialStore,
    *,
    stop: Stop,
    display: SearchDisplay,
    address: str | None,
    shared: Sequence[str],
    on_progress: Progress | None,
) -> None:
    from dreamfleet.tune.algorithm import SearchAlgorithm
    from dreamfleet.tune.callback import StoreCallback

    callback = StoreCallback(store, on_progress or display.show)
    algorithm = SearchAlgorithm(
        store, should_stop=lambda: stop.requested.is_set() or callback.error is not None
    )
    callback.planned = algorithm.total or sys.maxsize
    if algorithm.remaining == 0:
        return
    recipe = store.recipe
    if starts_private_ray(address):  # report missing resources before Ray is started
        trial_room(recipe, [this_machine()])
    with ray_session(address, preload=("ray.tune",)) as session, environment(TUNE_SWITCHES):
        stop.listen()
        nodes = [node.resources for node in session.nodes()]
        share, at_once = trial_room(recipe, nodes, limit=session.growth_limit())
        check_machines(session, reads=shared_paths(recipe), writes=written_paths(recipe), shared=shared)
        if algorithm.remaining is not None:
            at_once = min(at_once, algorithm.remaining)
        number = "" if algorithm.remaining is None else f"{algorithm.remaining} "
        display.say(f"{number}trials, {at_once} at once, {describe(share.resources)} each")
        # Tune's own files are needed only while it runs; a search is resumed from the trial store and the run folders.
        with tempfile.TemporaryDirectory(prefix="dreamfleet-tune-", ignore_cleanup_errors=True) as files:
            tuner = _make_tuner(
                store, share=share, at_once=at_once, algorithm=algorithm, callback=callback, files=files
            )
            # Tune copies AWS keys into its actors' runtime environment, which Ray logs.
            with secrets_hidden():
                outcome = run_in_thread(tuner.fit, name="ray-tune-fit")
    if callback.error is not None:
        if not any(trial.rounds for trial in store.trials):
            store.trials.clear()
        raise callback.error
    if outcome.error is not None:
        last = str(outcome.error).strip().splitlines()[-1]
        raise RunFailed(f"Ray Tune failed: {last}") from outcome.error


def _make_tuner(
    store: TrialStore, *, share: WorkerShare, at_once: int, algorithm: Any, callback: Any, files: str
) -> Any:
    from ray import tune

    from dreamfleet.trainers.driver.worker import worker_environment
    from dreamfleet.tune.asha import make_scheduler
    from dreamfleet.tune.trial import Shared, TrialActor

    recipe = store.recipe
    shared = Shared(
        folder=recipe.output_dir,
        recipe=recipe.model_dump(mode="json", exclude={"search"}),
        figures=store.figures,
        threads=share.threads,
        uses_gpu=share.uses_gpu,
        gpu_share=share.gpu_share,
        environment=worker_environment(share.threads),
        sent=variables_to_send(buckets="://" in recipe.to_yaml()),
    )
    return tune.Tuner(
        tune.with_resources(
            tune.with_parameters(TrialActor, shared=shared), tune.PlacementGroupFactory([share.resources])
        ),
        tune_config=tune.TuneConfig(
            search_alg=algorithm,
            scheduler=make_scheduler(store),
            num_samples=-1,  # the algorithm ends the search
            max_concurrent_trials=at_once,
            reuse_actors=can_share_process(recipe, uses_gpu=share.uses_gpu),
        ),
        run_config=tune.RunConfig(
            name="search",
            storage_path=files,
            callbacks=[callback],
            # Applies if the process or machine of a trial died; a trial reports its own errors in its last round.
            failure_config=tune.FailureConfig(max_failures=recipe.scaling.max_failures),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            verbose=0,
        ),
    )


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
