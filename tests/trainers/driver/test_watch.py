"""Tests of the watch over workers on a local Ray, with a loop that fails on purpose in the place of a training."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import watched_loop

from dreamfleet.datasets.errors import RunFailed
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.driver.session import ray_session
from dreamfleet.trainers.report.events import read_events

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]
Watch = Callable[..., Any]


@pytest.fixture(scope="module", autouse=True)
def _local_ray() -> Iterator[None]:
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(watched_loop)  # workers do not find the modules of tests
    with ray_session(preload=("ray.train.torch",)):
        yield
    cloudpickle.unregister_pickle_by_value(watched_loop)


@pytest.fixture
def watch(tmp_path: Path) -> Watch:
    """Return a function that runs the loop on two workers and returns the number of starts."""
    import ray
    from ray.train import ControllerError, FailureConfig, RunConfig, ScalingConfig
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    from dreamfleet.trainers.config.scaling import ScalingConfig as OurScaling
    from dreamfleet.trainers.driver.watch import RunWatch

    (tmp_path / "saved").mkdir()
    names = (f"{tmp_path.name}-{number}" for number in itertools.count())

    def run(plan: list[Any], *, steps: int = 20, **scaling: Any) -> int:
        watching = RunWatch(Storage(tmp_path), {}, OurScaling(**scaling))
        trainer = DataParallelTrainer(
            watched_loop.train,
            train_loop_config={"folder": str(tmp_path), "steps": steps, "plan": plan},
            scaling_config=ScalingConfig(num_workers=2, resources_per_worker={"CPU": 0.1}),
            run_config=RunConfig(
                name=next(names),
                storage_path=str(tmp_path / "ray"),
                failure_config=FailureConfig(max_failures=-1),
                callbacks=[watching],
            ),
        )
        assert ray.is_initialized()
        try:
            return int(trainer.fit().return_value)
        except ControllerError as error:
            raise error.controller_failure from error

    return run


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_events(Storage(folder)) if event["kind"] == kind]


def test_an_error_that_repeats_at_the_same_step_ends_the_run_at_once(watch: Watch, tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match=r"failed twice after step 7 .*ValueError: bad value.*Fix the cause"):
        watch([[8, 1, "raise_error", 9]], max_failures=9)
    assert len(list(tmp_path.glob("start-1-*"))) == 2
    failures = events(tmp_path, "failure")
    assert [(one["cause"], one["step"], one["rank"]) for one in failures] == [("error", 7, 1)] * 2
    assert "raise_error" in failures[0]["traceback"]


def test_failures_that_each_follow_a_new_checkpoint_do_not_end_a_run(watch: Watch, tmp_path: Path) -> None:
    plan = [[6, 0, "kill_self", 1], [11, 1, "kill_self", 2], [16, 1, "kill_self", 3]]
    assert watch(plan, max_failures=1) == 4
    assert [one["counted"] for one in events(tmp_path, "failure")] == [1, 1, 1]
    assert {one["cause"] for one in events(tmp_path, "failure")} == {"died"}


def test_a_stopped_process_and_a_sleeping_thread_are_detected_and_replaced(
    watch: Watch, tmp_path: Path
) -> None:
    plan = [[6, 1, "stop_self", 1], [11, 0, "sleep_in_the_loop", 2]]
    assert watch(plan, max_failures=2, hang_timeout=4) == 3
    stopped, asleep = events(tmp_path, "hang")
    assert (stopped["cause"], stopped["ranks"]) == ("no answer", [1])
    assert (asleep["cause"], asleep["ranks"]) == ("no progress", [0])
    assert [one["cause"] for one in events(tmp_path, "failure")] == ["hung", "hung"]
    stacks = {path.name: path.read_text() for path in (tmp_path / "hangs").iterdir()}
    assert "is stopped" in stacks["step-000005-rank-1.txt"]
    assert "_meet" in stacks["step-000005-rank-0.txt"]
    assert "sleep_in_the_loop" in stacks["step-000010-rank-0.txt"]


def test_sigterm_leaves_after_a_checkpoint_and_costs_no_failure(watch: Watch, tmp_path: Path) -> None:
    assert watch([[8, 1, "terminate_self", 1]], max_failures=0) == 2
    (failure,) = events(tmp_path, "failure")
    assert (failure["cause"], failure["counted"], failure["action"]) == ("preempted", 0, "again")
    saved = {int(path.name) for path in (tmp_path / "saved").iterdir()}
    assert any(step % watched_loop.SAVE_EVERY for step in saved), "saved where the notice came"


def test_the_internals_of_ray_that_a_watch_needs_exist() -> None:
    import inspect

    from ray.train.v2._internal import constants

    from dreamfleet.trainers.driver import ray_internals

    assert constants.ENABLE_PREEMPTION_WATCHER_ENV_VAR == ray_internals.PREEMPTION_WATCHER
    assert constants.ENABLE_PREEMPTION_WATCHER_ENV_VAR in constants.ENV_VARS_TO_PROPAGATE
    assert ray_internals.draining_nodes() == {}
    hooks = ("after_worker_group_start", "after_execution_group_start", "after_worker_group_poll_status")
    assert all(hasattr(ray_internals.WorkerGroupCallback, hook) for hook in hooks)
    fields = inspect.signature(ray_internals.WorkerHealthCheckFailedError).parameters
    assert list(fields) == ["message", "failure"]
