"""Starts a run in this process or on Ray, shows its progress and returns its summary."""

from __future__ import annotations

import dataclasses
import logging
import os
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from dreamfleet.datasets.errors import RecipeError, ResourceError, RunFailed, UserError
from dreamfleet.datasets.storage.retry import patience
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.config.scaling import WorkerShare, worker_resources
from dreamfleet.trainers.driver.coordinated import MemberKey, coordinated
from dreamfleet.trainers.driver.in_thread import run_in_thread
from dreamfleet.trainers.driver.preflight import check_inputs, preflight, require_room_here, this_machine
from dreamfleet.trainers.driver.progress import Display, RunTail, log_to_run, watch_for_stop
from dreamfleet.trainers.driver.session import RaySession, ray_session, uses_cluster
from dreamfleet.trainers.run.fence import Fence, Owner
from dreamfleet.trainers.run.ownership import Ownership
from dreamfleet.trainers.run.run_folder import open_run_folder, own
from dreamfleet.trainers.run.signals import Stop, stop_on_signal
from dreamfleet.trainers.tracking.tracker import check_trackers, variables_for

if TYPE_CHECKING:
    from dreamfleet.trainers.recipe import Recipe
    from dreamfleet.trainers.run.summary import Summary

logger = logging.getLogger(__name__)

Progress = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class FitResult:
    """The summary of a run, and the path or address of its folder."""

    summary: Summary
    run_folder: str

    def _repr_html_(self) -> str:
        # What a notebook displays.
        from dreamfleet.trainers.report.notebook import run_html

        return run_html(Storage(self.run_folder), dataclasses.asdict(self.summary))


def fit(
    recipe: Recipe | str | os.PathLike[str],
    *,
    overrides: Sequence[str] = (),
    resume: bool = False,
    address: str | None = None,
    shared: Sequence[str] = (),
    on_progress: Progress | None = None,
    continues: bool = False,
    take_over: bool = False,
    owner: Owner | None = None,
) -> FitResult:
    """Train a recipe (an object or a recipe file with ``overrides``); return its summary and run folder.

    ``scaling.num_workers: 0`` trains in this process. Otherwise the run uses Ray: the cluster that this
    process is connected to, else the one at ``address``, else at RAY_ADDRESS, else a private one on this
    machine. Workers that die are replaced, and resume from the newest valid checkpoint, unless more than
    ``scaling.max_failures`` fail before the next one. ``shared`` names folders that all machines of the cluster
    see; if the cluster starts machines on demand, local paths must be in them.

    ``continues``: continue the run in ``output_dir`` if it has the same settings, else start one; wait if another
    process trains into it. ``take_over``: take the folder from such a process, which ends at its next write; resume.
    ``owner``: of the search or fleet that the run is part of, which already owns the folder.

    ``on_progress`` is called with each logged line of metrics; without it, progress is shown on stderr. In
    the main thread, the first SIGINT or SIGTERM ends the run after the current step with a checkpoint
    (``summary.exit_reason`` "interrupted"), and the second raises KeyboardInterrupt.

    Raises UserError for errors that the user can fix, where possible before Ray is started, and RunFailed if
    the run fails.
    """
    started = time.monotonic()
    from dreamfleet.trainers.recipe import load_recipe
    from dreamfleet.trainers.run.checkpoint import Checkpoints

    if isinstance(recipe, str | os.PathLike):
        recipe = load_recipe(recipe, list(overrides))
    elif overrides:
        raise RecipeError(
            "overrides apply to a recipe file, and this recipe is an object: change the object instead"
        )
    check_trackers(recipe)
    folder = Storage(recipe.output_dir)
    open_folder = partial(open_run_folder, recipe, resume=resume or take_over, continues=continues)
    may_resume = resume or take_over or continues
    check_inputs(recipe, begun=may_resume and bool(Checkpoints(folder).steps()))
    display = _Silent(on_progress) if on_progress else Display(total=recipe.train.max_train_steps)
    open_folder()
    waiting = open_folder if continues else None
    with (
        patience(recipe.storage.patience_seconds),
        own(folder, owner, take_over=take_over, wait=waiting, say=display.say) as lease,
    ):
        open_folder()  # again: another process may have trained into it until now
        try:
            _log_start(folder, asked=resume or take_over)
            summary = _train(recipe, lease, address, shared, display, started)
        finally:
            display.close()
    return FitResult(summary, folder.path())


def _log_start(folder: Storage, *, asked: bool) -> None:
    """Log that a run which is to be resumed, or was begun before, has no checkpoint to continue from."""
    from dreamfleet.trainers.run.checkpoint import Checkpoints

    if (asked or folder.exists("recipe.yaml")) and not Checkpoints(folder).steps():
        logger.info("no checkpoint in %s: starting at step 0", folder.path("checkpoints"))


def _train(
    recipe: Recipe,
    lease: Fence | Ownership,
    address: str | None,
    shared: Sequence[str],
    display: Display,
    started: float,
) -> Summary:
    """Train into the folder that this process owns."""
    run = Storage(recipe.output_dir).guarded(lease.check)
    resume = run.exists("recipe.yaml")
    with stop_on_signal(run, display.say) as stop:
        if recipe.scaling.is_local:
            return _fit_here(recipe, resume, stop, display, started, lease.owner)
        return _fit_on_ray(recipe, address, shared, stop, display, started, lease.owner)


def _fit_here(
    recipe: Recipe, resume: bool, stop: Stop, display: Display, started: float, owner: Owner | None
) -> Summary:
    from dreamfleet.trainers.run.run import run_worker

    uses_gpu = worker_resources(recipe.scaling, [this_machine()]).uses_gpu
    fence = Fence(Storage(recipe.output_dir), owner)
    run = fence.guarded()
    with log_to_run(run, verbose=True), watch_for_stop(run) as marked:
        return run_worker(
            recipe,
            device="cuda" if uses_gpu else "cpu",
            resume=resume,
            should_stop=lambda: stop.requested.is_set() or marked(),
            on_progress=display.show,
            waited=time.monotonic() - started,
            fence=fence,
        )


def _fit_on_ray(
    recipe: Recipe,
    address: str | None,
    shared: Sequence[str],
    stop: Stop,
    display: Display,
    started: float,
    owner: Owner | None,
) -> Summary:
    from dreamfleet.trainers.run.summary import Summary

    run = Storage(recipe.output_dir)
    if not uses_cluster(address):
        require_room_here(recipe.scaling, evaluates=recipe.validation.resources)
    with ray_session(address, preload=("ray.train.torch",)) as session:
        stop.listen()
        share = preflight(recipe, session, display.say, shared=shared)
        # Workers report nothing to Ray Train, so its storage holds only a few files of its controller, which
        # runs on this machine: a temporary folder is enough, also for runs in buckets and on several machines.
        with (
            tempfile.TemporaryDirectory(prefix="dreamfleet-ray-", ignore_cleanup_errors=True) as bookkeeping,
            coordinated(recipe, session) as coordinator,
        ):
            config = {"waited": time.monotonic() - started, "owner": owner}
            trainer = _make_trainer(recipe, session, share, bookkeeping, config, coordinator)
            with RunTail(run, display):
                outcome = run_in_thread(trainer.fit, name="ray-train-fit")
        if outcome.error is not None:
            raise _explain(outcome.error, session, recipe) from outcome.error
    return Summary(**outcome.value.return_value)


def _make_trainer(
    recipe: Recipe,
    session: RaySession,
    share: WorkerShare,
    bookkeeping: str,
    config: dict[str, Any],
    coordinator: MemberKey | None,
) -> Any:
    from ray.train import ScalingConfig
    from ray.train.torch import TorchConfig

    from dreamfleet.trainers.distributed.process_group import STEP_TIMEOUT
    from dreamfleet.trainers.driver.member_trainer import LocalTrainer, MemberTrainer
    from dreamfleet.trainers.driver.ray_internals import MemberConfig
    from dreamfleet.trainers.driver.worker import train_worker

    scaling, sent = recipe.scaling, variables_for(recipe)

    def loop(config: dict[str, Any]) -> dict[str, Any]:
        # Secrets are passed in this closure, as Ray displays and logs environments and may export the config.
        return train_worker(config, sent, coordinator)

    elastic = (scaling.min_workers, scaling.max_workers) if scaling.is_elastic else scaling.max_workers
    backend = share.backend(scaling.max_workers)
    timeout = int(STEP_TIMEOUT.total_seconds())
    kind: Callable[..., Any] = LocalTrainer
    if coordinator is not None:
        kind = partial(MemberTrainer, coordinator=coordinator, most=scaling.max_workers)
    return kind(
        loop,
        private=session.private,
        train_loop_config={
            "recipe": recipe.model_dump(mode="json"),
            "threads": share.threads,
            "gpu_share": share.gpu_share,
            "backend": backend,
            **config,
        },
        torch_config=(TorchConfig if coordinator is None else MemberConfig)(
            backend=backend, timeout_s=timeout
        ),
        scaling_config=ScalingConfig(
            num_workers=scaling.max_workers if coordinator is None else elastic,
            use_gpu=share.uses_gpu,
            resources_per_worker=share.resources,
            placement_strategy=scaling.placement_strategy,
        ),
        run_config=_make_run_config(recipe, share, bookkeeping, sent),
    )


def _make_run_config(recipe: Recipe, share: WorkerShare, bookkeeping: str, sent: Mapping[str, str]) -> Any:
    from ray.train import FailureConfig, LoggingConfig, RunConfig

    from dreamfleet.trainers.driver.watch import RunWatch
    from dreamfleet.trainers.driver.worker import worker_environment

    return RunConfig(
        # Unique, as Ray would resume a run of the same name; dreamfleet resumes from its own checkpoints.
        name=f"{recipe.run_name}-{uuid.uuid4().hex[:12]}",
        storage_path=bookkeeping,
        failure_config=FailureConfig(
            max_failures=-1,  # RunWatch counts them
            # Ray waits one minute for machines before each such failure; its default is no limit.
            controller_failure_limit=recipe.scaling.wait_minutes,
        ),
        callbacks=[RunWatch(Storage(recipe.output_dir), sent, recipe.scaling)],
        worker_runtime_env={"env_vars": worker_environment(share.threads)},
        logging_config=LoggingConfig(log_level="WARNING"),
    )


def _explain(error: Exception, session: RaySession, recipe: Recipe) -> Exception:
    """Return the worker's UserError or RunFailed behind an error of Ray Train, else one that describes it."""
    from ray.train import ControllerError

    cause: BaseException | None = error
    if isinstance(error, ControllerError):
        cause = error.controller_failure
    while cause is not None:
        if isinstance(cause, UserError | RunFailed):
            return cause
        cause = cause.__cause__
    logs = session.log_folder
    where = f" Logs of the workers: {logs}." if logs else ""
    if isinstance(error, ControllerError) and "Startup" in type(error.controller_failure).__name__:
        return ResourceError(
            f"no room for {recipe.scaling.min_workers} workers within {recipe.scaling.wait_minutes} minutes "
            f"(scaling.wait_minutes): {str(error.controller_failure).strip().splitlines()[0]}{where}"
        )
    return RunFailed(f"Ray Train failed: {type(error).__name__}: {str(error).strip()[:500]}{where}")


class _Silent(Display):
    """Passes metrics to a function instead of showing them."""

    def __init__(self, on_progress: Progress):
        super().__init__()
        self.on_progress = on_progress

    def show(self, line: dict[str, Any]) -> None:
        self.on_progress(line)

    def say(self, text: str) -> None:
        logger.info("%s", text)
